"""The places of several patches beside each other: which one a verb means, and what becomes of it.

A change here is a value, made of the state before; ``device`` makes it last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.store.reading import StoreReader
from edgepatch.store.records import BaseRecord, SlotRecord, State, StoredPatch

MAX_PREVIOUS = 32
"""So many steps back are kept."""


@dataclass(frozen=True)
class Place:
    """The patches of one name for one base.

    Attributes:
        base: id of the base.
        name: of the patches.
        slot: what the device has of them.
    """

    base: str
    name: str
    slot: SlotRecord

    def __str__(self) -> str:
        return f"{self.name} for base {self.base[:12]}"

    def state_with(self, state: State, slot: SlotRecord) -> State:
        """A state with another slot in this place."""
        return state.with_slot(self.base, self.name, slot)


def place_of(
    store: StoreReader, state: State, base: str | None, name: str | None, is_meant: Callable[[SlotRecord], bool]
) -> Place:
    """The place that a verb means.

    Args:
        store: of the state.
        state: as it is.
        base: start of the base's id or name; ``None`` where one alone fits.
        name: of the patches; ``None`` where one alone is meant.
        is_meant: whether a slot can be meant where no name is given.

    Raises:
        InputError: none or several fit.
    """
    if name is None or base is not None:
        base = store.find_base(base, state)
    places = [place for place in _places(state) if place.base.startswith(base or "")]
    fitting = [place for place in places if (is_meant(place.slot) if name is None else place.name == name)]
    if len(fitting) == 1:
        return fitting[0]
    if name is not None and fitting:
        bases = ", ".join(place.base[:12] for place in fitting)
        raise InputError(f"patch {name}: expected one base that has it, found {bases}", hint="name the base as well")
    choices = ", ".join(sorted({place.name for place in fitting or places})) or "none"
    asked = "patch" if name is None else f"patch {name[:80]!r}"
    raise InputError(
        f"{asked}: expected the name of one patch in {store.folder}, found {choices}",
        hint=f"name one: --patch {fitting[0].name}" if fitting else "`edgepatch status` shows what is active",
    )


def names(state: State) -> set[str]:
    """The names of the patches that a device has."""
    return {place.name for place in _places(state)}


def _places(state: State) -> Iterator[Place]:
    return (Place(base, name, slot) for base, record in state.bases.items() for name, slot in record.slots.items())


def with_active(slot: SlotRecord, digest: str) -> SlotRecord:
    """The slot after a patch was made its active one."""
    return replace(
        slot, active=digest, previous=_behind(slot) if slot.active != digest else slot.previous, off_reason=""
    )


def rolled_back(place: Place) -> SlotRecord:
    """The slot with the patch that was active before.

    Raises:
        EdgepatchError: there is none.
    """
    if not place.slot.previous:
        raise EdgepatchError(
            f"{place}: expected a patch to go back to, found none",
            hint="`edgepatch history` shows what was; `edgepatch deactivate` takes a first patch off",
        )
    *rest, digest = place.slot.previous
    return replace(place.slot, active=digest, previous=tuple(rest), off_reason="")


def taken_off(place: Place, reason: str) -> SlotRecord:
    """The slot with no active patch; the one that was may come back by rollback.

    Raises:
        InputError: none is active.
    """
    if not place.slot.active:
        raise InputError(
            f"{place}: expected an active patch, found none", hint="`edgepatch status` shows what is active"
        )
    return replace(place.slot, active="", previous=_behind(place.slot), off_reason=reason)


def _behind(slot: SlotRecord) -> tuple[str, ...]:
    return (*slot.previous, *filter(None, [slot.active]))[-MAX_PREVIOUS:]


def without(state: State, digest: str, stored: StoredPatch) -> State:
    """The state without a patch that is not active.

    Raises:
        EdgepatchError: it is active.
    """
    slot = state.bases[stored.base].slots[stored.name]
    if slot.active == digest:
        raise EdgepatchError(
            f"patch {digest[:12]} is active: expected another one",
            hint=f"apply another, `edgepatch rollback`, or `edgepatch deactivate {stored.name}`, first",
        )
    kept = replace(slot, previous=tuple(other for other in slot.previous if other != digest))
    patches = {other: value for other, value in state.patches.items() if other != digest}
    return replace(state.with_slot(stored.base, stored.name, kept), patches=patches)


def held(state: State, base: str, is_held: bool, reason: str) -> State:
    """The state with a whole base held, or with nothing of it held any more."""
    record = replace(state.bases[base], is_held=is_held, hold_reason=reason if is_held else "")
    if not is_held:
        slots = {name: replace(slot, is_held=False, hold_reason="") for name, slot in record.slots.items()}
        record = replace(record, slots=slots)
    return replace(state, bases={**state.bases, base: record})


def require_free(base: str, record: BaseRecord | None, name: str) -> None:
    """Raises where an administrator holds a base, or the patches of a name.

    Raises:
        EdgepatchError: it is held.
    """
    if record is None:
        return
    if record.is_held:
        raise EdgepatchError(
            f"base {base[:12]} is held: {record.hold_reason or 'no reason given'}",
            hint="`edgepatch unhold` ends that",
        )
    slot = record.slots.get(name, SlotRecord())
    if slot.is_held:
        raise EdgepatchError(
            f"{name} is held: {slot.hold_reason or 'no reason given'}",
            hint=f"`edgepatch unhold --patch {name}` ends that",
        )
