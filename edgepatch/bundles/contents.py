"""What may be in a bundle: its manifest, which lists every member with size and SHA-256, and the bounds of all of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from edgepatch.errors import PatchFormatError, UntrustedError
from edgepatch.files.canonical import canonical_json, parse_json
from edgepatch.patch.file import MAX_FILE_BYTES
from edgepatch.trust.roots import MAX_ROOT_BYTES
from edgepatch.trust.signatures import MAX_SIGNATURES, Signature

FORMAT_VERSION = 1
BUNDLE_TYPE = "application/vnd.edgepatch.bundle+json"
"""What a signature under a bundle's manifest is over."""

MANIFEST, SIGNATURES = "manifest.json", "signatures.json"
"""The first member, and the second one of a signed bundle; neither is listed."""

INSTALL, CARD, REQUIREMENTS, SBOM, REPORT, ROOT = (
    "INSTALL.txt",
    "README.md",
    "requirements.txt",
    "sbom.cdx.json",
    "report.html",
    "root.json",
)
PATCHES, WHEELS = "patches/", "wheels/"

MAX_BUNDLE_BYTES = 6 * 2**30
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_SIGNATURES_BYTES = 64 * 1024
MAX_MEMBERS = 512
MAX_TEXT_BYTES = 32 * 2**20
MAX_WHEEL_BYTES = 2 * 2**30

_NAME = r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,180}"
LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile("|".join(map(re.escape, (INSTALL, CARD, REQUIREMENTS, SBOM, REPORT)))), MAX_TEXT_BYTES),
    (re.compile(re.escape(ROOT)), MAX_ROOT_BYTES),
    (re.compile(rf"{PATCHES}{_NAME}\.safetensors"), MAX_FILE_BYTES),
    (re.compile(rf"{WHEELS}{_NAME}\.whl"), MAX_WHEEL_BYTES),
)
"""The closed set of names, each with the largest size. No other name is written to a device."""

REQUIRED = frozenset({INSTALL, CARD, SBOM})
TEXT = re.compile(r"[A-Za-z0-9._,+-]{0,256}")


@dataclass(frozen=True)
class Member:
    """A listed file of a bundle.

    Raises:
        PatchFormatError: a name, size or digest that no bundle has.
    """

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        limit = next(
            (limit for names, limit in LIMITS if isinstance(self.path, str) and names.fullmatch(self.path)), None
        )
        if limit is None:
            raise PatchFormatError(f"member {self.path!r:.120}: no bundle holds a file of this name")
        if type(self.size) is not int or not 0 <= self.size <= limit:
            raise PatchFormatError(f"member {self.path}: expected at most {limit} bytes, found {self.size!r:.40}")
        if not isinstance(self.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise PatchFormatError(f"member {self.path}: expected a SHA-256, found {self.sha256!r:.80}")


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        patch: digest of the patch.
        extra: the extra of edgepatch that its wheels install; "" without wheels.
        platform: that they fit, as pip names it.
        python_version: that they fit.
        built: wheels that were compiled by whoever made the bundle, on his machine.
        members: sorted by path.
    """

    patch: str
    extra: str
    platform: str
    python_version: str
    built: tuple[str, ...]
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        paths = [member.path for member in self.members]
        if len(paths) > MAX_MEMBERS or paths != sorted(set(paths)):
            raise PatchFormatError(f"members: expected at most {MAX_MEMBERS}, sorted, none twice, found {len(paths)}")
        if missing := REQUIRED - set(paths):
            raise PatchFormatError(f"members: expected {', '.join(sorted(missing))}, found none")
        if sum(path.startswith(PATCHES) for path in paths) != 1:
            raise PatchFormatError("members: expected one patch")
        if (
            bool(self.wheels) != (REQUIREMENTS in paths)
            or not set(self.built) <= set(self.wheels)
            or list(self.built) != sorted(set(self.built))
        ):
            raise PatchFormatError(f"members: expected {REQUIREMENTS} with wheels, and built ones among them")
        if not isinstance(self.patch, str) or not re.fullmatch(r"[0-9a-f]{64}", self.patch):
            raise PatchFormatError(f"patch: expected a SHA-256, found {self.patch!r:.80}")
        for key in ("extra", "platform", "python_version"):
            if not isinstance(getattr(self, key), str) or not TEXT.fullmatch(getattr(self, key)):
                raise PatchFormatError(f"{key}: expected letters, digits and ._,+-, found {getattr(self, key)!r:.80}")
        if sum(member.size for member in self.members) > MAX_BUNDLE_BYTES:
            raise PatchFormatError(f"members: expected at most {MAX_BUNDLE_BYTES} bytes in all")

    @property
    def wheels(self) -> list[str]:
        return [member.path for member in self.members if member.path.startswith(WHEELS)]

    @property
    def patch_path(self) -> str:
        return next(member.path for member in self.members if member.path.startswith(PATCHES))

    @cached_property
    def payload(self) -> bytes:
        """The canonical JSON that is stored and signed."""
        return canonical_json({**asdict(self), "format_version": FORMAT_VERSION})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of it: names the bundle's content, whoever signs it."""
        return hashlib.sha256(self.payload).hexdigest()


KEYS = {"format_version", "patch", "extra", "platform", "python_version", "built", "members"}


def parse_manifest(data: bytes) -> Manifest:
    """The manifest from its bytes.

    Raises:
        PatchFormatError: they are not canonical, of an unknown version, or say what no bundle holds.
    """
    values = parse_json(data, MANIFEST)
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise PatchFormatError(
            f"{MANIFEST}: expected format version {FORMAT_VERSION}, found {version!r:.40}",
            "a newer edgepatch may read it",
        )
    if values.keys() != KEYS or not isinstance(values["members"], list) or not isinstance(values["built"], list):
        raise PatchFormatError(f"{MANIFEST}: expected the keys {', '.join(sorted(KEYS))}, with lists of members")
    if (
        len(values["members"]) > MAX_MEMBERS
        or len(values["built"]) > MAX_MEMBERS
        or not all(isinstance(path, str) for path in values["built"])
    ):
        raise PatchFormatError(f"{MANIFEST}: expected at most {MAX_MEMBERS} members")
    plain = {key: values[key] for key in ("patch", "extra", "platform", "python_version")}
    manifest = Manifest(
        **plain, built=tuple(values["built"]), members=tuple(_member(value) for value in values["members"])
    )
    if manifest.payload != data:
        raise PatchFormatError(f"{MANIFEST}: not in canonical form")
    return manifest


def signatures_bytes(signatures: Sequence[Signature]) -> bytes:
    """Content of the member with the signatures."""
    return canonical_json([signature.as_dict() for signature in sorted(signatures)])


def parse_signatures(data: bytes) -> tuple[Signature, ...]:
    """The signatures from the bytes of their member.

    Raises:
        PatchFormatError: none, too many, two of one key, or not canonical.
    """
    values = parse_json(data, SIGNATURES)
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_SIGNATURES:
        raise PatchFormatError(f"{SIGNATURES}: expected a list of 1 to {MAX_SIGNATURES}")
    try:
        signatures = tuple(Signature.from_dict(value) for value in values)
    except UntrustedError as error:
        raise PatchFormatError(f"{SIGNATURES}: {error}") from None
    if signatures_bytes(signatures) != data or len({s.key_id for s in signatures}) != len(signatures):
        raise PatchFormatError(f"{SIGNATURES}: not in canonical form, or two of one key")
    return signatures


def _member(value: Any) -> Member:
    if not isinstance(value, dict) or value.keys() != {"path", "size", "sha256"}:
        raise PatchFormatError(f"{MANIFEST}: expected members with path, size and sha256, found {value!r:.120}")
    return Member(**value)
