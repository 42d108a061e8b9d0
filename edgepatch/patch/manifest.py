"""The fields of a patch that stand in its manifest: for each what it may hold, and how JSON writes it.

The one list of them beside ``Patch`` itself; writing, reading and checking go by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from edgepatch.errors import InputError, PatchFormatError
from edgepatch.files.canonical import MAX_WHOLE
from edgepatch.patch.sketches import Sketch
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import Canary, ModelSpec
from edgepatch.text.probes import TokenizerProbe

FORMAT_VERSION = 3
"""A patch with a tokenizer probe is of version 3, one that says how its keys turn of 2, any other of 1: older devices read what they can."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER, _PRE, _BUILD = r"(?:0|[1-9][0-9]*)", r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)", r"[0-9A-Za-z-]+"
SEMVER = re.compile(
    rf"(?=.{{5,64}}\Z){_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_PRE}(?:\.{_PRE})*)?(?:\+{_BUILD}(?:\.{_BUILD})*)?"
)
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What no text for people may hold: controls but the newline, and signs that turn the direction of writing around."""
MAX_SEQUENCE = MAX_WHOLE
TIMESTAMP = re.compile(r"(\d{4})-(\d{2})-(\d{2})T(\d{2}):(\d{2}):(\d{2})Z", re.ASCII)

Check = Callable[[Any], bool]
Conversion = Callable[[Any], Any]


def is_timestamp(text: object) -> bool:
    """Whether a text is a time in UTC to the second: "2026-11-21T10:00:00Z"."""
    match = TIMESTAMP.fullmatch(text) if isinstance(text, str) else None
    if not match:
        return False
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        datetime(year, month, day, hour, minute, second)
    except ValueError:
        return False
    return True


def _same(value: Any) -> Any:
    return value


def _always(_: object) -> bool:
    return True


@dataclass(frozen=True)
class Entry:
    """A field of the manifest.

    Attributes:
        kind: what it is in JSON.
        holds: whether the patch's field may have a value.
        expected: what ``holds`` wants, for people.
        write: from the patch's field to JSON.
        read: its inverse.
        since: the first version of the format that has it.
    """

    kind: type | tuple[type, ...]
    holds: Check = _always
    expected: str = ""
    write: Conversion = _same
    read: Conversion = _same
    since: int = 1


def _matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _text(pattern: re.Pattern[str], expected: str) -> Entry:
    return Entry(str, _matches(pattern), expected)


def _empty_or(holds: Check, expected: str) -> Entry:
    return Entry(str, lambda value: value == "" or holds(value), expected)


def _prose(most: int) -> Entry:
    def holds(value: object) -> bool:
        return isinstance(value, str) and len(value) <= most and not UNPRINTABLE.search(value)

    return Entry(str, holds, f"a printable text of at most {most} characters")


def _is_sequence(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SEQUENCE


def _optional(write: Conversion, read: Conversion, since: int = 1) -> Entry:
    def unless_none(convert: Conversion) -> Conversion:
        return lambda value: None if value is None else convert(value)

    return Entry((dict, type(None)), write=unless_none(write), read=unless_none(read), since=since)


_IS_DIGEST = _matches(DIGEST)
_TIME = _empty_or(is_timestamp, "a time like 2026-11-21T10:00:00Z")
_DIGESTS = Entry(list, lambda values: all(map(_IS_DIGEST, values)), "SHA-256 digests", list, tuple)

ENTRIES: Mapping[str, Entry] = {
    "name": _text(NAME, "1 to 64 letters, digits and ._-"),
    "version": _text(SEMVER, "a semantic version like 1.2.0"),
    "channel": _text(CHANNEL, "1 to 32 lower-case letters, digits and -"),
    "sequence": Entry(int, _is_sequence, f"a whole number from 1 to {MAX_SEQUENCE}"),
    "created": _TIME,
    "expires": _TIME,
    "license": _prose(128),
    "summary": _prose(2000),
    "supersedes": _DIGESTS,
    "parts": _DIGESTS,
    "chat_template": _empty_or(_IS_DIGEST, "a SHA-256 digest"),
    "base": Entry(dict, write=ModelSpec.as_dict, read=ModelSpec.from_dict),
    "weight_sketch": _optional(Sketch.as_dict, Sketch.from_dict),
    "canary": _optional(Canary.as_dict, Canary.from_dict),
    "rotation": _optional(Rotation.as_dict, Rotation.from_dict, since=2),
    "anchoring": _optional(Anchoring.as_dict, Anchoring.from_dict, since=2),
    "tokenizer_probe": _optional(TokenizerProbe.as_dict, TokenizerProbe.from_dict, since=3),
    "training": Entry(dict),
    "evaluation": Entry(dict),
}
"""Field of ``Patch`` -> how it stands in the manifest. The tensors and the signatures do not stand in it."""


def version_of(patch: Any) -> int:
    """The oldest version of the format that has all which a patch says."""
    fields = [key for key, entry in ENTRIES.items() if entry.since > 1 and getattr(patch, key) is not None]
    return max((ENTRIES[key].since for key in fields), default=1)


def entries_of(version: int) -> dict[str, Entry]:
    """The fields of a version of the format."""
    return {key: entry for key, entry in ENTRIES.items() if entry.since <= version}


def manifest_kinds(version: int) -> dict[str, type | tuple[type, ...]]:
    """The closed set of the manifest's keys, with what each holds."""
    computed: dict[str, type | tuple[type, ...]] = {"format_version": int, "num_virtual_tokens": int, "tensors": dict}
    return computed | {key: entry.kind for key, entry in entries_of(version).items()}


def check_values(patch: object) -> None:
    """Checks the fields of a patch that are no objects of their own.

    Raises:
        PatchFormatError: a field holds something else.
    """
    for key, entry in ENTRIES.items():
        value = getattr(patch, key)
        if not entry.holds(value):
            raise PatchFormatError(f"manifest: {key}: expected {entry.expected}, found {value!r:.80}")


def require_option(key: str, value: object) -> None:
    """Checks what is to become a field of a patch, before any work.

    Raises:
        InputError: no manifest may hold it there.
    """
    entry = ENTRIES[key]
    if not entry.holds(value):
        raise InputError(f"--{key}: expected {entry.expected}, found {value!r:.80}")


def require_manifest(manifest: object) -> dict[str, Any]:
    """A manifest of a known version with exactly its keys, each of the right kind.

    Raises:
        PatchFormatError: it is none.
    """
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise PatchFormatError("not an edgepatch file: it has no readable manifest")
    version = manifest["format_version"]
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise PatchFormatError(
            f"format version: expected 1 to {FORMAT_VERSION}, found {version!r:.40}", "update edgepatch"
        )
    kinds = manifest_kinds(version)
    if set(manifest) != set(kinds):
        differing = sorted(set(manifest) ^ set(kinds))
        raise PatchFormatError(f"manifest: expected the keys {sorted(kinds)}; unknown or missing: {differing!r:.200}")
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise PatchFormatError(f"manifest: {key}: a {type(manifest[key]).__name__} is out of place")
    return manifest
