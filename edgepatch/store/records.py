"""What lies in a store, as values and as canonical JSON: the state, which is one file, and the trust state, which it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from edgepatch.errors import PatchFormatError, UntrustedError
from edgepatch.files import strict_json
from edgepatch.files.canonical import MAX_DEPTH, canonical_json, parse_canonical
from edgepatch.patch.file import Patch
from edgepatch.patch.manifest import CHANNEL, DIGEST, MAX_SEQUENCE, NAME, is_timestamp
from edgepatch.tensors import ModelSpec

STATE_FORMAT = 2
"""Format 1 is read as well: a base had one active patch, of whatever name, and numbers were spelled as Python does (``10000.0``)."""

TRUST_FORMAT = 2
"""Format 1 is read as well: a channel's newest patch was that of all names together."""

MAX_NAME = 80
"""Characters of what a model calls itself."""

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
class SlotRecord:
    """The place of one name among the patches of a base: of the patches of this name one is active, or none.

    Attributes:
        active: digest of the active patch; "" where it was taken off.
        previous: digests of those that were active before, the latest last; ``rollback`` takes them off.
        is_held: whether ``apply`` of this name is refused.
        hold_reason: why.
        off_reason: why nothing of this name is active.
    """

    active: str = ""
    previous: tuple[str, ...] = ()
    is_held: bool = False
    hold_reason: str = ""
    off_reason: str = ""

    @property
    def latest(self) -> str:
        """Digest of the active patch, or else of the one that was active last; "" where none is left."""
        return self.active or (self.previous[-1] if self.previous else "")


@dataclass(frozen=True)
class BaseRecord:
    """A base model on this device; its active patches stand side by side.

    Attributes:
        spec: the model.
        slots: by the names of their patches. Where none of them has an active patch, the bare model was asked for by word.
        is_held: whether ``apply`` of any name is refused.
        hold_reason: why.
        name: what the model calls itself, for people; "" where it was never seen.
    """

    spec: dict[str, Any]
    slots: Mapping[str, SlotRecord]
    is_held: bool = False
    hold_reason: str = ""
    name: str = ""

    @property
    def title(self) -> str:
        """The base for people: its name, else its kind and shape."""
        return self.name or shape_of(self.spec)

    @property
    def active(self) -> tuple[str, ...]:
        """Digests of the active patches, in order of their names."""
        return tuple(slot.active for _, slot in sorted(self.slots.items()) if slot.active)

    @property
    def why_off(self) -> str:
        """Why patches were taken off, in one line; "" where none was."""
        return "; ".join(f"{name}: {slot.off_reason}" for name, slot in sorted(self.slots.items()) if slot.off_reason)

    def with_slot(self, name: str, slot: SlotRecord) -> BaseRecord:
        """The record with another slot of a name."""
        return replace(self, slots={**self.slots, name: slot})


def shape_of(spec: Mapping[str, Any]) -> str:
    """A model by its kind and shape: "llama, 30 layers of 576"."""
    return f"{spec['model_type']}, {spec['num_hidden_layers']} layers of {spec['hidden_size']}"


def human_name(text: str) -> str:
    """What a model calls itself, as one printable line of bounded length; whoever made its file chose the text."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:MAX_NAME].strip()


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
            if patch.base not in self.bases or patch.name not in self.bases[patch.base].slots:
                raise UntrustedError(f"base of patch {digest[:12]}", "one that the store knows", patch.base[:12])
        for base, record in self.bases.items():
            for name, slot in record.slots.items():
                for digest in filter(None, (slot.active, *slot.previous)):
                    stored = self.patches.get(digest)
                    if stored is None or (stored.base, stored.name) != (base, name):
                        raise UntrustedError(
                            f"patches {name} of base {base[:12]}", "patches of the store for it", digest[:12]
                        )

    def with_slot(self, base: str, name: str, slot: SlotRecord) -> State:
        """The state with another slot of a base that it knows."""
        return replace(self, bases={**self.bases, base: self.bases[base].with_slot(name, slot)})

    def beside(self, base: str, name: str) -> dict[str, StoredPatch]:
        """The active patches of a base that have another name, by their digests."""
        active = self.bases[base].active if base in self.bases else ()
        return {digest: self.patches[digest] for digest in active if self.patches[digest].name != name}

    def to_bytes(self) -> bytes:
        """The file; a base without a name is written as releases wrote it that knew no names."""
        values = asdict(self)
        for record in values["bases"].values():
            if not record["name"]:
                del record["name"]
        return canonical_json({"format": STATE_FORMAT, **values}, STATE_DEPTH)


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
        seen: base id -> name of patches -> channel -> the newest.
        floor: the latest time that this device has seen, "" for none.
    """

    root: str = ""
    seen: Mapping[str, Mapping[str, Mapping[str, Seen]]] = field(default_factory=dict)
    floor: str = ""

    def newest(self, base: str, name: str, channel: str) -> Seen | None:
        """The newest patch of a name in a channel that this device ever took."""
        return self.seen.get(base, {}).get(name, {}).get(channel)

    def with_seen(self, base: str, name: str, channel: str, seen: Seen) -> TrustState:
        """The trust state after a patch was taken; an older one than the newest changes nothing."""
        newest = max(self.newest(base, name, channel) or Seen(0, ""), seen, key=lambda seen: seen.sequence)
        names = self.seen.get(base, {})
        channels = {**names.get(name, {}), channel: newest}
        return replace(self, seen={**self.seen, base: {**names, name: channels}})

    def with_time(self, time: str) -> TrustState:
        """The trust state after a time was seen, or signed by those who are trusted; "" and earlier times change nothing."""
        return replace(self, floor=max(self.floor, time))  # times are written so that they sort as text

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


def _previous(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise UntrustedError("previous patches", "a list", type(value).__name__)
    return tuple(_digest(digest, "digest of a previous patch") for digest in value)


def _slot(value: object) -> SlotRecord:
    values = _object(value, "slot")
    slot = _record(SlotRecord, {**values, "previous": _previous(values.get("previous"))}, "slot")
    if slot.active:
        _digest(slot.active, "digest of the active patch")
    return slot


def _base(value: object, name: str) -> BaseRecord:
    record = _record(BaseRecord, {"name": "", **_object(value, "base")}, "base")
    if record.name != human_name(record.name):
        raise UntrustedError("name of a base", f"one printable line of at most {MAX_NAME} characters", record.name[:80])
    slots = {
        _patch_name(slot_name): _slot(slot) for slot_name, slot in _object(record.slots, "slots of a base").items()
    }
    try:
        spec = ModelSpec.from_dict(record.spec)
        actual = base_id(spec)
    except PatchFormatError as error:
        raise UntrustedError("base", "a model spec", str(error)[:200]) from None
    if actual != name:
        raise UntrustedError("id of a base", actual, name[:80])
    return replace(record, spec=spec.as_dict(), slots=slots)


def _patch_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise UntrustedError("name of patches", "letters, digits, . _ and -", text[:80])
    return text


def _base_of_format_1(value: object, name: str, patches: Mapping[str, StoredPatch]) -> dict[str, Any]:
    """A base of format 2. Its one active patch is that of its name; what it had replaced stays in the slot of its own name."""
    values = {**_object(value, "base")}
    active, previous = _digest(values.pop("active", None), "active patch"), _previous(values.pop("previous", None))
    for digest in (active, *previous):
        if digest not in patches:
            raise UntrustedError(f"patches of base {name[:12]}", "patches of the store for it", digest[:12])
    slots = {}
    for patch_name in sorted({patch.name for patch in patches.values() if patch.base == name}):
        own = [digest for digest in previous if patches[digest].name == patch_name]
        is_active = patches[active].name == patch_name
        slots[patch_name] = {**asdict(SlotRecord(active if is_active else "")), "previous": own}
    return {**values, "slots": slots}


def parse_state(data: bytes) -> State:
    """The state from the bytes of its file.

    Raises:
        UntrustedError: it is damaged.
    """
    document = _state_document(data)
    values = _fields(State, _without_format(document, "state", (1, STATE_FORMAT)), "state")
    patches = {
        _digest(name, "digest of a patch"): _record(StoredPatch, value, "patch")
        for name, value in _object(values["patches"], "patches").items()
    }
    bases = _object(values["bases"], "bases")
    if document["format"] == 1:
        bases = {name: _base_of_format_1(value, name, patches) for name, value in bases.items()}
    return State(
        patches,
        {name: _base(value, name) for name, value in bases.items()},
        _digest(values["trust"], "digest of the trust state") if values["trust"] else "",
        _record(HistoryMark, values["history"], "history mark"),
    )


def _seen(value: object) -> Seen:
    seen = _record(Seen, value, "newest patch seen")
    if not 1 <= seen.sequence <= MAX_SEQUENCE:
        raise UntrustedError("sequence seen", f"1 to {MAX_SEQUENCE}", seen.sequence)
    _digest(seen.digest, "digest of the newest patch seen")
    return seen


def _channels(value: object) -> dict[str, Seen]:
    channels = _object(value, "channels")
    if not all(CHANNEL.fullmatch(name) for name in channels):
        raise UntrustedError("channel seen", "lower-case letters, digits and -", ", ".join(channels)[:80])
    return {name: _seen(value) for name, value in channels.items()}


def parse_trust(data: bytes, names: Mapping[str, Collection[str]] | None = None) -> TrustState:
    """The trust state from the bytes of its file; the trust root in it is not examined here.

    Args:
        data: of the file.
        names: of the patches that the device knows for each base; what format 1 had seen of all of them, counts for each.

    Raises:
        UntrustedError: it is damaged.
    """
    document = parse_canonical(data, "trust state")
    values = _fields(TrustState, _without_format(document, "trust state", (1, TRUST_FORMAT)), "trust state")
    if values["floor"] and not is_timestamp(values["floor"]):
        raise UntrustedError("latest time seen", "a time like 2030-01-31T23:59:59Z", values["floor"][:80])
    seen: dict[str, dict[str, dict[str, Seen]]] = {}
    for base, value in _object(values["seen"], "newest patches seen").items():
        _digest(base, "id of a base")
        if document["format"] == 1:
            channels = _channels(value)
            seen[base] = dict.fromkeys((names or {}).get(base, ()), channels)
        else:
            seen[base] = {_patch_name(name): _channels(entry) for name, entry in _object(value, "names seen").items()}
    return TrustState(values["root"], seen, values["floor"])
