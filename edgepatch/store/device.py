"""The store of a device: what changes it.

A change writes what it needs beside what is there (patch, trust state, a line of history), and then replaces the one file that
names them all, ``state.json``. Before that moment nothing has happened, after it everything has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgepatch.errors import EdgepatchError, InputError, UntrustedError
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
    check_channel,
    check_expiry,
    check_reason,
    check_sequence,
    time_of,
)
from edgepatch.store.reading import HISTORY, PATCHES, STATE, TRUST, StoreReader, root_of
from edgepatch.store.records import BaseRecord, Seen, State, StoredPatch, TrustState, base_id
from edgepatch.tensors import ModelSpec
from edgepatch.trust.roots import Root, time_text
from edgepatch.trust.verification import require_current, require_signed, rotate, verify_threshold

LOCK_TIMEOUT_S = 10.0
MAX_PREVIOUS = 32
"""So many steps back are kept."""

NOTHING_ALLOWED = Allowances()


class Store(StoreReader):
    """The patches of a device, in one folder, and what changes them.

    Args:
        folder: made on the first change; ``None`` takes ``default_folder()``.
        clock: the present time, with a time zone.
        lock_timeout_s: how long a change waits for another one.
    """

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
        self, path: Path, allowances: Allowances = NOTHING_ALLOWED, *, model: ModelSpec | None = None, channel: str = ""
    ) -> Change:
        """Checks a patch file, keeps the bytes that were checked, and makes the patch the active one of its base.

        Args:
            path: the patch file.
            allowances: what may pass, and why.
            model: the model that the patch must fit; else it must fit one that the device has a patch for.
            channel: the channel to change over to; else the patch must be of the active one's.

        Raises:
            InputError: the file cannot be read, or a reason cannot be used.
            PatchFormatError: the file breaks the format.
            UntrustedError: too few signatures, an older or much newer sequence, another channel, expired.
            MismatchError: it was made for another model.
            EdgepatchError: the base is held, another change takes too long, or the disk fails. The old patch stays active.
        """
        data = read_patch_bytes(path)
        patch = parse_patch_file(path, data)
        with self._changing() as (state, trust):
            signed_by = self._check(patch, allowances, model, channel, state, trust)
            return self._activate(patch, data, allowances, signed_by, state, trust)

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
        signed_by = _require_trusted(patch, trust, allowances.unsigned, self.time(trust))
        base = base_id(patch.base)
        record = state.bases.get(base)
        if record and record.is_held:
            raise EdgepatchError(
                f"base {base[:12]} is held: {record.hold_reason or 'no reason given'}",
                hint="`edgepatch unhold` ends that",
            )
        check_channel(patch, state.patches[record.active].channel if record else None, channel)
        check_sequence(patch, trust.seen.get(base, {}).get(patch.channel), allowances.downgrade)
        check_expiry(patch, self.time(trust), allowances.expired)
        return signed_by

    def _activate(
        self,
        patch: Patch,
        data: bytes,
        allowances: Allowances,
        signed_by: frozenset[str],
        state: State,
        trust: TrustState,
    ) -> Change:
        base, digest = base_id(patch.base), patch.digest
        stored = StoredPatch.of(patch, allowances.unsigned)
        old = state.bases.get(base)
        before = old.active if old else ""
        if before == digest and state.patches[digest] == stored:
            return Change(digest, stored, before, self._mend(digest, data), signed_by)
        previous = old.previous if old else ()
        if before not in ("", digest):
            previous = (*previous, before)[-MAX_PREVIOUS:]
        record = BaseRecord(patch.base.as_dict(), digest, previous)
        self._keep(digest, data)
        new = replace(state, patches={**state.patches, digest: stored}, bases={**state.bases, base: record})
        channels = trust.seen.get(base, {})
        newest = max(
            channels.get(patch.channel, Seen(0, "")), Seen(patch.sequence, digest), key=lambda seen: seen.sequence
        )
        trust = replace(trust, seen={**trust.seen, base: {**channels, patch.channel: newest}})
        self._commit(
            state,
            new,
            trust,
            "apply",
            {
                **described(digest, stored),
                "before": before,
                "signed_by": sorted(signed_by) or None,
                "unsigned": allowances.unsigned,
                "downgrade": allowances.downgrade,
                "expired": allowances.expired,
            },
        )
        return Change(digest, stored, before, True, signed_by)

    def _keep(self, digest: str, data: bytes) -> None:
        """Other bytes of the same patch have other signatures, which were checked as well; so they may lie there at once."""
        files.write_file(self.patch_path(digest), data)
        files.sync_folder(self.folder / PATCHES)

    def _mend(self, digest: str, data: bytes) -> bool:
        """Whether the file of a patch, damaged or signed otherwise, had to be written anew."""
        with suppress(OSError, UntrustedError):
            if files.read_file(self.patch_path(digest), MAX_FILE_BYTES, "patch") == data:
                return False
        self._keep(digest, data)
        return True

    def rollback(self, base: str | None = None, reason: str = "") -> Change:
        """Makes the patch active again that was active before the present one.

        Raises:
            InputError: no such base.
            UntrustedError: the patch was changed, or the trust root does not vouch for it.
            EdgepatchError: there is none, or the disk fails.
        """
        check_reason(reason)
        with self._changing() as (state, trust):
            name = self.find_base(base, state)
            record = state.bases[name]
            if not record.previous:
                raise EdgepatchError(
                    f"base {name[:12]}: expected a patch to go back to, found none",
                    hint="`edgepatch history` shows what was",
                )
            *rest, digest = record.previous
            self.load_stored(digest, state, trust)
            new = replace(state, bases={**state.bases, name: replace(record, active=digest, previous=tuple(rest))})
            details = {**described(digest, state.patches[digest]), "before": record.active, "reason": reason}
            self._commit(state, new, trust, "rollback", details)
            return Change(digest, state.patches[digest], record.active, True)

    def hold(self, base: str | None = None, reason: str = "", *, is_held: bool = True) -> str:
        """Refuses ``apply`` for a base from now on, or with ``is_held`` false allows it again. Returns the base's id.

        Raises:
            InputError: no such base.
            EdgepatchError: the disk fails.
        """
        check_reason(reason)
        with self._changing() as (state, trust):
            name = self.find_base(base, state)
            record = replace(state.bases[name], is_held=is_held, hold_reason=reason if is_held else "")
            if record != state.bases[name]:
                new = replace(state, bases={**state.bases, name: record})
                self._commit(state, new, trust, "hold" if is_held else "unhold", {"base": name, "reason": reason})
            return name

    def remove(self, digest: str) -> str:
        """Removes a patch that is not active. Returns its digest.

        Raises:
            InputError: no such patch.
            EdgepatchError: it is active, or the disk fails.
        """
        with self._changing() as (state, trust):
            name = self.find(digest, state)
            stored = state.patches[name]
            record = state.bases[stored.base]
            if record.active == name:
                raise EdgepatchError(
                    f"patch {name[:12]} is active: expected another one",
                    hint="apply another, or `edgepatch rollback`, first",
                )
            kept = replace(record, previous=tuple(other for other in record.previous if other != name))
            others = {other: value for other, value in state.patches.items() if other != name}
            new = replace(state, patches=others, bases={**state.bases, stored.base: kept})
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
            root, reset = self._follow(pinned, roots, trust)
            trust = replace(trust, root=root.to_bytes().decode())
            refused = [
                record.active for record in state.bases.values() if not self._is_vouched(record.active, state, trust)
            ]
            if reset:
                trust = replace(trust, seen=seen_of(state, refused))
            details = {
                "version": root.version,
                "fingerprint": root.fingerprint,
                "sequences": "reset" if reset else "kept",
            }
            self._commit(state, state, trust, "trust", details)
            return RootChange(root, True, reset, tuple(refused))

    def _follow(self, pinned: Root | None, roots: Sequence[Root], trust: TrustState) -> tuple[Root, bool]:
        """(the newest root, whether the sequences are forgotten)."""
        now, floor = self.now(), time_of(trust.floor) if trust.floor else None
        if pinned:
            rotation = rotate(pinned, roots, now, floor)
            return rotation.root, rotation.resets_sequences
        if len(roots) != 1:
            raise InputError(f"the first trust root of a device: expected one file, found {len(roots)}")
        require_signed(roots[0])
        require_current(roots[0], now, floor)
        return roots[0], True  # nobody vouched for the sequences of unsigned patches

    def _is_vouched(self, digest: str, state: State, trust: TrustState) -> bool:
        try:
            self.load_stored(digest, state, trust)
        except (InputError, UntrustedError):
            return False
        return True

    def reset_clock(self, reason: str) -> None:
        """Forgets the latest time seen, after a clock that had been set ahead.

        Raises:
            InputError: there is no reason.
            EdgepatchError: the disk fails.
        """
        check_reason(reason)
        if not reason:
            raise InputError("reason: expected one, found none")
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
            if old.trust:
                files.write_file(self.folder / STATE, old.to_bytes())
            else:
                os.unlink(self.folder / STATE)
        except OSError:
            raise EdgepatchError(
                f"store {self.folder}: the disk fails: {reason.strerror}",
                hint="the new state is in place, but may not survive a power cut; replace the disk",
            ) from reason


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
