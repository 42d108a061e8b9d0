"""The store of a device: what changes it.

A change writes what it needs beside what is there (patch, trust state, a line of history), and then replaces the one file that
names them all, ``state.json``. Before that moment nothing has happened, after it everything has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgepatch.errors import EdgepatchError, InputError, UntrustedError
from edgepatch.patch.composition import trained_alone
from edgepatch.patch.file import MAX_FILE_BYTES, PAYLOAD_TYPE, Patch, parse_patch_file, read_patch_bytes
from edgepatch.patch.manifest import DIGEST
from edgepatch.store import files
from edgepatch.store.changes import Change as Change
from edgepatch.store.changes import RootChange as RootChange
from edgepatch.store.changes import described, seen_of
from edgepatch.store.history import next_line
from edgepatch.store.policy import (
    Allowances,
    check_base,
    check_beside,
    check_channel,
    check_expiry,
    check_reason,
    check_sequence,
    time_of,
)
from edgepatch.store.reading import HISTORY, PATCHES, STATE, TRUST, StoreReader, root_of
from edgepatch.store.records import BaseRecord, Seen, SlotRecord, State, StoredPatch, TrustState, base_id, human_name
from edgepatch.store.slots import Place, held, place_of, require_free, rolled_back, taken_off, with_active, without
from edgepatch.tensors import ModelSpec
from edgepatch.trust.roots import Root, time_text
from edgepatch.trust.verification import require_current, require_signed, rotate, verify_threshold

LOCK_TIMEOUT_S = 10.0
NOTHING_ALLOWED = Allowances()


class Store(StoreReader):
    """The patches of a device, in one folder, and what changes them.

    Args:
        folder: made on the first change; ``None`` takes ``default_folder()``.
        clock: the present time, with a time zone.
        lock_timeout_s: how long a change waits for another one.
    """

    makes_folder = True

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        super().__init__(folder, clock=clock)
        self._lock_timeout_s = lock_timeout_s

    def apply(
        self,
        path: Path,
        allowances: Allowances = NOTHING_ALLOWED,
        *,
        model: ModelSpec | None = None,
        channel: str = "",
        base_name: str = "",
        is_trial: bool = False,
    ) -> Change:
        """Checks a patch file, keeps the bytes that were checked, and makes the patch the active one of its name.

        Active patches of other names stay beside it.

        Args:
            path: the patch file.
            allowances: what may pass, and why.
            model: the model that the patch must fit; else it must fit one that the device has a patch for.
            channel: the channel to change over to; else the patch must be of the active one's.
            base_name: what the model calls itself, for people; a base keeps its first name.
            is_trial: whether to check everything, and change nothing: no file, no lock, no right to write is needed.

        Raises:
            InputError: the file cannot be read, a reason cannot be used, or the patch cannot stand beside the other active ones.
            PatchFormatError: the file breaks the format.
            UntrustedError: too few signatures, an older or much newer sequence, another channel, expired.
            MismatchError: it was made for another model.
            EdgepatchError: the base or the name is held, another change takes too long, or the disk fails. The old patch stays active.
        """
        data = read_patch_bytes(path)
        patch = parse_patch_file(path, data)
        with nullcontext(self.read()) if is_trial else self._changing() as (state, trust):
            signed_by = self._check(patch, allowances, model, channel, state, trust)
            new = _with_patch(state, patch, allowances.unsigned, base_name)
            change = self._change_to(new, state, patch, data, signed_by)
            alone = trained_alone([patch, *_others(self, patch, state, trust)])
            change = replace(change, trained_alone=tuple(alone))
            if change.is_new and not is_trial:
                self._keep(change.digest, data)
                if new != state:
                    trust = trust.with_time(patch.created) if signed_by else trust
                    self._commit_patch(state, new, trust, change, allowances)
            return change

    def _check(
        self,
        patch: Patch,
        allowances: Allowances,
        model: ModelSpec | None,
        channel: str,
        state: State,
        trust: TrustState,
    ) -> frozenset[str]:
        """The ids of the keys that vouch for a patch which may be applied."""
        specs = [ModelSpec.from_dict(record.spec) for record in state.bases.values()]
        check_base(patch, model, specs)
        dated = trust.with_time(patch.created) if trust.root else trust  # if its time is true, no earlier one is
        signed_by = _require_trusted(patch, trust, allowances.unsigned, self.time(dated))
        base = base_id(patch.base)
        record = state.bases.get(base)
        require_free(base, record, patch.name)
        slot = record.slots.get(patch.name, SlotRecord()) if record else SlotRecord()
        check_channel(patch, state.patches[slot.latest].channel if slot.latest else None, channel)
        check_sequence(patch, trust.newest(base, patch.name, patch.channel), allowances.downgrade)
        check_expiry(patch, self.time(dated), allowances.expired)
        self._require_room_beside(patch, state, trust)
        return signed_by

    def _require_room_beside(self, patch: Patch, state: State, trust: TrustState) -> None:
        """Raises unless a patch can stand beside the other active ones."""
        check_beside(patch, _others(self, patch, state, trust))

    def _change_to(self, new: State, state: State, patch: Patch, data: bytes, signed_by: frozenset[str]) -> Change:
        """What becoming the active patch of its name comes to; the same bytes in the same place change nothing."""
        base, digest = base_id(patch.base), patch.digest
        slot = state.bases[base].slots.get(patch.name, SlotRecord()) if base in state.bases else SlotRecord()
        is_new = new != state or not _has_kept(self, digest, data)
        return Change(digest, new.patches[digest], slot.active, is_new, signed_by, state.beside(base, patch.name))

    def _commit_patch(
        self, state: State, new: State, trust: TrustState, change: Change, allowances: Allowances
    ) -> None:
        stored = change.patch
        seen = Seen(stored.sequence, change.digest)
        self._commit(
            state,
            new,
            trust.with_seen(stored.base, stored.name, stored.channel, seen),
            "apply",
            {
                **described(change.digest, stored),
                "before": change.before,
                "beside": sorted(change.beside) or None,
                "signed_by": sorted(change.signed_by) or None,
                "unsigned": allowances.unsigned,
                "downgrade": allowances.downgrade,
                "expired": allowances.expired,
            },
        )

    def _keep(self, digest: str, data: bytes) -> None:
        """Other bytes of the same patch have other signatures, which were checked as well; so they may lie there at once."""
        files.write_file(self.patch_path(digest), data)
        files.sync_folder(self.folder / PATCHES)

    def rollback(self, base: str | None = None, reason: str = "", *, patch: str | None = None) -> Change:
        """Makes the patch active again that was active before the present one of its name; the others stay.

        Args:
            base: start of its id, where the device has several.
            reason: for the history.
            patch: name of the patch, where the base has several.

        Raises:
            InputError: no such base or name, or the earlier patch cannot stand beside the other active ones.
            UntrustedError: the patch was changed, or the trust root does not vouch for it.
            EdgepatchError: there is none, or the disk fails.
        """
        check_reason(reason)
        with self._changing() as (state, trust):
            place = place_of(self, state, base, patch, lambda slot: bool(slot.latest))
            slot = rolled_back(place)
            self._require_room_beside(self.load_stored(slot.active, state, trust), state, trust)
            return self._commit_slot("rollback", place, slot, slot.active, reason, state, trust)

    def deactivate(self, reason: str, *, patch: str | None = None, base: str | None = None) -> Change:
        """Takes the active patch of a name off; the others stay. ``rollback`` of the name or ``apply`` brings it back.

        Where it was the last one, the device keeps that the bare model was asked for by word.

        Args:
            reason: for the history and ``status``.
            patch: its name, where the base has several active ones.
            base: start of its id, where the device has several.

        Raises:
            InputError: there is no reason, no such name, or nothing of it is active.
            EdgepatchError: the disk fails.
        """
        _require_reason(reason)
        with self._changing() as (state, trust):
            place = place_of(self, state, base, patch, lambda slot: bool(slot.active))
            slot = taken_off(place, reason)
            return self._commit_slot("deactivate", place, slot, place.slot.active, reason, state, trust)

    def _commit_slot(
        self, action: str, place: Place, slot: SlotRecord, digest: str, reason: str, state: State, trust: TrustState
    ) -> Change:
        """Makes a change of one slot last; ``digest`` is the patch that it is about."""
        stored, before, others = state.patches[digest], place.slot.active, state.beside(place.base, place.name)
        details = {**described(digest, stored), "before": before, "beside": sorted(others) or None, "reason": reason}
        self._commit(state, place.state_with(state, slot), trust, action, details)
        return Change(digest, stored, before, True, beside=others)

    def hold(self, base: str | None = None, reason: str = "", *, is_held: bool = True, patch: str | None = None) -> str:
        """Refuses ``apply`` from now on, or with ``is_held`` false allows it again. Returns the base's id.

        Args:
            base: start of its id, where the device has several.
            reason: for the history and whoever is refused.
            is_held: whether to refuse.
            patch: name of the patch that alone is meant; without one it is the base with all that is and may come to be
                active for it.

        Raises:
            InputError: no such base or name.
            EdgepatchError: the disk fails.
        """
        check_reason(reason)
        with self._changing() as (state, trust):
            if patch is not None:
                place = place_of(self, state, base, patch, bool)
                slot = replace(place.slot, is_held=is_held, hold_reason=reason if is_held else "")
                base_id, new = place.base, place.state_with(state, slot)
            else:
                base_id = self.find_base(base, state)
                new = held(state, base_id, is_held, reason)
            if new != state:
                details = {"base": base_id, "name": patch, "reason": reason}
                self._commit(state, new, trust, "hold" if is_held else "unhold", details)
            return base_id

    def remove(self, digest: str) -> str:
        """Removes a patch that is not active. Returns its digest.

        Raises:
            InputError: no such patch.
            EdgepatchError: it is active, or the disk fails.
        """
        with self._changing() as (state, trust):
            name = self.find(digest, state)
            stored = state.patches[name]
            new = without(state, name, stored)
            self._commit(state, new, trust, "remove", described(name, stored))
            files.discard(self.patch_path(name))
            return name

    def set_root(self, roots: Sequence[Root], fingerprint: str = "") -> RootChange:
        """Takes the first trust root of the device, or goes from the present one to a newer one.

        Args:
            roots: the root, or the versions after the present one, in order.
            fingerprint: what its maker says it is; "" does not ask.

        Raises:
            UntrustedError: a root is not signed, does not follow, has expired, or has another fingerprint.
            EdgepatchError: the disk fails.
        """
        if fingerprint and roots[-1].fingerprint != fingerprint:
            raise UntrustedError("fingerprint of the trust root", fingerprint[:80], roots[-1].fingerprint)
        with self._changing() as (state, trust):
            pinned = root_of(trust)
            if pinned and pinned.fingerprint == roots[-1].fingerprint:
                return RootChange(pinned, False, False, ())
            trust = trust.with_time(max((time_text(root.created) for root in roots), default=""))
            root, reset = _follow(pinned, roots, self.now(), time_of(trust.floor) if trust.floor else None)
            trust = replace(trust, root=root.to_bytes().decode())
            active = [digest for record in state.bases.values() for digest in record.active]
            refused = [digest for digest in active if not _is_vouched(self, digest, state, trust)]
            if reset:
                trust = replace(trust, seen=seen_of(state, refused).seen)
            details = {
                "version": root.version,
                "fingerprint": root.fingerprint,
                "sequences": "reset" if reset else "kept",
            }
            self._commit(state, state, trust, "trust", details)
            return RootChange(root, True, reset, tuple(refused))

    def reset_clock(self, reason: str) -> None:
        """Forgets the latest time seen, after a clock that had been set ahead.

        Raises:
            InputError: there is no reason.
            EdgepatchError: the disk fails.
        """
        _require_reason(reason)
        with self._changing() as (state, trust):
            self._commit(
                state, state, replace(trust, floor=""), "reset-clock", {"before": trust.floor, "reason": reason}
            )

    # How a change is made.

    @contextmanager
    def _changing(self) -> Iterator[tuple[State, TrustState]]:
        """The present state, under the lock; what a process that died has left is cleared away."""
        try:
            files.make_root(self.folder)
            with files.locked(self.folder, self._lock_timeout_s):
                self._begin()
                for folder in (self.folder / PATCHES, self.folder / TRUST):
                    files.make_folder(folder)
                state, trust = self.read()
                self._clear_away(state)
                yield state, trust
        except OSError as error:
            raise EdgepatchError(
                f"cannot change the store {self.folder}: {error.strerror}",
                hint="nothing was changed; check space and rights",
            ) from error

    def _begin(self) -> None:
        """A store begins with an empty state, so that contents without one are never taken for a new store."""
        if not os.path.lexists(self.folder / STATE):
            self._require_fresh()
            files.write_file(self.folder / STATE, State().to_bytes())
            files.sync_folder(self.folder)

    def _clear_away(self, state: State) -> None:
        """Removes what changes that never came about have left."""
        for folder in (self.folder, self.folder / PATCHES, self.folder / TRUST):
            for path in folder.glob(f"{files.TEMPORARY}*"):
                files.discard(path)
        for path in (self.folder / TRUST).glob("*.json"):
            if path.stem != state.trust:
                files.discard(path)
        for path in (self.folder / PATCHES).glob("*.safetensors"):
            if DIGEST.fullmatch(path.stem) and path.stem not in state.patches:
                files.discard(path)

    def _commit(self, old: State, new: State, trust: TrustState, action: str, details: Mapping[str, Any]) -> None:
        time = time_text(self.time(trust))
        trust_bytes = replace(trust, floor=time).to_bytes()
        digest = hashlib.sha256(trust_bytes).hexdigest()
        files.write_file(self.trust_path(digest), trust_bytes)
        files.sync_folder(self.folder / TRUST)
        line, mark = next_line(old.history, time, action, details)
        files.write_behind(self.folder / HISTORY, old.history.size, line)
        files.write_file(self.folder / STATE, replace(new, trust=digest, history=mark).to_bytes())
        self._settle(old)
        if old.trust not in ("", digest):
            files.discard(self.trust_path(old.trust))

    def _settle(self, old: State) -> None:
        """Makes the new state last; where the disk refuses, the old one is put back, so that an error means that nothing changed."""
        try:
            files.sync_folder(self.folder)
        except OSError as error:
            self._put_back(old, error)
            raise

    def _put_back(self, old: State, reason: OSError) -> None:
        try:
            files.write_file(self.folder / STATE, old.to_bytes())
        except OSError:
            raise EdgepatchError(
                f"store {self.folder}: the disk fails: {reason.strerror}",
                hint="the new state is in place, but may not survive a power cut; replace the disk",
            ) from reason


def _with_patch(state: State, patch: Patch, unsigned: str, base_name: str) -> State:
    """The state in which a patch is the active one of its name."""
    base, digest = base_id(patch.base), patch.digest
    record = state.bases.get(base, BaseRecord(patch.base.as_dict(), {}))
    slot = with_active(record.slots.get(patch.name, SlotRecord()), digest)
    record = replace(record.with_slot(patch.name, slot), name=record.name or human_name(base_name))
    patches = {**state.patches, digest: StoredPatch.of(patch, unsigned)}
    return replace(state, patches=patches, bases={**state.bases, base: record})


def _follow(pinned: Root | None, roots: Sequence[Root], now: datetime, floor: datetime | None) -> tuple[Root, bool]:
    """(the newest root, whether the sequences are forgotten)."""
    if pinned:
        rotation = rotate(pinned, roots, now, floor)
        return rotation.root, rotation.resets_sequences
    if len(roots) != 1:
        raise InputError(f"the first trust root of a device: expected one file, found {len(roots)}")
    require_signed(roots[0])
    require_current(roots[0], now, floor)
    return roots[0], True  # nobody vouched for the sequences of unsigned patches


def _require_reason(reason: str) -> None:
    check_reason(reason)
    if not reason:
        raise InputError("reason: expected one, found none", hint="--reason REASON; the history keeps it")


def _others(store: Store, patch: Patch, state: State, trust: TrustState) -> list[Patch]:
    """The active patches of other names of a patch's base; those that no runtime would load are left to ``status``."""
    others = []
    for digest in state.beside(base_id(patch.base), patch.name):
        with suppress(InputError, UntrustedError):
            others.append(store.load_stored(digest, state, trust))
    return others


def _require_trusted(patch: Patch, trust: TrustState, unsigned: str, time: datetime) -> frozenset[str]:
    """The keys that vouch for a patch now; none where it is taken without.

    Raises:
        UntrustedError: too few do.
        InputError: it shall be taken without, on a device with a trust root.
    """
    root = root_of(trust)
    if root is not None:
        if unsigned:
            raise InputError("a device with a trust root takes signed patches only", hint="leave --unsigned out")
        return verify_threshold(patch.manifest, PAYLOAD_TYPE, patch.signatures, root, "patch", time)
    if not unsigned:
        raise UntrustedError(
            f"signatures of {patch.name} {patch.version}",
            "a trust root on this device",
            "none",
            hint="`edgepatch trust set ROOT`, or --unsigned REASON, which the history keeps",
        )
    return frozenset()


def _is_vouched(store: Store, digest: str, state: State, trust: TrustState) -> bool:
    try:
        store.load_stored(digest, state, trust)
    except (InputError, UntrustedError):
        return False
    return True


def _has_kept(store: Store, digest: str, data: bytes) -> bool:
    """Whether the file of a patch is there with these bytes, not damaged and not signed otherwise."""
    with suppress(OSError, UntrustedError):
        return files.read_file(store.patch_path(digest), MAX_FILE_BYTES, "patch") == data
    return False
