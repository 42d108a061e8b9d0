"""A store as runtimes read it: the active patches of a model, their bytes checked anew at every load.

Reading needs neither a lock nor the right to write, so that a store may lie on read-only media.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import platformdirs

from edgepatch.errors import InputError, MismatchError, PatchFormatError, UntrustedError
from edgepatch.patch.file import MAX_FILE_BYTES, PAYLOAD_TYPE, Patch, parse_patch
from edgepatch.store import files
from edgepatch.store.history import MAX_HISTORY_BYTES, parse_history
from edgepatch.store.policy import time_of
from edgepatch.store.records import BaseRecord, State, StoredPatch, TrustState, base_id, parse_state, parse_trust
from edgepatch.tensors import ModelSpec
from edgepatch.trust.roots import Root, parse_root
from edgepatch.trust.verification import trusted_time, verify_threshold

FOLDER_VARIABLE = "EDGEPATCH_STORE"
PATCHES, TRUST, STATE, HISTORY = "patches", "trust", "state.json", "history.jsonl"
MAX_RECORD_BYTES = 16 * 1024 * 1024
MIN_DIGEST_LENGTH = 8
READ_ATTEMPTS = 5
BARE_WORD = "--bare (Python: patch=None)"


def default_folder() -> Path:
    """Where the store is when nobody says: ``$EDGEPATCH_STORE``, else the user's data folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else platformdirs.user_data_path("edgepatch", appauthor=False) / "store"


class StoreReader:
    """The patches of a device, in one folder.

    Args:
        folder: must exist, and so must the one that ``$EDGEPATCH_STORE`` names; ``None`` takes ``default_folder()``.
        clock: the present time, with a time zone.
    """

    makes_folder: ClassVar[bool] = False
    """Whether a change makes the folder, so that reading what is not there yet is no error."""

    def __init__(
        self, folder: Path | str | None = None, *, clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc)
    ) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self._is_named = folder is not None or bool(os.environ.get(FOLDER_VARIABLE))
        self.now = clock

    def read(self) -> tuple[State, TrustState]:
        """State and trust state that belong together; empty ones where the device has no store yet.

        Raises:
            InputError: they cannot be read, or a store that was named does not exist.
            UntrustedError: somebody changed them.
        """
        with self._reading():
            for _ in range(READ_ATTEMPTS):
                state = self._read_state()
                with suppress(FileNotFoundError):  # a change came in between; the new state names another file
                    return state, self._read_trust(state)
            raise UntrustedError(
                "trust state of the store",
                f"file {state.trust[:12]} in {self.folder / TRUST}",
                "none",
                hint="somebody removed it, or put an old state in place",
            )

    def _read_state(self) -> State:
        try:
            data = files.read_file(self.folder / STATE, MAX_RECORD_BYTES, "state")
        except FileNotFoundError:
            self._require_fresh()
            return State()
        state = parse_state(data)
        if not state.trust:
            self._require_first_change()
        return state

    def _require_fresh(self) -> None:
        """A store begins with its state, so one that holds anything without a state has lost it."""
        if self._is_named and not self.makes_folder and not self.folder.exists():
            raise InputError(
                f"store: expected the folder {self.folder}, found nothing there",
                hint=f"check --store and ${FOLDER_VARIABLE}; `edgepatch apply` and `edgepatch trust set` make a store",
            )
        contents = {
            "a history": [path for path in (self.folder / HISTORY,) if os.path.lexists(path)],
            "patches": list((self.folder / PATCHES).glob("*.safetensors")),
            "a trust state": list((self.folder / TRUST).glob("*.json")),
        }
        left = [kind for kind, paths in contents.items() if paths]
        if left:
            raise UntrustedError(
                f"state of the store {self.folder}",
                STATE,
                f"none, but {' and '.join(left)}",
                hint="somebody removed it; put it back, or apply the patches to a new store",
            )

    def _require_first_change(self) -> None:
        """Behind the state that a store begins with, one line of history at most may stand: of a change that never came about."""
        with suppress(FileNotFoundError):
            num_lines = files.read_file(self.folder / HISTORY, MAX_HISTORY_BYTES, "history").count(b"\n")
            if num_lines > 1:
                raise UntrustedError(
                    f"state of the store {self.folder}",
                    f"that of {num_lines} changes",
                    "an empty one",
                    hint="somebody put it there",
                )

    def _read_trust(self, state: State) -> TrustState:
        if not state.trust:
            return TrustState()
        files.require_folder(self.folder / TRUST)
        data = files.read_file(self.trust_path(state.trust), MAX_RECORD_BYTES, "trust state")
        actual = hashlib.sha256(data).hexdigest()
        if actual != state.trust:
            raise UntrustedError("digest of the trust state", state.trust[:12], actual[:12], hint="somebody changed it")
        return parse_trust(data, {base: record.slots.keys() for base, record in state.bases.items()})

    def root(self) -> Root | None:
        """The trust root of this device, if it has one.

        Raises:
            InputError: the store cannot be read.
            UntrustedError: somebody changed it.
        """
        return root_of(self.read()[1])

    def load(self, digest: str) -> Patch:
        """A patch of the store, its bytes and the signatures over them checked anew.

        Expiry of the patch or the trust root is no reason to stop an assistant; ``status`` warns of it.

        Raises:
            InputError: the store has no such patch, or cannot be read.
            UntrustedError: its file was changed, or the trust root does not vouch for it.
        """
        state, trust = self.read()
        return self.load_stored(self.find(digest, state), state, trust)

    def load_stored(self, digest: str, state: State, trust: TrustState) -> Patch:
        """As ``load``, of a state that was read before."""
        what, record = f"patch {digest[:12]} of the store", state.patches[digest]
        try:
            with self._reading():
                files.require_folder(self.folder / PATCHES)
                data = files.read_file(self.patch_path(digest), MAX_FILE_BYTES, what)
            patch = parse_patch(data)
        except FileNotFoundError:
            raise UntrustedError(
                what, f"its file in {self.folder / PATCHES}", "none", hint="apply its file again"
            ) from None
        except PatchFormatError as error:
            raise UntrustedError(what, "the bytes that were applied", str(error), hint="apply its file again") from None
        actual = StoredPatch.of(patch, record.unsigned)
        if patch.digest != digest or actual != record:
            raise UntrustedError(
                what, "the patch that was applied", f"patch {patch.digest[:12]}", hint="apply its file again"
            )
        if trust.root or not record.unsigned:  # what was taken unsigned counts no longer, once somebody can be asked
            require_vouched(patch, trust)
        return patch

    def active(self, spec: ModelSpec) -> tuple[Patch, ...]:
        """The active patches for a model, which stand side by side; none where the store has none for it.

        Raises:
            InputError: the store cannot be read.
            UntrustedError: a file was changed, or the trust root does not vouch for a patch.
        """
        base = base_id(spec)
        while True:
            state, trust = self.read()
            record = state.bases.get(base)
            try:
                return tuple(self.load_stored(digest, state, trust) for digest in (record.active if record else ()))
            except UntrustedError:
                if self.read() == (state, trust):
                    raise
                # Another patch was applied, and this one removed, in between.

    def require_active(self, spec: ModelSpec) -> tuple[Patch, ...]:
        """The active patches for a model; none only where an administrator took them off by word.

        Raises:
            InputError: the store cannot be read, or no patch is active on this device.
            MismatchError: the active ones are for other models.
            UntrustedError: a file was changed, or the trust root does not vouch for a patch.
        """
        patches = self.active(spec)
        if patches or self.why_bare(spec):
            return patches
        self.require_some()
        raise _made_for_others(self, spec)

    def require_some(self) -> None:
        """Refuses a device on which no model has a patch, nor had one taken off by word; needs no model.

        Raises:
            InputError: it is such a device, or its store cannot be read.
            UntrustedError: somebody changed it.
        """
        if not self.read()[0].bases:
            raise InputError(
                f"expected --patch or --bare, or an active patch for the model in {self.folder}, found none of them",
                hint=f"apply a patch, or run the model without one by word: {BARE_WORD}",
            )

    def why_bare(self, spec: ModelSpec) -> str:
        """Why an administrator took the patches for a model off; "" where some are active, or none ever was.

        Raises:
            InputError: the store cannot be read.
            UntrustedError: somebody changed it.
        """
        record = self.read()[0].bases.get(base_id(spec))
        return record.why_off if record and not record.active else ""

    def find(self, text: str, state: State | None = None) -> str:
        """The digest that a text names: "sha256:..." or the start of one.

        Raises:
            InputError: none or several patches of the store have it.
        """
        start = text.removeprefix("sha256:")
        patches = (state or self.read()[0]).patches
        digests = [digest for digest in patches if digest.startswith(start)] if len(start) >= MIN_DIGEST_LENGTH else []
        if len(digests) != 1:
            raise InputError(
                f"patch {text}: expected the digest of one patch in {self.folder}, found {len(digests)} of {len(patches)}",
                hint=f"`edgepatch list` shows them; {MIN_DIGEST_LENGTH} digits do",
            )
        return digests[0]

    def find_base(self, text: str | None, state: State | None = None) -> str:
        """The id of a base, from the start of it or of the base's name; without one, that of the only base of this device.

        Raises:
            InputError: none or several fit.
        """
        bases = (state or self.read()[0]).bases
        matching = bases_called(text or "", bases)
        if len(matching) != 1:
            names = ", ".join(f"{base[:12]} ({record.title})" for base, record in bases.items())
            raise InputError(
                f"base model: expected one in {self.folder}, found {len(matching)}",
                hint=f"name one: {names}" if names else "nothing is applied yet: `edgepatch apply PATCH`",
            )
        return matching[0]

    def history(self) -> list[dict[str, Any]]:
        """What was done, oldest first; the chain is checked.

        Raises:
            InputError: it cannot be read.
            UntrustedError: somebody changed it.
        """
        with self._reading():
            state = self._read_state()
            try:
                data = files.read_file(self.folder / HISTORY, MAX_HISTORY_BYTES, "history")
            except FileNotFoundError:
                data = b""
        return parse_history(data, state.history)

    def time(self, trust: TrustState) -> datetime:
        """The present time, or the latest that this device has seen, should its clock have been set back."""
        return trusted_time(self.now(), time_of(trust.floor) if trust.floor else None)

    # Where things lie.

    def patch_path(self, digest: str) -> Path:
        """The file of a patch."""
        return self.folder / PATCHES / f"{digest}.safetensors"

    def trust_path(self, digest: str) -> Path:
        """The file of a trust state."""
        return self.folder / TRUST / f"{digest}.json"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(
                f"cannot read the store {self.folder}: {error.strerror}", hint="check the path and its rights"
            ) from error


def bases_called(text: str, bases: Mapping[str, BaseRecord]) -> list[str]:
    """The ids of the bases that a text may mean: the start of an id, a whole name, or else the start of a name."""
    word = text.casefold()
    names = {base: record.name.casefold() for base, record in bases.items()}
    named = [base for base, name in names.items() if name and name == word]
    named = named or [base for base, name in names.items() if name and name.startswith(word)]
    return [base for base in bases if base.startswith(text) or base in named]


def root_of(trust: TrustState) -> Root | None:
    """The trust root in a trust state.

    Raises:
        UntrustedError: it breaks the format.
    """
    return parse_root(trust.root.encode(), "trust root of the device") if trust.root else None


def require_vouched(patch: Patch, trust: TrustState) -> frozenset[str]:
    """The keys that vouch for a patch, whatever the time is.

    Raises:
        UntrustedError: too few do, or the device has no trust root.
    """
    root = root_of(trust)
    if root is None:
        raise UntrustedError(
            f"signatures of {patch.name} {patch.version}",
            "a trust root on this device",
            "none",
            hint="`edgepatch trust set ROOT`",
        )
    return verify_threshold(patch.manifest, PAYLOAD_TYPE, patch.signatures, root, "patch", root.created)


def _made_for_others(store: StoreReader, spec: ModelSpec) -> MismatchError:
    """Which fields differ from the most similar base that the device has patches for."""
    mismatches = []
    for record in store.read()[0].bases.values():
        try:
            ModelSpec.from_dict(record.spec).require_same(spec)
        except MismatchError as error:
            mismatches.append(error)
    nearest = min(mismatches, key=lambda error: len(error.differences))
    nearest.args = (f"no active patch for this model in {store.folder}: {nearest}",)
    nearest.hint = f"apply a patch for this model, or run it without one by word: {BARE_WORD}"
    return nearest
