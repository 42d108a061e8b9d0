"""Canonical bytes and signatures over them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepatch.errors import InputError, UntrustedError
from edgepatch.trust.signatures import (
    MANIFEST_TYPE,
    ROOT_TYPE,
    Signature,
    canonical_json,
    fits,
    from_hex,
    key_id,
    parse_canonical,
    pre_authentication_encoding,
    raw_public_key,
    read_bounded,
    require_digest,
    sign,
)

KEY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"a key for tests").digest())
PUBLIC = raw_public_key(KEY)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_pre_authentication_encoding_is_that_of_dsse():
    """The example of the DSSE protocol document."""
    assert pre_authentication_encoding(b"hello world", "http://example.com/HelloWorld") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@given(st.tuples(st.binary(max_size=40), st.text(max_size=40)), st.tuples(st.binary(max_size=40), st.text(max_size=40)))
def test_no_two_documents_have_the_same_encoding(one, other):
    assert (pre_authentication_encoding(*one) == pre_authentication_encoding(*other)) == (one == other)


def test_a_boundary_cannot_be_moved():
    assert pre_authentication_encoding(b"b 1 c", "a") != pre_authentication_encoding(b"c", "a 5 b")


def test_signature_of_the_raw_primitive():
    """Nothing but the encoding stands between us and Ed25519."""
    signature = sign(b"payload", MANIFEST_TYPE, KEY)
    assert signature == Signature(
        hashlib.sha256(PUBLIC).hexdigest(), KEY.sign(pre_authentication_encoding(b"payload", MANIFEST_TYPE))
    )
    assert key_id(PUBLIC) == signature.key_id and raw_public_key(KEY.public_key()) == PUBLIC
    assert fits(b"payload", MANIFEST_TYPE, signature.signature, PUBLIC)


def test_another_kind_of_document_does_not_fit():
    signature = sign(b"payload", ROOT_TYPE, KEY).signature
    assert not fits(b"payload", MANIFEST_TYPE, signature, PUBLIC)
    assert not fits(b"payload", ROOT_TYPE + " ", signature, PUBLIC)


@settings(deadline=None)
@given(st.data(), st.binary(min_size=1, max_size=200))
def test_one_flipped_bit_in_payload_signature_or_key_does_not_fit(data, payload):
    signature = sign(payload, MANIFEST_TYPE, KEY).signature
    assert not fits(flipped(payload, data.draw(st.integers(0, len(payload) * 8 - 1))), MANIFEST_TYPE, signature, PUBLIC)
    assert not fits(payload, MANIFEST_TYPE, flipped(signature, data.draw(st.integers(0, 511))), PUBLIC)
    assert not fits(payload, MANIFEST_TYPE, signature, flipped(PUBLIC, data.draw(st.integers(0, 255))))


@given(st.binary(min_size=64, max_size=64), st.binary(max_size=50))
def test_random_signatures_do_not_fit(signature, payload):
    assert not fits(payload, MANIFEST_TYPE, signature, PUBLIC)


def test_signature_round_trip():
    signature = sign(b"payload", MANIFEST_TYPE, KEY)
    assert Signature.from_dict(json.loads(json.dumps(signature.as_dict()))) == signature


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_id": "ab"}, "64 digits"),
        ({"key_id": "AB" * 32}, "64 digits"),
        ({"key_id": 5}, "64 digits"),
        ({"signature": "ab"}, "expected 64 bytes, found 1"),
        ({"signature": "AB" * 64}, "lower-case hex"),
        ({"signature": "a" * 127}, "lower-case hex"),
        ({"signature": ["ab"]}, "lower-case hex"),
        ({"algorithm": "none"}, "expected key_id and signature, found algorithm, key_id, signature"),
        ({"k" * 300: 1}, "kkk..."),
    ],
)
def test_malformed_signatures_are_errors(change, message):
    value = {**sign(b"payload", MANIFEST_TYPE, KEY).as_dict(), **change}
    with pytest.raises(UntrustedError, match=message):
        Signature.from_dict(value)


@pytest.mark.parametrize("value", [None, [], "text", {"key_id": "ab" * 32}])
def test_what_is_no_signature_is_an_error(value):
    with pytest.raises(UntrustedError, match="expected key_id and signature"):
        Signature.from_dict(value)


def test_hex_has_one_form():
    assert from_hex("00ff", "x") == b"\x00\xff" and from_hex("", "x") == b""
    assert require_digest("0a" * 32, "x") == "0a" * 32
    for wrong in ("0A" * 32, "0a" * 32 + "\n", " " + "0a" * 32):
        with pytest.raises(UntrustedError):
            require_digest(wrong, "x")
        with pytest.raises(UntrustedError):
            from_hex(wrong, "x")


@given(JSON)
def test_canonical_json_round_trip(value):
    try:
        data = canonical_json(value)
    except UnicodeEncodeError:  # half a surrogate pair
        return
    assert parse_canonical(data, "x") == value
    assert canonical_json(parse_canonical(data, "x")) == data


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"a":1,"a":1}', "another form at byte 6"),
        (b'{"a": 1}', "another form at byte 5"),
        (b'{"b":1,"a":1}', "another form at byte 2"),
        (b'{"a":1}\n', "another form at byte 7"),
        (b' {"a":1}', "another form at byte 0"),
        (b'"\\u0041"', "another form at byte 1"),
        (b'"\\/"', "another form at byte 1"),
        (b"1.0e0", "another form at byte 3"),
        (b"[1,]", "JSONDecodeError"),
        (b"", "JSONDecodeError"),
        (b"NaN", "ValueError"),
        (b"-Infinity", "ValueError"),
        (b"1e999", "ValueError"),
        (b'"\\ud800"', "UnicodeEncodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"\xef\xbb\xbf1", "JSONDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        (b"1" * 5000, "ValueError"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_canonical_is_refused(data, found):
    with pytest.raises(UntrustedError, match=f"the file: expected canonical JSON.*found.*{found}"):
        parse_canonical(data, "the file")


def test_read_bounded(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5, "file") == b"12345"
    with pytest.raises(UntrustedError, match="at most 4 bytes, found more"):
        read_bounded(file, 4, "file")


def test_files_that_are_none(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "none", "No such file"),
        (Path("/dev/zero"), "no regular file"),
    ):
        with pytest.raises(InputError, match=message):
            read_bounded(path, 5, "trust root")


def test_no_descriptor_is_left_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(InputError):
            read_bounded(tmp_path, 5, "file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_endless_data_is_refused_at_once(tmp_path: Path):
    file = tmp_path / "sparse"
    with file.open("wb") as handle:
        handle.truncate(10 * 2**30)
    start = time.perf_counter()
    with pytest.raises(UntrustedError, match="at most 1000 bytes"):
        read_bounded(file, 1000, "trust root")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_private_files_that_others_have_rights_to(tmp_path: Path, mode: int):
    file = tmp_path / "file"
    file.write_bytes(b"secret")
    file.chmod(mode)
    with pytest.raises(UntrustedError, match=f"found {mode:04o}") as caught:
        read_bounded(file, 10, "key", private=True)
    assert caught.value.hint == f"chmod 600 {file}" and caught.value.exit_code == 3
    assert read_bounded(file, 10, "key") == b"secret"
    for own in (0o600, 0o400):
        file.chmod(own)
        assert read_bounded(file, 10, "key", private=True) == b"secret"
