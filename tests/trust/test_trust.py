"""The trust root against the attacks that it is there for: every row is a file or a set of signatures that must be refused."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepatch.errors import InputError, UntrustedError
from edgepatch.trust.drafts import new_root, next_root
from edgepatch.trust.roots import MAX_ROOT_BYTES, Key, Role, Root, parse_root, read_root
from edgepatch.trust.signatures import MANIFEST_TYPE, ROOT_TYPE, Signature, raw_public_key, sign
from edgepatch.trust.verification import require_current, require_signed, rotate, trusted_time, verify_threshold

NOW = datetime(2030, 6, 1, 12, tzinfo=timezone.utc)
YEAR = timedelta(days=365)
PAYLOAD = b'{"name":"detox"}'


def private(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public(*names: str) -> list[Key]:
    return [Key(raw_public_key(private(name)), name) for name in names]


def ids(*names: str) -> frozenset[str]:
    return frozenset(key.id for key in public(*names))


def signed(root: Root, *names: str) -> Root:
    for name in names:
        root = root.signed_by(private(name))
    return root


def signatures(*names: str, payload: bytes = PAYLOAD, kind: str = MANIFEST_TYPE) -> list[Signature]:
    return [sign(payload, kind, private(name)) for name in names]


def make(*patch_keys: str, root_keys: tuple[str, ...] = ("officer", "deputy"), **options: Any) -> Root:
    root = new_root(
        public(*patch_keys), public(*root_keys), **{"created": NOW - timedelta(days=1), "lifetime": YEAR, **options}
    )
    return signed(root, *root_keys)


ROOT = make("vendor", "site")  # 2 of 2
NEXT = signed(
    next_root(ROOT, created=NOW, lifetime=YEAR, patch_keys=public("vendor2"), revoke=ids("vendor")), "officer", "deputy"
)


def verify(
    signatures: list[Signature], root: Root = ROOT, payload: bytes = PAYLOAD, now: datetime = NOW, **options: Any
) -> frozenset[str]:
    return verify_threshold(payload, MANIFEST_TYPE, signatures, root, "patch", now, **options)


def body(root: Root = ROOT) -> dict[str, Any]:
    return json.loads(root.to_bytes())


def holds(data: bytes) -> bool:
    """Whether a trust root file is taken for one that its own keys signed."""
    try:
        require_signed(parse_root(data))
    except UntrustedError:
        return False
    return True


# --- Signatures under a payload


def test_enough_keys_signed():
    assert verify(signatures("vendor", "site")) == ids("vendor", "site")


def test_majority_is_enough():
    root = make("a", "b", "c")
    assert root.roles["patch"].threshold == 2
    assert verify(signatures("c", "a"), root) == ids("a", "c")
    assert verify(signatures("a", "b", "c"), root) == ids("a", "b", "c")


@pytest.mark.parametrize("names", [[], ["vendor"], ["site"], ["vendor", "vendor"], ["site"] * 16])
def test_key_compromise_one_key_of_two_is_too_few(names):
    with pytest.raises(UntrustedError, match="signatures of role patch: expected 2 of") as caught:
        verify(signatures(*names))
    assert caught.value.check == "signatures of role patch" and caught.value.exit_code == 3


def test_key_compromise_stranger_does_not_count():
    with pytest.raises(UntrustedError, match=r"not counted: unknown \(") as caught:
        verify(signatures("vendor", "stranger"))
    assert "found vendor (" in str(caught.value)


def test_stranger_beside_enough_keys_does_no_harm():
    assert verify(signatures("stranger", "vendor", "site")) == ids("vendor", "site")


def test_key_compromise_revoked_key_does_not_count():
    assert verify(signatures("vendor2", "site"), NEXT) == ids("vendor2", "site")
    with pytest.raises(UntrustedError, match=r"not counted: vendor \(\w{12}, revoked\)"):
        verify(signatures("vendor", "site"), NEXT)
    with pytest.raises(UntrustedError, match=r"found none; not counted: .*vendor"):
        verify(signatures("vendor"), NEXT)


def test_revoked_key_that_is_still_listed_in_the_role_does_not_count():
    root = make("a", "b", "c")
    root = signed(replace(root, revoked=ids("a"), signatures=()), "officer", "deputy")
    assert verify(signatures("b", "c"), root) == ids("b", "c")
    with pytest.raises(UntrustedError, match=", revoked"):
        verify(signatures("a", "b"), root)


def test_keys_of_another_role_do_not_count():
    with pytest.raises(UntrustedError, match=r"not counted: .*officer"):
        verify(signatures("vendor", "officer"))


def test_wrong_root():
    with pytest.raises(UntrustedError, match="found none; not counted: unknown"):
        verify(signatures("vendor", "site"), make("another", "company"))


@pytest.mark.parametrize("kind", [ROOT_TYPE, "application/vnd.edgepatch.manifest+json;v=2", ""])
def test_signatures_from_another_kind_of_document(kind):
    """A signature that the site made for something else cannot be moved below a patch."""
    mixed = [*signatures("vendor"), *signatures("site", kind=kind)]
    with pytest.raises(UntrustedError, match=r"signature of site .*does not fit"):
        verify(mixed)


def test_mix_and_match_signatures_of_another_payload():
    with pytest.raises(UntrustedError, match=r"signature of site .*does not fit"):
        verify([*signatures("vendor"), *signatures("site", payload=b"another")])


def test_bad_signature_beside_enough_good_ones_is_an_error():
    """Skipping it would leave a change unseen."""
    root = make("a", "b", "c")
    with pytest.raises(UntrustedError, match="signature of c"):
        verify([*signatures("a", "b"), *signatures("c", payload=b"another")], root)


def test_signature_under_another_id_is_an_error():
    relabelled = Signature("0" * 64, signatures("c")[0].signature)
    with pytest.raises(UntrustedError, match="key id of the signature of c"):
        verify([*signatures("a", "b"), relabelled], make("a", "b", "c"))


def test_endless_signatures():
    with pytest.raises(UntrustedError, match="number of signatures: expected at most 16, found 17"):
        verify(signatures(*["vendor"] * 17))


def test_worst_case_is_quick():
    """16 signatures of strangers, each tried with 64 keys."""
    names = [str(i) for i in range(62)]
    root = make(*names)
    start = time.perf_counter()
    with pytest.raises(UntrustedError):
        verify(signatures(*(f"stranger {i}" for i in range(16))), root)
    assert time.perf_counter() - start < 2


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_one_flipped_bit_in_payload_or_signatures_is_refused(data):
    """Of three signatures where two would do: also the spare one."""
    root = make("a", "b", "c")
    fields = [PAYLOAD, *(part for s in signatures("a", "b", "c") for part in (bytes.fromhex(s.key_id), s.signature))]
    which = data.draw(st.integers(0, len(fields) - 1))
    changed = bytearray(fields[which])
    bit = data.draw(st.integers(0, len(changed) * 8 - 1))
    changed[bit // 8] ^= 1 << bit % 8
    fields[which] = bytes(changed)
    payload, *parts = fields
    with pytest.raises(UntrustedError):
        verify([Signature(k.hex(), s) for k, s in zip(parts[::2], parts[1::2], strict=True)], root, payload)


# --- The clock


def test_expired_root_decides_nothing():
    last = ROOT.expires - timedelta(seconds=1)
    assert verify(signatures("vendor", "site"), now=last)
    for now in (ROOT.expires, ROOT.expires + YEAR):
        with pytest.raises(
            UntrustedError, match="expiry of trust root version 1: expected a time before 2031-05-31T12:00:00Z"
        ) as caught:
            verify(signatures("vendor", "site"), now=now)
        assert "rotate" in caught.value.hint


def test_freeze_clock_set_back_does_not_make_an_old_root_young():
    with pytest.raises(UntrustedError, match="expiry"):
        verify(signatures("vendor", "site"), now=NOW, not_before=ROOT.expires)
    with pytest.raises(UntrustedError, match="expiry"):
        rotate(ROOT, [NEXT], NOW, not_before=NEXT.expires)
    assert verify(signatures("vendor", "site"), now=NOW, not_before=NOW - YEAR)


def test_dead_clock_does_not_lock_a_machine_out():
    """A board without a battery starts in 1970, before the root was made."""
    assert verify(signatures("vendor", "site"), now=datetime(1970, 1, 1, tzinfo=timezone.utc))


def test_trusted_time():
    assert trusted_time(NOW) == NOW == trusted_time(NOW, None, NOW - YEAR)
    assert trusted_time(NOW, NOW + YEAR, None) == NOW + YEAR


def test_time_without_a_zone_is_no_time():
    with pytest.raises(TypeError):
        require_current(ROOT, datetime(2030, 6, 1))


def test_other_zones():
    zone = timezone(timedelta(hours=2))
    root = make("a", created=NOW.astimezone(zone))
    assert root.to_bytes() == make("a", created=NOW).to_bytes()


# --- The file


def test_round_trip(tmp_path: Path):
    for root in (ROOT, NEXT, replace(ROOT, signatures=())):
        path = tmp_path / "root.json"
        path.write_bytes(root.to_bytes())
        assert read_root(path) == root and read_root(path).to_bytes() == path.read_bytes()


def test_same_content_same_bytes():
    """The order in which keys are named and signatures are made does not show."""
    other = new_root(
        public("site", "vendor"), public("deputy", "officer"), created=NOW - timedelta(days=1), lifetime=YEAR
    )
    assert signed(other, "deputy", "officer").to_bytes() == ROOT.to_bytes()
    assert signed(ROOT, "officer").to_bytes() == ROOT.to_bytes()


def test_golden_file():
    """Bytes of format 1, for ever."""
    root = new_root(
        public("vendor"), public("officer"), created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc), lifetime=YEAR
    )
    officer, vendor = public("officer")[0], public("vendor")[0]
    keys = {key.id: f'"{key.id}":{{"owner":"{key.owner}","public":"{key.public.hex()}"}}' for key in (officer, vendor)}
    payload = (
        '{"created":"2026-01-02T03:04:05Z","expires":"2027-01-02T03:04:05Z","format":1,"keys":{'
        + ",".join(keys[name] for name in sorted(keys))
        + f'}},"revoked":[],"roles":{{"patch":{{"keys":["{vendor.id}"],"threshold":1}},"root":{{"keys":["{officer.id}"],"threshold":1}}}},"version":1}}'
    )
    assert root.payload.decode() == payload and root.fingerprint == hashlib.sha256(payload.encode()).hexdigest()
    assert root.fingerprint == "c77dade83e5d8bb31c99c3b9b954d3db85b42ecc327a0ebd0a4ce3dc6365d07a"


def test_every_flipped_bit_of_a_root_file_is_refused():
    data = make("vendor", root_keys=("officer",)).to_bytes()
    assert holds(data)
    accepted = []
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        if holds(bytes(changed)):
            accepted.append(bit)
    assert accepted == []


def test_every_truncation_of_a_root_file_is_refused():
    data = ROOT.to_bytes()
    assert not any(holds(data[:length]) for length in range(len(data)))
    assert not holds(data + b"\n")


def plain_json(value: object) -> bytes:
    """Sorted and without white space; what canonical JSON has not, such as 1.0 or NaN, is written as it is."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def change(path: str, value: object) -> bytes:
    """ROOT with one value replaced, or added; signed anew so that only the form is at fault."""
    document = body()
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    if path.startswith("signed."):
        document["signatures"] = [
            sign(plain_json(document["signed"]), ROOT_TYPE, private(n)).as_dict() for n in ("officer", "deputy")
        ]
        document["signatures"].sort(key=lambda s: s["key_id"])
    return plain_json(document)


VENDOR = public("vendor")[0]
OFFICER = public("officer")[0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("signed.format", 2, "format of trust root: expected 1, found 2"),
        ("signed.format", True, "format of trust root"),
        ("signed.format", None, "format of trust root: expected 1, found None"),
        ("signed", [], "format of trust root"),
        ("signed.note", "x", "expected created, expires, format"),
        ("signed.revoked", None, "expected created, expires, format"),
        ("extra", {}, "expected signatures, signed, found extra"),
        ("signatures", None, "expected signatures, signed, found signed"),
        ("signed.version", 0, "root version: expected 1 to"),
        ("signed.version", -1, "root version"),
        ("signed.version", 2**31 + 1, "root version"),
        ("signed.version", True, "root version: expected int, found bool"),
        ("signed.version", 1.0, r"canonical JSON \(RFC 8785\), found another form at byte"),
        ("signed.version", "1", "root version: expected int, found str"),
        ("signed.created", 1893456000, "creation of the root: expected str, found int"),
        ("signed.created", "2030-01-01", "creation of the root: expected a time like"),
        ("signed.created", "2030-01-01T00:00:00+00:00", "creation of the root"),
        ("signed.created", "2030-1-1T00:00:00Z", "times with all digits"),
        ("signed.created", "2030-02-30T00:00:00Z", "creation of the root"),
        ("signed.created", "2030-01-01T00:00:0٠Z", "times with all digits"),
        ("signed.expires", "2029-01-01T00:00:00Z", "root expiry: expected later than its creation"),
        ("signed.keys", [], "keys of the root: expected dict, found list"),
        ("signed.keys", {}, "keys of role root: expected keys that the root lists"),
        ("signed.keys", {"x" * 10_000: {}}, "key id: expected 64 digits"),
        (f"signed.keys.{VENDOR.id}", [], "a key of the root: expected owner, public, found list"),
        (f"signed.keys.{VENDOR.id}", {}, "a key of the root: expected owner, public, found nothing"),
        (f"signed.keys.{VENDOR.id}.scheme", "none", "a key of the root"),
        (f"signed.keys.{VENDOR.id}.owner", "", "owner of a key: expected 1 to 64 printable"),
        (f"signed.keys.{VENDOR.id}.owner", "x" * 65, "owner of a key"),
        (f"signed.keys.{VENDOR.id}.owner", "vendor\x1b[2J", "owner of a key"),
        (f"signed.keys.{VENDOR.id}.owner", "\u202erodnev", "owner of a key"),
        (f"signed.keys.{VENDOR.id}.owner", 5, "owner of a key: expected str"),
        (f"signed.keys.{VENDOR.id}.public", "00" * 31, "length of a public key: expected 32 bytes, found 31"),
        (f"signed.keys.{VENDOR.id}.public", VENDOR.public.hex().upper(), "a public key: expected lower-case hex"),
        (f"signed.keys.{VENDOR.id}.public", "00" * 32, "id of the key of vendor"),
        ("signed.roles", {}, "roles of the root: expected patch, root, found nothing"),
        ("signed.roles.extra", {"keys": [], "threshold": 1}, "roles of the root: expected patch, root"),
        ("signed.roles.patch", 5, "role patch: expected keys, threshold"),
        ("signed.roles.patch.keys", "x", "keys of role patch: expected list, found str"),
        ("signed.roles.patch.keys", [5], "keys of role patch: expected 64 digits"),
        ("signed.roles.patch.keys", ["00" * 32], "keys of role patch: expected keys that the root lists"),
        ("signed.roles.patch.keys", [VENDOR.id, VENDOR.id], "threshold of role patch: expected 1 to 1"),
        ("signed.roles.root.keys", [*sorted(ids("officer", "deputy")), OFFICER.id], "sorted lists without duplicates"),
        ("signed.roles.root.keys", sorted(ids("officer", "deputy"), reverse=True), "sorted lists without duplicates"),
        ("signed.roles.patch.threshold", 0, "threshold of role patch: expected 1 to 2"),
        ("signed.roles.patch.threshold", -1, "threshold of role patch"),
        ("signed.roles.patch.threshold", 3, "threshold of role patch"),
        ("signed.roles.patch.threshold", "2", "threshold of role patch: expected int"),
        ("signed.revoked", [VENDOR.id], "threshold of role patch: expected 1 to 1, the owners of its keys in force"),
        ("signed.revoked", ["vendor"], "revoked keys: expected 64 digits"),
        ("signed.revoked", {}, "revoked keys: expected list"),
        ("signed.revoked", [f"{i:064x}" for i in range(65)], "keys of the root: expected at most 64"),
        (
            "signed.keys",
            {f"{i:064x}": {"owner": "x", "public": "00" * 32} for i in range(65)},
            "keys of the root: expected at most 64",
        ),
        ("signatures", {}, "signatures of the root: expected list"),
        ("signatures", ["x"], "a signature: expected key_id and signature"),
        (
            "signatures",
            [signatures("officer")[0].as_dict()] * 2,
            "signatures of the root: expected at most 16, sorted, one a key",
        ),
        ("signatures", [s.as_dict() for s in reversed(ROOT.signatures)], "signatures of the root"),
        ("signatures", [{"key_id": f"{i:064x}", "signature": "00" * 64} for i in range(17)], "signatures of the root"),
    ],
    ids=lambda value: str(value)[:32],
)
def test_what_breaks_the_form_is_refused(path, value, message):
    with pytest.raises(UntrustedError, match=message) as caught:
        parse_root(change(path, value))
    assert len(str(caught.value)) < 600, "a hostile file does not write the message"


def test_the_helper_changes_nothing_else():
    assert parse_root(change("signed.version", 1)) == ROOT


def test_not_canonical_is_refused():
    with pytest.raises(UntrustedError, match=r"root\.json: expected canonical JSON"):
        parse_root(json.dumps(body(), indent=1).encode(), "root.json")


def test_endless_data(tmp_path: Path):
    with pytest.raises(UntrustedError, match=f"size of trust root: expected at most {MAX_ROOT_BYTES}"):
        parse_root(b" " * (MAX_ROOT_BYTES + 1))
    path = tmp_path / "root.json"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    start = time.perf_counter()
    with pytest.raises(UntrustedError, match="at most"):
        read_root(path)
    assert time.perf_counter() - start < 1


def test_largest_root_fits_its_own_cap():
    names = [f"{i:0>64}" for i in range(64)]
    revoked = frozenset(hashlib.sha256(bytes([i])).hexdigest() for i in range(64))
    root = replace(make(*names, root_keys=tuple(names)[:16]), revoked=revoked, signatures=())
    root = signed(root, *names[:16])
    assert len(root.to_bytes()) < MAX_ROOT_BYTES and parse_root(root.to_bytes()) == root
    assert require_signed(root) == ids(*names[:16])


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    assert not holds(data)


PLACES = [
    "signed",
    "signatures",
    "signed.keys",
    f"signed.keys.{VENDOR.id}",
    "signed.roles",
    "signed.roles.root",
    "signed.roles.root.keys",
    "signed.version",
    "signed.created",
    "signed.expires",
    "signed.revoked",
    "signed.roles.patch.threshold",
]
VALUES = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["key_id", "public", "keys", VENDOR.id, "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(PLACES), VALUES)
def test_random_values_raise_nothing_else(path, value):
    try:
        root = parse_root(change(path, value))
    except UntrustedError:
        return
    assert root.to_bytes() == change(path, value)


# --- A root of its own


def test_unsigned_root_decides_nothing():
    with pytest.raises(UntrustedError, match=r"signatures of trust root version 1: expected 2 of .*, found none"):
        verify(signatures("vendor", "site"), replace(ROOT, signatures=()))


@pytest.mark.parametrize("names", [["officer"], ["officer", "vendor", "site"], ["stranger", "deputy"]])
def test_root_with_too_few_signatures(names):
    with pytest.raises(UntrustedError, match="signatures of trust root version 1"):
        verify(signatures("vendor", "site"), signed(replace(ROOT, signatures=()), *names))


def test_root_signed_as_a_manifest():
    wrong = tuple(sorted(sign(ROOT.payload, MANIFEST_TYPE, private(name)) for name in ("officer", "deputy")))
    with pytest.raises(UntrustedError, match="does not fit"):
        require_signed(replace(ROOT, signatures=wrong))


def test_changed_root_decides_nothing():
    changed = replace(ROOT, roles={**ROOT.roles, "patch": Role(ROOT.roles["patch"].keys, 1)})
    with pytest.raises(UntrustedError, match=r"signature of .*does not fit"):
        verify(signatures("vendor"), changed)


# --- Rotation


def successor(old: Root, *signers: str, **options: Any) -> Root:
    return signed(next_root(old, **{"created": NOW, "lifetime": YEAR, **options}), *signers)


def test_rotation():
    rotation = rotate(ROOT, [NEXT], NOW)
    assert rotation.root is NEXT and rotation.resets_sequences
    assert NEXT.counting("patch") == ids("vendor2", "site") and NEXT.revoked == ids("vendor")


@pytest.mark.parametrize(
    ("options", "resets"),
    [
        ({}, False),
        ({"patch_keys": public("third")}, False),
        ({"patch_threshold": 1}, False),
        ({"root_keys": public("third")}, False),
        ({"patch_keys": public("vendor2"), "revoke": ids("vendor")}, True),
        ({"patch_threshold": 1, "revoke": ids("site")}, True),
    ],
)
def test_fast_forward_only_a_key_that_is_gone_resets_the_sequences(options, resets):
    assert rotate(ROOT, [successor(ROOT, "officer", "deputy", **options)], NOW).resets_sequences is resets


def test_a_key_dropped_without_revocation_resets_too():
    new = replace(successor(ROOT, patch_threshold=1), roles={**ROOT.roles, "patch": Role(ids("site"), 1)})
    assert rotate(ROOT, [signed(new, "officer", "deputy")], NOW).resets_sequences


def test_a_reset_anywhere_on_the_way_is_not_forgotten():
    third = successor(NEXT, "officer", "deputy")
    assert not rotate(NEXT, [third], NOW).resets_sequences
    assert rotate(ROOT, [NEXT, third], NOW).resets_sequences


def test_root_keys_change_hands():
    new = next_root(ROOT, created=NOW, lifetime=YEAR, root_keys=public("captain", "major"), revoke=ids("officer"))
    assert new.counting("root") == ids("deputy", "captain", "major")
    both = signed(new, "officer", "deputy", "captain")
    assert rotate(ROOT, [both], NOW).root is both
    with pytest.raises(UntrustedError, match="signatures of trust root version 2 by version 1"):
        rotate(ROOT, [signed(new, "deputy", "captain", "major")], NOW)
    with pytest.raises(UntrustedError, match="signatures of trust root version 2 by itself"):
        rotate(ROOT, [signed(new, "officer", "deputy")], NOW)


def test_chain_in_order_without_a_gap():
    third = successor(NEXT, "officer", "deputy")
    fourth = successor(third, "officer", "deputy")
    assert rotate(ROOT, [NEXT, third, fourth], NOW).root is fourth
    for wrong in ([third], [NEXT, fourth], [third, NEXT], [NEXT, NEXT]):
        with pytest.raises(UntrustedError, match="root version: expected"):
            rotate(ROOT, wrong, NOW)


def test_rollback_of_the_root():
    for older in (ROOT, NEXT):
        with pytest.raises(UntrustedError, match=f"root version: expected 3, found {older.version}"):
            rotate(NEXT, [older], NOW)


def test_arbitrary_installation_of_a_root():
    """Another company's root of the right version, properly signed by its own keys."""
    foreign = make("evil", root_keys=("evil officer",))
    with pytest.raises(
        UntrustedError, match=r"version 2 by version 1: expected 2 of .*, found none; not counted: unknown"
    ):
        rotate(ROOT, [signed(replace(foreign, version=2, signatures=()), "evil officer")], NOW)


def test_key_compromise_one_root_key_of_two_cannot_rotate():
    new = replace(make("evil", root_keys=("officer",), root_threshold=1), version=2, signatures=())
    with pytest.raises(UntrustedError, match=r"by version 1: expected 2 of .*, found officer"):
        rotate(ROOT, [signed(new, "officer")], NOW)


def test_patch_keys_cannot_rotate():
    with pytest.raises(UntrustedError, match="by version 1"):
        rotate(ROOT, [successor(ROOT, "vendor", "site")], NOW)


def test_revocation_is_for_ever():
    forgetful = replace(successor(NEXT), revoked=frozenset())
    with pytest.raises(UntrustedError, match=r"revoked keys of trust root version 3: expected also vendor"):
        rotate(NEXT, [signed(forgetful, "officer", "deputy")], NOW)


def test_expired_root_still_rotates_to_one_that_is_not():
    later = NOW + 3 * YEAR
    second = successor(ROOT, "officer", "deputy")
    third = successor(second, "officer", "deputy", created=later)
    assert rotate(ROOT, [second, third], later).root is third
    with pytest.raises(UntrustedError, match="expiry of trust root version 2"):
        rotate(ROOT, [second], later)


def test_pinned_root_that_was_changed_does_not_rotate():
    pinned = replace(ROOT, expires=ROOT.expires + YEAR)
    with pytest.raises(UntrustedError, match="does not fit"):
        rotate(pinned, [NEXT], NOW)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_one_flipped_bit_of_the_next_root_is_refused(data):
    """Also in a signature of a root key that the next version no longer lists."""
    new = signed(
        next_root(ROOT, created=NOW, lifetime=YEAR, root_keys=public("captain"), revoke=ids("officer")),
        "officer",
        "deputy",
        "captain",
    )
    original = replace(
        new,
        keys={k: v for k, v in new.keys.items() if v.owner != "officer"},
        roles={**new.roles, "root": Role(ids("deputy", "captain"), 2)},
        signatures=(),
    )
    file = signed(original, "officer", "deputy", "captain").to_bytes()
    assert rotate(ROOT, [parse_root(file)], NOW)
    bit = data.draw(st.integers(0, len(file) * 8 - 1))
    changed = bytearray(file)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UntrustedError):
        rotate(ROOT, [parse_root(bytes(changed))], NOW)


@pytest.mark.parametrize("owner", ["vendor", "Vendor", " vendor ", "\uff56endor"])
def test_keys_of_one_owner_are_one(owner):
    """A vendor with two keys is one vendor: where two must sign, the site must."""
    keys = [*public("vendor", "site"), Key(raw_public_key(private("spare")), owner)]
    root = signed(
        new_root(keys, public("officer"), created=NOW - timedelta(days=1), lifetime=YEAR, patch_threshold=2), "officer"
    )
    with pytest.raises(UntrustedError, match="signatures of role patch: expected 2 of"):
        verify_threshold(PAYLOAD, MANIFEST_TYPE, signatures("vendor", "spare"), root, "patch", NOW)
    assert len(verify_threshold(PAYLOAD, MANIFEST_TYPE, signatures("spare", "site"), root, "patch", NOW)) == 2
    with pytest.raises(InputError, match="expected 1 to 2, the number of its keys' owners, found 3"):
        new_root(keys, public("officer"), created=NOW, lifetime=YEAR, patch_threshold=3)
    with pytest.raises(UntrustedError, match="threshold of role patch: expected 1 to 2, the owners"):
        replace(root, roles={**root.roles, "patch": replace(root.roles["patch"], threshold=3)})


# --- Drafts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make("a", patch_threshold=2),
            "threshold of role patch: expected 1 to 1, the number of its keys' owners, found 2",
        ),
        (lambda: make("a", root_threshold=0), "threshold of role root: expected 1 to 2"),
        (lambda: make(), "threshold of role patch: expected 1 to 0"),
        (lambda: make("a", "a"), "found one twice among a, a"),
        (lambda: make("a", root_keys=("b", "b")), "found one twice"),
        (lambda: successor(ROOT, revoke=["0" * 64]), "key to revoke: expected a key of the trust root, found 000"),
        (lambda: successor(ROOT, revoke=ids("vendor")), "threshold of role patch: expected 1 to 1"),
        (
            lambda: successor(NEXT, patch_keys=public("vendor")),
            r"expected one that is not revoked, found vendor \(\w+, revoked\)",
        ),
        (lambda: successor(ROOT, patch_threshold=0), "threshold of role patch"),
    ],
)
def test_drafts_that_cannot_work(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_next_root_needs_a_signed_one():
    """Else a changed file slips a key into the version that is signed next."""
    slipped = replace(
        ROOT,
        keys={**ROOT.keys, public("evil")[0].id: public("evil")[0]},
        roles={**ROOT.roles, "patch": Role(ids("vendor", "site", "evil"), 2)},
    )
    with pytest.raises(UntrustedError):
        successor(slipped)


def test_next_root_keeps_what_is_not_named():
    new = successor(ROOT)
    assert (new.version, new.roles, new.keys, new.revoked, new.signatures) == (
        2,
        ROOT.roles,
        ROOT.keys,
        frozenset(),
        (),
    )
    assert (new.created, new.expires) == (NOW, NOW + YEAR)
    renamed = Key(VENDOR.public, "somebody else")
    assert successor(ROOT, patch_keys=[renamed]).keys[VENDOR.id].owner == "vendor"
