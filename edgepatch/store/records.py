"""What lies in a store, as values and as canonical JSON: the state, which is one file, and the trust state, which it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from edgepatch.errors import PatchFormatError, UntrustedError
from edgepatch.files import strict_json
from edgepatch.files.canonical import MAX_DEPTH, canonical_json, parse_canonical
from edgepatch.patch.file import Patch
from edgepatch.patch.manifest import CHANNEL, DIGEST, MAX_SEQUENCE, is_timestamp
from edgepatch.tensors import ModelSpec

STATE_FORMAT = 2
"""Format 1 is read as well: it spelled numbers as Python does (``10000.0``, ``1e+16``), where RFC 8785 has ``10000``."""

TRUST_FORMAT = 1  # whole numbers and texts alone, which both spell alike
STATE_DEPTH = MAX_DEPTH + 4  # a model spec lies deeper in a state than in the manifest that brought it
PYTHON_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
NO_LINE = "0" * 64
"""What stands for the digest of the line before the first one."""

RecordT = TypeVar("RecordT")


def base_id(spec: ModelSpec) -> str:
    """The name of a base model: SHA-256 of all that a patch must match."""
    return hashlib.sha256(canonical_json(spec.as_dict())).hexdigest()


@dataclass(frozen=True)
class StoredPatch:
    """A patch in the store, as its manifest says.

    Attributes:
        base: id of its base.
        unsigned: why it was taken without a signature that counts; "" where one was checked.
    """

    name: str
    version: str
    channel: str
    sequence: int
    created: str
    expires: str
    base: str
    unsigned: str = ""

    @classmethod
    def of(cls, patch: Patch, unsigned: str) -> StoredPatch:
        base = base_id(patch.base)
        return cls(
            patch.name, patch.version, patch.channel, patch.sequence, patch.created, patch.expires, base, unsigned
        )


@dataclass(frozen=True)
class BaseRecord:
    """A base model on this device.

    Attributes:
        spec: the model.
        active: digest of the active patch.
        previous: digests of those that were active before, the latest last; ``rollback`` takes them off.
        is_held: whether ``apply`` is refused.
        hold_reason: why.
    """

    spec: dict[str, Any]
    active: str
    previous: tuple[str, ...] = ()
    is_held: bool = False
    hold_reason: str = ""


@dataclass(frozen=True)
class HistoryMark:
    """How far the history goes: what stands behind it in the file was never done.

    Attributes:
        size: bytes.
        lines: count.
        head: SHA-256 of the last line.
    """

    size: int = 0
    lines: int = 0
    head: str = NO_LINE


@dataclass(frozen=True)
class State:
    """All of a store, in one file that is replaced at once: the moment of that is the moment of a change.

    Attributes:
        patches: by their digests.
        bases: by their ids.
        trust: digest of the trust state, "" before there is one.
        history: the mark up to which the history counts.
    """

    patches: Mapping[str, StoredPatch] = field(default_factory=dict)
    bases: Mapping[str, BaseRecord] = field(default_factory=dict)
    trust: str = ""
    history: HistoryMark = field(default_factory=HistoryMark)

    def __post_init__(self) -> None:
        for digest, patch in self.patches.items():
            if patch.base not in self.bases:
                raise UntrustedError(f"base of patch {digest[:12]}", "one that the store knows", patch.base[:12])
        for base, record in self.bases.items():
            for digest in (record.active, *record.previous):
                if digest not in self.patches or self.patches[digest].base != base:
                    raise UntrustedError(f"patches of base {base[:12]}", "patches of the store for it", digest[:12])

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical_json({"format": STATE_FORMAT, **asdict(self)}, STATE_DEPTH)


@dataclass(frozen=True)
class Seen:
    """The newest patch of a line of releases that this device ever took."""

    sequence: int
    digest: str


@dataclass(frozen=True)
class TrustState:
    """What this device trusts, and what it has seen.

    Attributes:
        root: text of the trust root's file, "" for none.
        seen: base id -> channel -> the newest.
        floor: the latest time that this device has seen, "" for none.
    """

    root: str = ""
    seen: Mapping[str, Mapping[str, Seen]] = field(default_factory=dict)
    floor: str = ""

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical_json({"format": TRUST_FORMAT, **asdict(self)})


# Reading. A store is written by this package alone, so anything else in it was changed by somebody.


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UntrustedError(what, "an object", type(value).__name__)
    return value


def _fields(kind: type, value: object, what: str) -> dict[str, Any]:
    """An object with exactly the fields of a dataclass; the plain ones are of their types."""
    values = _object(value, what)
    expected = {f.name: f for f in fields(kind)}
    if values.keys() != expected.keys():
        raise UntrustedError(what, ", ".join(sorted(expected)), ", ".join(sorted(values))[:200] or "nothing")
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,)}
    for name, entry in values.items():
        allowed = kinds.get(str(expected[name].type))
        if allowed and type(entry) not in allowed:  # not isinstance: True is an int
            raise UntrustedError(f"{what}: {name}", allowed[0].__name__, type(entry).__name__)
    return values


def _record(kind: type[RecordT], value: object, what: str) -> RecordT:
    return kind(**_fields(kind, value, what))


def _digest(value: object, what: str) -> str:
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise UntrustedError(what, "a SHA-256 digest", repr(value)[:80])
    return value


def _state_document(data: bytes) -> Any:
    """The value of a state's file, which must be as this package writes it, now or in format 1."""
    try:
        value = strict_json.loads(data, max_depth=STATE_DEPTH)
        is_first = isinstance(value, dict) and value.get("format") == 1 and PYTHON_JSON.encode(value).encode() == data
    except ValueError as error:
        raise UntrustedError("state", "canonical JSON", str(error)[:120]) from None
    return value if is_first else parse_canonical(data, "state", STATE_DEPTH)


def _without_format(value: object, what: str, versions: tuple[int, ...]) -> dict[str, Any]:
    values = _object(value, what)
    version = values.get("format")
    if type(version) is not int or version not in versions:  # not 1.0, not True
        hint = "a newer edgepatch may read it" if type(version) is int and version > versions[-1] else ""
        raise UntrustedError(f"format of the {what}", " or ".join(map(str, versions)), repr(version)[:80], hint=hint)
    return {name: entry for name, entry in values.items() if name != "format"}


def _base(value: object, name: str) -> BaseRecord:
    values = dict(_object(value, "base"))
    previous = values.get("previous")
    if not isinstance(previous, list):
        raise UntrustedError("previous patches of a base", "a list", type(previous).__name__)
    record = _record(BaseRecord, {**values, "previous": tuple(previous)}, "base")
    try:
        spec = ModelSpec.from_dict(record.spec)
        actual = base_id(spec)
    except PatchFormatError as error:
        raise UntrustedError("base", "a model spec", str(error)[:200]) from None
    if actual != name:
        raise UntrustedError("id of a base", actual, name[:80])
    return replace(record, spec=spec.as_dict())


def parse_state(data: bytes) -> State:
    """The state from the bytes of its file.

    Raises:
        UntrustedError: it is damaged.
    """
    values = _fields(State, _without_format(_state_document(data), "state", (1, STATE_FORMAT)), "state")
    patches = _object(values["patches"], "patches")
    return State(
        {_digest(name, "digest of a patch"): _record(StoredPatch, value, "patch") for name, value in patches.items()},
        {name: _base(value, name) for name, value in _object(values["bases"], "bases").items()},
        _digest(values["trust"], "digest of the trust state") if values["trust"] else "",
        _record(HistoryMark, values["history"], "history mark"),
    )


def _seen(value: object) -> Seen:
    seen = _record(Seen, value, "newest patch seen")
    if not 1 <= seen.sequence <= MAX_SEQUENCE:
        raise UntrustedError("sequence seen", f"1 to {MAX_SEQUENCE}", seen.sequence)
    _digest(seen.digest, "digest of the newest patch seen")
    return seen


def parse_trust(data: bytes) -> TrustState:
    """The trust state from the bytes of its file; the trust root in it is not examined here.

    Raises:
        UntrustedError: it is damaged.
    """
    values = _fields(
        TrustState, _without_format(parse_canonical(data, "trust state"), "trust state", (TRUST_FORMAT,)), "trust state"
    )
    if values["floor"] and not is_timestamp(values["floor"]):
        raise UntrustedError("latest time seen", "a time like 2030-01-31T23:59:59Z", values["floor"][:80])
    seen: dict[str, dict[str, Seen]] = {}
    for base, channels in _object(values["seen"], "newest patches seen").items():
        seen[_digest(base, "id of a base")] = {
            name: _seen(value) for name, value in _object(channels, "channels").items()
        }
        if not all(CHANNEL.fullmatch(name) for name in channels):
            raise UntrustedError("channel seen", "lower-case letters, digits and -", ", ".join(channels)[:80])
    return TrustState(values["root"], seen, values["floor"])
