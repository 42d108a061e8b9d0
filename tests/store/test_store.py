"""The store: what it takes, what it refuses, and that what lies in it is what was applied."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from edgepatch.errors import EdgepatchError, InputError, MismatchError, PatchFormatError, UntrustedError
from edgepatch.files.canonical import MAX_DEPTH
from edgepatch.patch.file import patch_bytes
from edgepatch.store import audit
from edgepatch.store.device import Store
from edgepatch.store.policy import MAX_JUMP, Allowances
from edgepatch.store.reading import StoreReader, default_folder
from edgepatch.store.records import State, TrustState, base_id, parse_state, parse_trust
from kit.stores import NOW, Clock, make_patch, make_root, make_store, public, rotated, spec, write


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def active(store):
    patches = store.active(spec())
    return patches[0].sequence if patches else None


def actions(store):
    return [entry["action"] for entry in store.history()]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- apply, rollback, hold, remove


def test_apply_keeps_the_very_bytes(store, tmp_path):
    file = write(tmp_path)
    change = store.apply(file)
    assert store.patch_path(change.digest).read_bytes() == file.read_bytes()
    assert (change.is_new, change.before) == (True, "")
    assert change.signed_by == {public("vendor").id, public("site").id}
    assert patch_bytes(store.active(spec())[0]) == file.read_bytes()
    assert actions(store) == ["trust", "apply"]


def test_apply_replaces_and_rollback_returns(store, tmp_path):
    digests = [store.apply(write(tmp_path, sequence)).digest for sequence in (1, 2, 5)]
    assert active(store) == 5
    change = store.rollback(reason="too strict")
    assert (change.digest, change.before, active(store)) == (digests[1], digests[2], 2)
    assert store.rollback().digest == digests[0]
    with pytest.raises(EdgepatchError, match="go back to, found none") as error:
        store.rollback()
    assert error.value.exit_code == 1
    assert actions(store)[-2:] == ["rollback", "rollback"]
    assert store.history()[-2]["reason"] == "too strict"
    assert store.apply(write(tmp_path, 5)).before == digests[0], "the newest one seen may come again"


def test_a_base_keeps_the_first_name_that_its_model_gave(store, tmp_path):
    """The text is that of whoever made the model's file; a state without names is as releases wrote it that knew none."""
    base = base_id(spec())
    store.apply(write(tmp_path, 1))
    assert "name" not in json.loads((store.folder / "state.json").read_bytes())["bases"][base]
    assert store.read()[0].bases[base].title == "llama, 2 layers of 8"
    store.apply(write(tmp_path, 1), base_name="Small \x1b[31mTalker\n\u202e" + "x" * 200)
    name = store.read()[0].bases[base].name
    assert name.startswith("Small [31mTalker x") and len(name) == 80 and name.isprintable()
    store.apply(write(tmp_path, 2), base_name="Other")
    state = store.read()[0]
    assert (state.bases[base].name, parse_state(state.to_bytes())) == (name, state)
    assert store.find_base("small") == store.find_base(name) == store.find_base(base[:6]) == base
    forged = replace(state, bases={base: replace(state.bases[base], name="a\x1bb")})
    with pytest.raises(UntrustedError, match="name of a base"):
        parse_state(forged.to_bytes())


def test_apply_twice_changes_nothing(store, tmp_path):
    file = write(tmp_path)
    store.apply(file)
    before = snapshot(store.folder)
    assert not store.apply(file).is_new
    assert snapshot(store.folder) == before


def test_apply_mends_a_damaged_file(store, tmp_path):
    file = write(tmp_path)
    path = store.patch_path(store.apply(file).digest)
    for damage in (lambda: path.write_bytes(b"x" * path.stat().st_size), path.unlink):
        damage()
        with pytest.raises(UntrustedError, match=r"apply its file again|the bytes that were applied|its file"):
            store.active(spec())
        assert store.apply(file).is_new
        assert active(store) == 1
    assert store.read()[0].bases[base_id(spec())].slots["detox"].previous == ()


def test_apply_with_another_signature(store, tmp_path):
    """More signatures are other bytes of the same patch."""
    store.apply(write(tmp_path))
    third = write(tmp_path, by=("vendor", "site", "thief"))
    assert store.apply(third).is_new
    assert len(store.active(spec())[0].signatures) == 3


def test_hold(store, tmp_path):
    store.apply(write(tmp_path))
    base = store.hold(reason="acceptance test")
    store.hold(reason="acceptance test")
    with pytest.raises(EdgepatchError, match="held: acceptance test") as error:
        store.apply(write(tmp_path, 2))
    assert (error.value.exit_code, active(store)) == (1, 1)
    assert store.hold(base[:6], is_held=False) == base
    store.apply(write(tmp_path, 2))
    assert actions(store) == ["trust", "apply", "hold", "unhold", "apply"]


def test_remove(store, tmp_path):
    first, second = (store.apply(write(tmp_path, sequence)).digest for sequence in (1, 2))
    with pytest.raises(EdgepatchError, match="is active"):
        store.remove(second)
    assert store.remove(f"sha256:{first[:12]}") == first
    assert not store.patch_path(first).exists()
    with pytest.raises(EdgepatchError, match="go back to"):
        store.rollback()
    with pytest.raises(InputError, match="found 0 of 1"):
        store.remove(first)
    with pytest.raises(InputError, match="found 0"):
        store.find(second[:4])
    assert audit.verify(store) == []


def test_several_bases(store, tmp_path):
    other = spec(weight_fingerprint="c" * 64)
    with pytest.raises(InputError, match="found 0") as refused:
        store.hold(None)
    assert "nothing is applied yet" in refused.value.hint
    store.apply(write(tmp_path))
    store.apply(write(tmp_path, 7, base=other), model=other)
    assert (active(store), store.active(other)[0].sequence) == (1, 7)
    with pytest.raises(InputError, match=r"expected one in .*, found 2"):
        store.rollback()
    assert store.find_base(base_id(other)[:10]) == base_id(other)
    with pytest.raises(InputError, match="found 0"):
        store.hold("nonsense")


def test_load_by_digest(store, tmp_path):
    first = store.apply(write(tmp_path)).digest
    store.apply(write(tmp_path, 2))
    assert store.load(f"sha256:{first}").sequence == 1


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "here"))
    assert default_folder() == StoreReader().folder == tmp_path / "here"
    monkeypatch.delenv("EDGEPATCH_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "edgepatch" / "store"


def test_nothing_there(tmp_path):
    store = Store(tmp_path / "none")
    assert store.read() == (State(), TrustState())
    assert (store.active(spec()), store.history(), store.root()) == ((), [], None)
    assert not store.folder.exists(), "reading makes nothing"
    with pytest.raises(InputError, match="found nothing there"):
        StoreReader(store.folder).read()


def test_the_folder_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = make_store(tmp_path / "link")
    store.apply(write(tmp_path))
    assert Store(tmp_path / "real").active(spec())[0].sequence == 1


# --- The attacks of the threat model


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ((), "found none"),
        (("vendor",), "found vendor"),
        (("vendor", "thief"), "found vendor"),
        (("thief",), "found none"),
    ],
    ids=["unsigned", "one of two", "one and a stranger", "stranger"],
)
def test_arbitrary_installation_and_key_compromise(store, tmp_path, by, message):
    store.apply(write(tmp_path))
    with pytest.raises(UntrustedError, match=message) as error:
        store.apply(write(tmp_path, 2, by=by))
    assert (error.value.exit_code, active(store)) == (3, 1)


def test_every_flipped_bit_in_the_store_is_refused(store, tmp_path):
    path = store.patch_path(store.apply(write(tmp_path)).digest)
    data = bytearray(path.read_bytes())
    taken = []
    for bit in range(0, len(data) * 8, 29):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            store.active(spec())
            taken.append(bit)
        except UntrustedError:
            pass
        data[bit // 8] ^= 1 << bit % 8
    assert not taken
    path.write_bytes(data)
    assert active(store) == 1


def test_endless_data(store, tmp_path):
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(PatchFormatError, match="size"):
        store.apply(huge)
    with pytest.raises(InputError, match="no regular file"):
        store.apply(Path("/dev/zero"))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match="no regular file"):
        store.apply(fifo)
    with pytest.raises(InputError, match="No such file"):
        store.apply(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(PatchFormatError, match="other"):
        store.apply(tmp_path / "other")


def test_fast_forward(store, tmp_path):
    with pytest.raises(UntrustedError, match=f"at most {MAX_JUMP}, found {2**53 - 1}"):
        store.apply(write(tmp_path, 2**53 - 1))
    store.apply(write(tmp_path, MAX_JUMP))
    with pytest.raises(UntrustedError, match="at most"):
        store.apply(write(tmp_path, 2 * MAX_JUMP + 1), Allowances(downgrade="no way around"))
    assert active(store) == MAX_JUMP


def test_fast_forward_ends_with_a_new_root(tmp_path):
    """A stolen key has made all genuine patches look old; the root that revokes it forgets the numbers."""
    store = make_store(tmp_path / "store")
    store.apply(write(tmp_path, 900))
    change = store.set_root([rotated(store.root(), patch_keys=[public("vendor2")], revoke=[public("vendor").id])])
    assert change.reset
    assert len(change.refused) == 1, "nobody vouches for what is active"
    with pytest.raises(UntrustedError):
        store.active(spec())
    store.apply(write(tmp_path, 2, by=("vendor2", "site")))
    assert active(store) == 2


def test_a_reset_keeps_what_the_new_root_vouches_for(tmp_path):
    """The active patch is genuine by the new root's word as well: nothing older comes back."""
    store = make_store(tmp_path / "store")
    store.apply(write(tmp_path, 5))
    change = store.set_root([rotated(store.root(), patch_threshold=1, revoke=[public("vendor").id])])
    assert (change.reset, change.refused) == (True, ())
    with pytest.raises(UntrustedError, match="6 or more"):
        store.apply(write(tmp_path, 4))
    store.apply(write(tmp_path, 6, by=("site",)))


def test_rotation_that_keeps_the_keys_keeps_the_numbers(store, tmp_path):
    store.apply(write(tmp_path, 5))
    change = store.set_root([rotated(store.root())])
    assert (change.reset, change.refused, active(store)) == (False, (), 5)
    with pytest.raises(UntrustedError, match="6 or more"):
        store.apply(write(tmp_path, 4))


def test_rollback_attack(store, tmp_path):
    for sequence in (3, 4, 6):
        store.apply(write(tmp_path, sequence))
    for older in (1, 2, 3, 4, 5):
        with pytest.raises(UntrustedError, match=f"expected 7 or more, found {older}"):
            store.apply(write(tmp_path, older))
    store.rollback()
    with pytest.raises(UntrustedError, match="7 or more"):
        store.apply(write(tmp_path, 5))
    assert active(store) == 4


def test_another_patch_of_the_same_sequence(store, tmp_path):
    store.apply(write(tmp_path, 3))
    with pytest.raises(UntrustedError, match="4 or more, found 3"):
        store.apply(write(tmp_path, 3, summary="another one"))


def test_downgrade_with_a_reason(store, tmp_path):
    store.apply(write(tmp_path, 6))
    store.apply(write(tmp_path, 2), Allowances(downgrade="6 breaks the intake form"))
    assert active(store) == 2
    assert store.history()[-1]["downgrade"] == "6 breaks the intake form"
    with pytest.raises(UntrustedError, match="7 or more"):
        store.apply(write(tmp_path, 5))
    store.apply(write(tmp_path, 7))


def test_another_channel_is_no_way_around(store, tmp_path):
    store.apply(write(tmp_path, 6))
    beta = write(tmp_path, 1, channel="beta")
    with pytest.raises(UntrustedError, match="channel of the patch: expected stable, found beta"):
        store.apply(beta)
    store.apply(beta, channel="beta")
    with pytest.raises(UntrustedError, match="expected beta, found stable"):
        store.apply(write(tmp_path, 7))
    with pytest.raises(UntrustedError, match="7 or more"):
        store.apply(write(tmp_path, 5), channel="stable")


def test_freeze(tmp_path):
    clock = Clock()
    store = make_store(tmp_path / "store", clock)
    file = write(tmp_path, expires="2030-02-01T00:00:00Z")
    store.apply(file)
    assert audit.status(store)[1] == []
    clock.time = NOW + timedelta(days=31)
    assert [f.message[:7] for f in audit.status(store)[1]] == ["expired"]
    assert active(store) == 1, "a running assistant goes on"
    with pytest.raises(UntrustedError, match="expiry of the patch"):
        store.apply(write(tmp_path, 2, expires="2030-02-01T00:00:00Z"))
    store.apply(write(tmp_path, 3, expires="2030-02-01T00:00:00Z"), Allowances(expired="the new one is on its way"))
    assert store.history()[-1]["expired"] == "the new one is on its way"


def test_a_clock_that_is_set_back(tmp_path):
    clock = Clock(NOW + timedelta(days=40))
    store = make_store(tmp_path / "store", clock)
    store.apply(write(tmp_path))
    clock.time = NOW
    with pytest.raises(UntrustedError, match="expiry of the patch"):
        store.apply(write(tmp_path, 2, expires="2030-02-01T00:00:00Z"))
    findings = audit.status(store)[1]
    assert [(f.level, f.subject) for f in findings] == [("warning", "clock")]
    with pytest.raises(InputError, match="reason"):
        store.reset_clock("")
    store.reset_clock("the battery was dead")
    assert audit.status(store)[1] == []
    store.apply(write(tmp_path, 2, expires="2030-02-01T00:00:00Z"))


def test_a_root_that_has_expired(tmp_path):
    clock = Clock()
    store = make_store(tmp_path / "store", clock)
    store.apply(write(tmp_path))
    clock.time = NOW + timedelta(days=400)
    assert active(store) == 1, "a running assistant goes on"
    assert [(f.level, f.subject) for f in audit.verify(store)] == [("warning", "trust root")]
    with pytest.raises(UntrustedError, match="expiry of trust root"):
        store.apply(write(tmp_path, 2))


def test_mix_and_match(store, tmp_path):
    """Neither another patch under a name of the store, nor tensors of one with the manifest of another."""
    first, second = (store.apply(write(tmp_path, sequence)).digest for sequence in (1, 2))
    store.patch_path(second).write_bytes(store.patch_path(first).read_bytes())
    with pytest.raises(UntrustedError, match=f"found patch {first[:12]}"):
        store.active(spec())
    with pytest.raises(PatchFormatError, match="SHA-256"):
        one, two = patch_bytes(make_patch(1)), patch_bytes(make_patch(2))
        (tmp_path / "mixed").write_bytes(one[:-64] + two[-64:])
        store.apply(tmp_path / "mixed")


def test_wrong_software(store, tmp_path):
    other = {"hidden_size": 8, "rope_theta": 5000.0, "weight_fingerprint": "c" * 64}
    store.apply(write(tmp_path))
    file = write(tmp_path, 2, base=spec(**other))
    with pytest.raises(MismatchError, match=r"rope_theta.*\n.*weight_fingerprint") as error:
        store.apply(file)
    assert error.value.exit_code == 4
    assert set(error.value.differences) == {"rope_theta", "weight_fingerprint"}
    assert "--model" in error.value.hint
    with pytest.raises(MismatchError):
        store.apply(write(tmp_path, 2), model=spec(**other))
    store.apply(file, model=spec(**other))


def test_tampered_state(store, tmp_path):
    first = store.apply(write(tmp_path)).digest
    store.apply(write(tmp_path, 2))
    state = store.folder / "state.json"
    good = state.read_bytes()
    for bad in (
        b"{}",
        b"",
        b"[]",
        b'{"format":1}',
        b'{"format":2}',
        b'{"format":3}',
        b'{"format":true}',
        good + b" ",
        good.replace(b'"format":2', b'"format":2.0'),
        good.replace(b'"format":2', b'"format":"2"'),
        good.replace(b'"rope_theta":10000', b'"rope_theta":10000.0'),
        good.replace(b'"sequence":1', b'"sequence":true'),
        good.replace(b'"is_held":false', b'"is_held":0'),
        good.replace(b'"hidden_size":8', b'"hidden_size":9'),
        good.replace(b'"hidden_size":8', b'"hidden_size":"8"'),
        good.replace(b'"previous":["', b'"previous":["x'),
        good.replace(f'"previous":["{first}"]'.encode(), b'"previous":"x"'),
        good.replace(f'"{first}":'.encode(), b'"x":'),
        good.replace(f'"base":"{base_id(spec())}"'.encode(), f'"base":"{first}"'.encode()),
        good.replace(b'"lines":3', b'"linez":3'),
        good.replace(b'"patches":{', b'"patches":[],"z":{'),
        good.replace(b'"trust":"', b'"trust":"x'),
    ):
        assert bad != good
        state.write_bytes(bad)
        with pytest.raises(UntrustedError):
            pytest.fail(f"taken: {bad!r}: {store.active(spec())}")
        with pytest.raises(UntrustedError):
            store.apply(write(tmp_path, 3))
    state.write_bytes(good)
    assert active(store) == 2


GOLDEN = Path(__file__).parent.parent / "golden" / "store-v1"
OTHER = spec(
    rope_theta=500000.0,
    rope_scaling={"factor": 8.0, "rope_type": "llama3", "low": 1e-7, "high": 1e16, "original": 8192},
)


@pytest.fixture
def old_store(tmp_path):
    """A store whose state is of format 1, as a past release left it."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    return Store(tmp_path / "old", clock=Clock(NOW + timedelta(days=3)))


def test_a_state_of_format_1_is_read_and_left_as_it_is(old_store):
    before = snapshot(old_store.folder)
    assert b'"format":1' in before[Path("state.json")] and b'"rope_theta":10000.0' in before[Path("state.json")]
    assert (active(old_store), old_store.active(OTHER)[0].name) == (2, "other")
    assert actions(old_store) == ["trust", "apply", "apply", "apply", "hold"]
    assert not [finding for finding in audit.verify(old_store) if finding.level == "error"]
    assert snapshot(old_store.folder) == before  # reading needs no right to write


def test_a_device_with_a_state_of_format_1_goes_on_without_loss(old_store, tmp_path):
    state, trust = old_store.read()
    lines = (old_store.folder / "history.jsonl").read_bytes()
    assert old_store.apply(write(tmp_path, 3)).before == make_patch(2).digest
    data = (old_store.folder / "state.json").read_bytes()
    assert b'"format":2' in data and b'"rope_theta":10000,' in data and b'"high":10000000000000000,' in data
    new, new_trust = old_store.read()
    held = base_id(OTHER)
    assert new.bases[held] == state.bases[held] and new.bases[held].is_held
    assert new.patches.items() > state.patches.items() and new_trust.root == trust.root
    assert new_trust.seen[held] == trust.seen[held]
    assert (old_store.folder / "history.jsonl").read_bytes().startswith(lines)
    assert not [finding for finding in audit.verify(old_store) if finding.level == "error"]
    with pytest.raises(EdgepatchError, match="bis Mai: geprüft"):
        old_store.apply(write(tmp_path, 2, base=OTHER), model=OTHER)
    with pytest.raises(UntrustedError, match="sequence"):
        old_store.apply(write(tmp_path, 1))
    old_store.rollback(base_id(spec()))
    old_store.rollback(base_id(spec()))
    assert active(old_store) == 1


def test_both_formats_say_the_same(old_store):
    state = old_store.read()[0]
    assert parse_state(state.to_bytes()) == state
    assert parse_state(state.to_bytes()).to_bytes() == state.to_bytes()


def test_a_changed_state_of_format_1_is_refused(old_store):
    good = (old_store.folder / "state.json").read_bytes()
    for bad in (
        good + b" ",
        good.replace(b'"format":1', b'"format":2'),
        good.replace(b'"format":1', b'"format":1.0'),
        good.replace(b'"format":1', b'"format":true'),
        good.replace(b'"sequence":2', b'"sequence":3'),
        good.replace(b'"is_held":true,', b'"is_held":true,"is_held":true,'),
        good.replace("\U0001f642".encode(), b"\\ud83d\\ude42"),
        good.replace("\U0001f642".encode(), b"\\ud83d"),
    ):
        assert bad != good
        (old_store.folder / "state.json").write_bytes(bad)
        with pytest.raises(UntrustedError):
            pytest.fail(f"taken: {bad!r}: {old_store.active(spec())}")


def test_a_newer_format_is_told_as_such(store):
    path = store.folder / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"format":2', b'"format":3'))
    with pytest.raises(UntrustedError, match="format of the state: expected 1 or 2, found 3") as caught:
        store.active(spec())
    assert caught.value.hint == "a newer edgepatch may read it"


def test_a_spec_as_deep_as_a_manifest_may_be_is_stored(store, tmp_path):
    nested: dict = {}
    for _ in range(MAX_DEPTH - 3):  # the manifest, the base and the scaling itself are levels as well
        nested = {"x": nested}
    deep = spec(rope_scaling=nested)
    store.apply(write(tmp_path, 1, base=deep), model=deep)
    assert store.active(deep)[0].base == deep


def test_tampered_trust_state(store, tmp_path):
    store.apply(write(tmp_path))
    path = store.trust_path(store.read()[0].trust)
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"sequence":1', b'"sequence":0'))
    with pytest.raises(UntrustedError, match="digest of the trust state"):
        store.active(spec())
    path.unlink()
    with pytest.raises(UntrustedError, match=r"trust state of the store: .*found none"):
        store.active(spec())
    for bad in (
        good.replace(b'"sequence":1', b'"sequence":0'),
        good.replace(b'"stable"', b'"Stable"'),
        good.replace(b"2030-01-01", b"2030-13-01"),
        good.replace(b'"seen":{"', b'"seen":{"x'),
        good.replace(b'"digest":"', b'"digest":"x'),
        good.replace(b'"root":"', b'"root":1,"x":"'),
    ):
        assert bad != good
        with pytest.raises(UntrustedError):
            parse_trust(bad)
    assert parse_trust(good).root


def test_an_old_state_put_back(store, tmp_path):
    """Who copies the old state file back gets no older patch: its trust state is gone."""
    store.apply(write(tmp_path))
    old = (store.folder / "state.json").read_bytes()
    store.apply(write(tmp_path, 2))
    (store.folder / "state.json").write_bytes(old)
    with pytest.raises(UntrustedError, match=r"trust state of the store: .*found none") as error:
        store.active(spec())
    assert "put an old state in place" in error.value.hint


def test_state_removed(store, tmp_path):
    """Contents without a state are no new store, whatever of them is left; nor is an empty state in front of a history."""
    store.apply(write(tmp_path))
    (store.folder / "state.json").write_bytes(State().to_bytes())
    with pytest.raises(UntrustedError, match="found an empty one"):
        store.active(spec())
    (store.folder / "state.json").unlink()
    kinds = {"history.jsonl": "a history", "patches": "patches", "trust": "a trust state"}
    while kinds:
        for use in (lambda: store.active(spec()), lambda: store.apply(write(tmp_path, 2)), store.history):
            with pytest.raises(UntrustedError, match=f"none, but {' and '.join(kinds.values())}$"):
                use()
        path = store.folder / next(iter(kinds))
        del kinds[path.name]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    store.set_root([make_root()])
    assert store.apply(write(tmp_path)).is_new


@pytest.mark.parametrize("entry", ["patch", "state.json", "history.jsonl", "trust", "patches"])
def test_links_in_the_store(store, tmp_path, entry):
    digest = store.apply(write(tmp_path)).digest
    path = store.patch_path(digest) if entry == "patch" else store.folder / entry
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    reads = {"history.jsonl": store.history}.get(entry, lambda: store.active(spec()))
    with pytest.raises(UntrustedError, match="link"):
        reads()
    if entry != "patch":
        with pytest.raises(EdgepatchError):
            store.hold()


def test_something_else_in_place_of_a_file(store, tmp_path):
    path = store.patch_path(store.apply(write(tmp_path)).digest)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UntrustedError, match="a regular file"):
        store.active(spec())
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UntrustedError, match="size"):
        store.active(spec())


# --- Signatures and the trust root


def test_without_a_root_nothing_is_applied(tmp_path):
    store = Store(tmp_path / "store", clock=Clock())
    for by in ((), ("vendor", "site")):
        with pytest.raises(UntrustedError, match="expected a trust root on this device, found none"):
            store.apply(write(tmp_path, by=by))
    store.apply(write(tmp_path, by=()), Allowances(unsigned="bench device"))
    assert active(store) == 1
    assert store.history()[-1]["unsigned"] == "bench device"
    report, findings = audit.status(store)
    assert report["bases"][0]["patches"][0]["signatures"] == "not checked: bench device"
    assert [f.level for f in findings] == ["warning", "warning"]


def test_a_reason_is_needed(tmp_path):
    store = Store(tmp_path / "store")
    for reason in (" ", "x" * 501, "a\x1b[31m"):
        with pytest.raises(InputError, match="reason"):
            Allowances(unsigned=reason)
        with pytest.raises(InputError, match="reason"):
            store.hold(reason=reason)


def test_unsigned_is_no_way_around_a_root(store, tmp_path):
    with pytest.raises(InputError, match="signed patches only"):
        store.apply(write(tmp_path, by=()), Allowances(unsigned="please"))


def test_an_unsigned_patch_ends_where_a_trust_root_begins(tmp_path):
    """It is refused from then on, at every load and status, and comes back by no way: not by rollback, not by rotation."""
    store = Store(tmp_path / "store", clock=Clock())
    trial = store.apply(write(tmp_path, 900, by=()), Allowances(unsigned="trial")).digest
    change = store.set_root([make_root()])
    assert (change.reset, change.refused) == (True, (trial,))
    for use in (lambda: store.active(spec()), lambda: store.load(trial)):
        with pytest.raises(UntrustedError, match="signatures of role patch: expected 2 of"):
            use()
    assert [f.level for f in audit.status(store)[1]] == ["error"]
    store.apply(write(tmp_path, 2))
    assert active(store) == 2
    with pytest.raises(UntrustedError, match="signatures of role patch"):
        store.rollback()
    store.set_root([rotated(make_root())])
    store.deactivate("back to the trial")
    with pytest.raises(UntrustedError, match="signatures of role patch"):
        for _ in range(2):
            store.rollback()
    assert active(store) in (2, None)


def test_an_unsigned_patch_whose_signatures_count_goes_on(tmp_path):
    store = Store(tmp_path / "store", clock=Clock())
    store.apply(write(tmp_path), Allowances(unsigned="the root comes tomorrow"))
    assert store.set_root([make_root()]).refused == ()
    assert active(store) == 1
    patch = audit.status(store)[0]["bases"][0]["patches"][0]
    assert "vendor" in patch["signatures"] and "site" in patch["signatures"]


def test_signed_times_are_seen_times(tmp_path):
    """What enough keys have signed on a day was not signed before it: a clock behind that day is behind."""
    clock = Clock(NOW - timedelta(days=400))
    store = Store(tmp_path / "store", clock=clock)
    store.set_root([make_root()])
    assert store.time(store.read()[1]) == NOW - timedelta(days=30)
    with pytest.raises(UntrustedError, match="expiry of the patch"):
        store.apply(write(tmp_path, created="2029-12-31T00:00:00Z", expires="2029-12-30T00:00:00Z"))
    store.apply(write(tmp_path, created="2029-12-31T00:00:00Z"))
    assert store.read()[1].floor == "2029-12-31T00:00:00Z"
    with pytest.raises(UntrustedError, match="signatures"):
        store.apply(write(tmp_path, 2, by=("vendor",), created="2030-06-01T00:00:00Z"))
    with pytest.raises(UntrustedError, match="expiry of trust root"):
        store.apply(write(tmp_path, 2, created="2099-01-01T00:00:00Z"))
    assert store.read()[1].floor == "2029-12-31T00:00:00Z", "what is refused has told nothing"
    trial = Store(tmp_path / "trial", clock=clock)
    trial.apply(write(tmp_path, by=(), created="2099-01-01T00:00:00Z"), Allowances(unsigned="trial"))
    assert trial.read()[1].floor < "2029", "nobody vouches for that time"


def test_a_record_of_an_unsigned_patch_needs_its_reason(store, tmp_path):
    """A patch is not made trusted by a line in the state: without a reason there, a signature is needed."""
    bare = Store(tmp_path / "bare", clock=Clock())
    bare.apply(write(tmp_path, by=()), Allowances(unsigned="trial"))
    state = bare.folder / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"unsigned":"trial"', b'"unsigned":""'))
    with pytest.raises(UntrustedError, match="a trust root on this device"):
        bare.active(spec())


def test_root_refused(tmp_path):
    clock = Clock()
    store = Store(tmp_path / "store", clock=clock)
    with pytest.raises(UntrustedError, match="signatures of trust root"):
        store.set_root([replace(make_root(), signatures=())])
    with pytest.raises(UntrustedError, match="expiry"):
        store.set_root([make_root(created=NOW - timedelta(days=500))])
    with pytest.raises(UntrustedError, match="fingerprint"):
        store.set_root([make_root()], "0" * 64)
    with pytest.raises(InputError, match="expected one file, found 2"):
        store.set_root([make_root(), rotated(make_root())])
    assert store.root() is None
    store.set_root([make_root()], make_root().fingerprint)
    assert not store.set_root([make_root()]).is_new
    stranger = make_root(created=NOW - timedelta(days=29))
    with pytest.raises(UntrustedError, match="root version"):
        store.set_root([stranger])
    assert store.root() == make_root()


def test_a_root_whose_signatures_were_taken_away_is_an_error(store, tmp_path):
    """The whole of the trust state replaced, with matching digests: its own signatures still say no."""
    state, trust = store.read()
    bad = replace(trust, root=replace(make_root(), signatures=()).to_bytes().decode()).to_bytes()
    digest = hashlib.sha256(bad).hexdigest()
    store.trust_path(digest).write_bytes(bad)
    (store.folder / "state.json").write_bytes(replace(state, trust=digest).to_bytes())
    assert [(f.level, f.subject) for f in audit.verify(store)] == [("error", "trust root")]
    with pytest.raises(UntrustedError):
        store.apply(write(tmp_path))


# --- History


def test_history_is_chained(store, tmp_path):
    for sequence in (1, 2, 3):
        store.apply(write(tmp_path, sequence))
    path = store.folder / "history.jsonl"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    assert json.loads(lines[1])["previous"] == hashlib.sha256(lines[0].rstrip(b"\n")).hexdigest()
    tampered = {
        "changed": good.replace(b'"sequence":2', b'"sequence":9'),
        "cut": b"".join(lines[:-1]),
        "emptied": b"",
        "taken out": b"".join([lines[0], *lines[2:]]),
        "swapped": b"".join([lines[1], lines[0], *lines[2:]]),
        "last changed": good.replace(b'"sequence":3', b'"sequence":4'),
        "no JSON": b"x" * (len(good) - 1) + b"\n",
        "split": good.replace(b'"action"', b'\n"action"', 1)[:-1],
        "a list": b"[]\n" * len(lines) + b" " * (len(good) - 3 * len(lines)),
    }
    for name, data in tampered.items():
        path.write_bytes(data)
        with pytest.raises(UntrustedError):
            store.history()
        assert [f.subject for f in audit.verify(store)] == ["history"], name
    path.unlink()
    with pytest.raises(UntrustedError, match="length of the history"):
        store.history()
    with pytest.raises(UntrustedError, match="length of history"):
        store.apply(write(tmp_path, 4))
    path.write_bytes(good)
    assert len(store.history()) == 4


def test_a_line_that_was_never_finished(store, tmp_path):
    store.apply(write(tmp_path))
    with (store.folder / "history.jsonl").open("ab") as file:
        file.write(b'{"action":"app')
    assert actions(store) == ["trust", "apply"]
    store.apply(write(tmp_path, 2))
    assert actions(store) == ["trust", "apply", "apply"]


def test_what_an_unfinished_change_left_is_cleared_away(store, tmp_path):
    store.apply(write(tmp_path))
    left = [
        store.patch_path("f" * 64),
        store.trust_path("e" * 64),
        store.folder / "patches" / ".tmp-1-x",
        store.folder / ".tmp-1-state.json",
    ]
    for path in left:
        path.write_bytes(b"x")
    own = store.folder / "patches" / "notes.safetensors"
    own.write_bytes(b"x")
    store.apply(write(tmp_path, 2))
    assert not any(path.exists() for path in left)
    assert own.exists()


def test_a_patch_that_is_removed_while_it_is_read(store, tmp_path, monkeypatch):
    """Between the state and the file another patch was applied, and this one removed: the new one is read."""
    first = store.apply(write(tmp_path)).digest
    reader = StoreReader(store.folder, clock=Clock())
    real = StoreReader.load_stored

    def late(self, digest, state, trust):
        monkeypatch.setattr(StoreReader, "load_stored", real)
        store.apply(write(tmp_path, 2))
        store.remove(first)
        return real(self, digest, state, trust)

    monkeypatch.setattr(StoreReader, "load_stored", late)
    assert reader.active(spec())[0].sequence == 2


def test_steps_back_are_bounded(store, tmp_path):
    shares = [write(tmp_path, 1), write(tmp_path, 2)]
    for number in range(40):
        store.apply(shares[number % 2], Allowances(downgrade="again"))
    assert len(store.read()[0].bases[base_id(spec())].slots["detox"].previous) == 32


# --- verify


def test_verify_finds_foreign_files(store, tmp_path):
    store.apply(write(tmp_path))
    (store.folder / "patches" / "notes.txt").write_text("x")
    findings = audit.verify(store)
    assert [(f.level, Path(f.subject).name) for f in findings] == [("warning", "notes.txt")]
    audit.require_no_error(findings)


def test_verify_finds_damage_of_each_patch(store, tmp_path):
    digests = [store.apply(write(tmp_path, sequence)).digest for sequence in (1, 2, 3)]
    for digest in digests[:2]:
        store.patch_path(digest).write_bytes(b"x")
    findings = audit.verify(store)
    assert sorted(f.subject for f in findings) == ["detox 1.1.0", "detox 1.2.0"]
    with pytest.raises(UntrustedError, match="and 1 more") as error:
        audit.require_no_error(findings)
    assert error.value.exit_code == 3
    with pytest.raises(UntrustedError):
        store.rollback()
    assert active(store) == 3, "rollback looked before it leapt"


def test_verify_of_nothing(tmp_path):
    assert [f.subject for f in audit.verify(Store(tmp_path / "none"))] == ["trust root"]


def test_status(store, tmp_path):
    assert audit.status(store)[0]["bases"] == []
    store.apply(write(tmp_path))
    report = audit.status(store)[0]
    assert report["trust_root"]["threshold"] == 2
    assert [patch["name"] for base in report["bases"] for patch in base["patches"]] == ["detox"]
    assert report["bases"][0]["patches"][0]["signatures"].startswith("site (")


# --- Several processes, read-only media


def _apply_many(folder, files_, clock_time):
    store = Store(folder, clock=Clock(clock_time), lock_timeout_s=30)
    for file in files_:
        store.apply(file, Allowances(downgrade="race"))


def test_concurrent_changes(store, tmp_path):
    shares = [[write(tmp_path, 10 * worker + n) for n in range(1, 6)] for worker in range(2)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_apply_many, args=(store.folder, share, NOW)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(store.history()) == 11
    assert audit.verify(store) == []
    assert len(store.read()[0].patches) == 10


def test_readers_meet_changes(store, tmp_path):
    """A reader without a lock sees the old or the new state, never a mixture."""
    share = [write(tmp_path, n) for n in range(1, 21)]
    store.apply(share[0])
    worker = multiprocessing.get_context("fork").Process(target=_apply_many, args=(store.folder, share, NOW))
    worker.start()
    seen = set()
    while worker.is_alive():
        seen.add(active(store))
    worker.join()
    assert worker.exitcode == 0
    assert active(store) == 20
    assert None not in seen


def test_lock_timeout(store, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from edgepatch.store import files\n"
        f"with files.locked(Path({str(store.folder)!r}), 5): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        impatient = Store(store.folder, clock=Clock(), lock_timeout_s=0.2)
        with pytest.raises(EdgepatchError, match="in use by another process") as error:
            impatient.apply(write(tmp_path))
        assert error.value.exit_code == 1
        assert impatient.read()[0].bases == {}, "reading needs no lock"
        other.kill()
    impatient.apply(write(tmp_path))


def read_only(folder):
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def writable(folder):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_read_only_media(store, tmp_path):
    store.apply(write(tmp_path))
    before = snapshot(store.folder)
    read_only(store.folder)
    try:
        assert active(store) == 1
        assert audit.status(store)[1] == []
        assert audit.verify(store) == []
        assert len(store.history()) == 2
        if os.geteuid() != 0:  # root writes wherever it likes; test_crash.py injects EROFS
            with pytest.raises(EdgepatchError, match="cannot change the store") as error:
                store.apply(write(tmp_path, 2))
            assert error.value.exit_code == 1
    finally:
        writable(store.folder)
    assert snapshot(store.folder) == before


def test_a_store_that_cannot_be_read(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot read the store"):
        Store(tmp_path / "file").active(spec())
    with pytest.raises(EdgepatchError):
        Store(tmp_path / "file").apply(write(tmp_path))


def test_state_bytes_are_stable(store, tmp_path):
    store.apply(write(tmp_path))
    state, trust = store.read()
    assert parse_state(state.to_bytes()) == state
    assert parse_trust(trust.to_bytes()) == trust
