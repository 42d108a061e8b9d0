"""The trust root as a value and as a file: canonical JSON of keys, roles with thresholds, a version, an expiry, revocations."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgepatch.errors import UntrustedError
from edgepatch.files.canonical import canonical_json, parse_canonical
from edgepatch.files.reading import read_bounded
from edgepatch.trust.signatures import (
    MAX_SIGNATURES,
    PUBLIC_KEY_BYTES,
    ROOT_TYPE,
    Signature,
    from_hex,
    key_id,
    require_digest,
    sign,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT_VERSION = 1
MAX_ROOT_BYTES = 64 * 1024
MAX_KEYS = 64
MAX_VERSION = 2**31
MAX_OWNER_LENGTH = 64
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

RoleName = Literal["root", "patch"]
ROLES: tuple[RoleName, ...] = ("root", "patch")
"""``root`` signs the next trust root, ``patch`` signs patches."""


@dataclass(frozen=True, order=True)
class Key:
    """A public key and whose it is.

    Attributes:
        public: 32 raw bytes.
        owner: whose it is; where several must sign, the keys of one owner count as one.
    """

    public: bytes
    owner: str

    def __post_init__(self) -> None:
        if len(self.public) != PUBLIC_KEY_BYTES:
            raise UntrustedError("length of a public key", f"{PUBLIC_KEY_BYTES} bytes", len(self.public))
        if not (0 < len(self.owner) <= MAX_OWNER_LENGTH and self.owner.isprintable()):
            raise UntrustedError(
                "owner of a key", f"1 to {MAX_OWNER_LENGTH} printable characters", repr(self.owner)[:80]
            )

    @cached_property
    def id(self) -> str:
        return key_id(self.public)


def owner_name(owner: str) -> str:
    """An owner's name such that spellings which people take for the same are the same."""
    return "".join(unicodedata.normalize("NFKC", owner).casefold().split())


@dataclass(frozen=True)
class Role:
    """The keys that may sign for something, and how many of them must."""

    keys: frozenset[str]
    threshold: int


@dataclass(frozen=True)
class Root:
    """A trust root as its file says; whether it is signed, and by whom, is for ``verification.require_signed`` to find.

    Attributes:
        version: 1, 2, 3, ...: each is one more than the one before.
        created, expires: UTC, whole seconds.
        keys: by their ids.
        roles: a role for every name in ``ROLES``.
        revoked: ids of keys that count for nothing, for ever: later versions must revoke them too.
        signatures: sorted, one a key.

    Raises:
        UntrustedError: the parts contradict each other, or a threshold cannot be reached.
    """

    version: int
    created: datetime
    expires: datetime
    keys: Mapping[str, Key]
    roles: Mapping[RoleName, Role]
    revoked: frozenset[str] = frozenset()
    signatures: tuple[Signature, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.version <= MAX_VERSION:
            raise UntrustedError("root version", f"1 to {MAX_VERSION}", self.version)
        if not self.created < self.expires:
            raise UntrustedError(
                "root expiry", f"later than its creation, {time_text(self.created)}", time_text(self.expires)
            )
        if len(self.keys) > MAX_KEYS or len(self.revoked) > MAX_KEYS:
            raise UntrustedError("keys of the root", f"at most {MAX_KEYS}", max(len(self.keys), len(self.revoked)))
        signed = [signature.key_id for signature in self.signatures]
        if len(signed) > MAX_SIGNATURES or signed != sorted(set(signed)):
            raise UntrustedError("signatures of the root", f"at most {MAX_SIGNATURES}, sorted, one a key", len(signed))
        for name, key in self.keys.items():
            if key.id != name:
                raise UntrustedError(f"id of the key of {key.owner}", key.id, name)
        for role in self.roles:
            self._require_reachable(role)

    def _require_reachable(self, name: RoleName) -> None:
        role = self.roles[name]
        unlisted = sorted(role.keys - self.keys.keys())
        if unlisted:
            raise UntrustedError(f"keys of role {name}", "keys that the root lists", ", ".join(unlisted)[:200])
        in_force = len(self.owners(self.counting(name)))
        if not 1 <= role.threshold <= in_force:
            raise UntrustedError(
                f"threshold of role {name}", f"1 to {in_force}, the owners of its keys in force", role.threshold
            )

    def counting(self, role: RoleName) -> frozenset[str]:
        """Ids of the keys whose signatures count for a role: listed there and not revoked."""
        return self.roles[role].keys - self.revoked

    def owners(self, keys: Iterable[str]) -> frozenset[str]:
        """Whose keys these are, however a name is spelled."""
        return frozenset(owner_name(self.keys[key].owner) for key in keys)

    def called(self, key: str) -> str:
        """A key for people: its owner, if known, and the start of its id."""
        owner = self.keys[key].owner if key in self.keys else "unknown"
        return f"{owner} ({key[:12]}{', revoked' if key in self.revoked else ''})"

    @cached_property
    def payload(self) -> bytes:
        """The bytes that are signed: all but the signatures, as canonical JSON."""
        return canonical_json(self._body())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the signed bytes: what two people read to each other. Signatures do not change it."""
        return hashlib.sha256(self.payload).hexdigest()

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical_json({"signed": self._body(), "signatures": [s.as_dict() for s in self.signatures]})

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "version": self.version,
            "created": time_text(self.created),
            "expires": time_text(self.expires),
            "keys": {name: {"public": key.public.hex(), "owner": key.owner} for name, key in self.keys.items()},
            "roles": {
                name: {"keys": sorted(role.keys), "threshold": role.threshold} for name, role in self.roles.items()
            },
            "revoked": sorted(self.revoked),
        }

    def signed_by(self, key: Ed25519PrivateKey) -> Root:
        """This root with one more signature; one by the same key is replaced."""
        new = sign(self.payload, ROOT_TYPE, key)
        others = [signature for signature in self.signatures if signature.key_id != new.key_id]
        return replace(self, signatures=tuple(sorted([*others, new])))


def time_text(time: datetime) -> str:
    return time.astimezone(timezone.utc).strftime(TIME_FORMAT)


def _object(value: object, keys: Iterable[str], what: str) -> dict[str, Any]:
    """A JSON object with exactly these keys."""
    expected = set(keys)
    if not isinstance(value, dict) or value.keys() != expected:
        actual = ", ".join(sorted(value))[:80] if isinstance(value, dict) else type(value).__name__
        raise UntrustedError(what, ", ".join(sorted(expected)), actual or "nothing")
    return value


def _typed(value: object, kind: type, what: str) -> Any:
    if type(value) is not kind:  # not isinstance: True is an int
        raise UntrustedError(what, kind.__name__, type(value).__name__)
    return value


def _time(value: object, what: str) -> datetime:
    try:
        return datetime.strptime(_typed(value, str, what), TIME_FORMAT).replace(tzinfo=timezone.utc)
    except ValueError:
        raise UntrustedError(what, "a time like 2030-01-31T23:59:59Z", repr(value)[:80]) from None


def _ids(value: object, what: str) -> frozenset[str]:
    return frozenset(require_digest(entry, what) for entry in _typed(value, list, what))


def _key(value: object) -> Key:
    entry = _object(value, ("public", "owner"), "a key of the root")
    return Key(from_hex(entry["public"], "a public key"), _typed(entry["owner"], str, "owner of a key"))


def _role(value: object, name: str) -> Role:
    entry = _object(value, ("keys", "threshold"), f"role {name}")
    return Role(
        _ids(entry["keys"], f"keys of role {name}"), _typed(entry["threshold"], int, f"threshold of role {name}")
    )


def parse_root(data: bytes, what: str = "trust root") -> Root:
    """A trust root from the bytes of its file. Reading is closed; signatures are parsed here, not checked.

    Raises:
        UntrustedError: too large, not canonical, an unknown format or key, a missing key, a contradiction.
    """
    if len(data) > MAX_ROOT_BYTES:
        raise UntrustedError(f"size of {what}", f"at most {MAX_ROOT_BYTES} bytes", len(data))
    whole = _object(parse_canonical(data, what), ("signed", "signatures"), what)
    version = whole["signed"].get("format") if isinstance(whole["signed"], dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise UntrustedError(
            f"format of {what}", FORMAT_VERSION, repr(version)[:80], hint="a newer edgepatch may read it"
        )
    body = _object(whole["signed"], ("format", "version", "created", "expires", "keys", "roles", "revoked"), what)
    roles = _object(body["roles"], ROLES, "roles of the root")
    root = Root(
        version=_typed(body["version"], int, "root version"),
        created=_time(body["created"], "creation of the root"),
        expires=_time(body["expires"], "root expiry"),
        keys={
            require_digest(name, "key id"): _key(value)
            for name, value in _typed(body["keys"], dict, "keys of the root").items()
        },
        roles={name: _role(roles[name], name) for name in ROLES},
        revoked=_ids(body["revoked"], "revoked keys"),
        signatures=tuple(
            Signature.from_dict(value) for value in _typed(whole["signatures"], list, "signatures of the root")
        ),
    )
    if root.to_bytes() != data:
        raise UntrustedError(what, "sorted lists without duplicates, and times with all digits", "another form")
    return root


def read_root(path: Path) -> Root:
    """Reads a trust root file. Whether it holds is not asked here: ``verification`` does.

    Raises:
        InputError: no such file.
        UntrustedError: it breaks the format.
    """
    return parse_root(read_bounded(path, MAX_ROOT_BYTES, "trust root", oversize=UntrustedError), str(path))
