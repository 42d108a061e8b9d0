"""Canonical bytes and signatures over them."""

from __future__ import annotations

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepatch.errors import UntrustedError
from edgepatch.trust.signatures import (
    MANIFEST_TYPE,
    ROOT_TYPE,
    Signature,
    fits,
    from_hex,
    key_id,
    pre_authentication_encoding,
    raw_public_key,
    require_digest,
    sign,
)

KEY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"a key for tests").digest())
PUBLIC = raw_public_key(KEY)


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
