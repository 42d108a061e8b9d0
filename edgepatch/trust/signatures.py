"""Ed25519 signatures.

A signature covers DSSE's pre-authentication encoding: the payload together with its type, so that a signature under one
kind of document never fits another kind. A key is named by the SHA-256 of its 32 raw bytes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepatch.errors import UntrustedError

if TYPE_CHECKING:  # whoever reads a patch and checks no signature does not wait for the library
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MANIFEST_TYPE = "application/vnd.edgepatch.manifest+json"
ROOT_TYPE = "application/vnd.edgepatch.root+json"
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_SIGNATURES = 16
"""So many signatures a document carries at most: the work of a check is bounded before it starts."""


@dataclass(frozen=True, order=True)
class Signature:
    """A signature and the id of the key that made it.

    Raises:
        UntrustedError: the id is no SHA-256 in lower-case hex, or the signature has not 64 bytes.
    """

    key_id: str
    signature: bytes

    def __post_init__(self) -> None:
        require_digest(self.key_id, "key id of a signature")
        if len(self.signature) != SIGNATURE_BYTES:
            raise UntrustedError("length of a signature", f"{SIGNATURE_BYTES} bytes", len(self.signature))

    def as_dict(self) -> dict[str, str]:
        return {"key_id": self.key_id, "signature": self.signature.hex()}

    @classmethod
    def from_dict(cls, value: object) -> Signature:
        """From parsed JSON.

        Raises:
            UntrustedError: a key is missing or unknown, or a value has another form than ``as_dict`` gives it.
        """
        if not isinstance(value, dict) or value.keys() != {"key_id", "signature"}:
            raise UntrustedError("a signature", "key_id and signature", _brief(value))
        return cls(value["key_id"], from_hex(value["signature"], "a signature"))


def _brief(value: object) -> str:
    text = ", ".join(map(str, sorted(value))) if isinstance(value, dict) else type(value).__name__
    return text if len(text) <= 80 else text[:80] + "..."


def require_digest(value: object, what: str) -> str:
    """``value``, which is a SHA-256 in lower-case hex.

    Raises:
        UntrustedError: it is not.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise UntrustedError(what, "64 digits of lower-case hex", repr(value)[:80])
    return value


def from_hex(value: object, what: str) -> bytes:
    """Bytes written in lower-case hex, two digits each.

    Raises:
        UntrustedError: anything else, also upper case: one content has one form.
    """
    if not isinstance(value, str) or not re.fullmatch(r"([0-9a-f]{2})*", value):
        raise UntrustedError(what, "lower-case hex", repr(value)[:80])
    return bytes.fromhex(value)


def pre_authentication_encoding(payload: bytes, payload_type: str) -> bytes:
    """The bytes that Ed25519 signs: both parts with their lengths, so that no other pair gives the same bytes.

    Source: DSSE v1.0 (secure-systems-lab/dsse, protocol.md), ``PAE``.
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def raw_public_key(key: Ed25519PrivateKey | Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key, or of the public half of a private one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw)


def key_id(public: bytes) -> str:
    """The name of a key: SHA-256 of its 32 raw bytes, in hex."""
    return hashlib.sha256(public).hexdigest()


def sign(payload: bytes, payload_type: str, key: Ed25519PrivateKey) -> Signature:
    """Signs a payload as a document of one type. The same payload, type and key give the same signature."""
    signature = key.sign(pre_authentication_encoding(payload, payload_type))
    return Signature(key_id(raw_public_key(key)), signature)


def fits(payload: bytes, payload_type: str, signature: bytes, public: bytes) -> bool:
    """Whether the key ``public`` made this signature over this payload and type. Says nothing about trust in the key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, pre_authentication_encoding(payload, payload_type))
    except InvalidSignature:
        return False
    return True
