"""Finished prompts, one a line, beside the file that is being made: what a run that is cut off leaves for the next.

The first line holds the settings of the run; each further line is one prompt's outcome, in order. A line is on the disk before
the next prompt begins, so a kill loses the prompts under way at most.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgepatch.errors import InputError
from edgepatch.interrupts import held_back
from edgepatch.training.pairs.files import Pair, pair_row, parse_pair
from edgepatch.training.pairs.json_lines import read_rows

SUFFIX = ".partial"
RESTART = "--restart starts anew; another --out leaves it"


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt.

    Attributes:
        pairs: kept.
        dropped: reason -> how many.
        left_out: what was dropped, a line each, with scores, reason and place.
        unsafety: mean score of the base's answers and of the teacher's, 0 (safe) to 1; ``None`` where the prompt does not tell.
    """

    pairs: tuple[Pair, ...]
    dropped: Mapping[str, int]
    left_out: tuple[Mapping[str, Any], ...] = ()
    unsafety: tuple[float, float] | None = None


def journal_path(out: Path) -> Path:
    """The journal of an output file."""
    return out.with_name(out.name + SUFFIX)


class Journal:
    """The outcomes of a run, in order of its prompts.

    Args:
        out: the file that the run makes.
        settings: everything that decides the outcomes, as JSON knows it.
        restart: forgets what is there.

    Attributes:
        outcomes: of the prompts that are done.

    Raises:
        InputError: the journal was begun with other settings (they are named), is damaged, cannot be written, or another run
            is writing it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.path = journal_path(out)
        self.outcomes: list[Outcome] = []
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._lock()
            self._open(json.loads(json.dumps(settings)), restart)
        except BaseException:
            self._file.close()
            raise

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write {self.path}: {error.strerror}",
            hint="free space or name another folder; what is done is kept",
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path}: another run is writing it", hint="wait for it, or name another --out"
            ) from None

    def _open(self, settings: dict[str, Any], restart: bool) -> None:
        if restart:
            self._file.truncate(0)
        self._cut_torn_line()
        rows = list(read_rows(self.path, "journal"))
        if not rows:
            self._append({"settings": settings})
            return
        self._require_same(rows[0][1].get("settings"), settings)
        self.outcomes = [_outcome(place, row) for place, row in rows[1:]]

    def _cut_torn_line(self) -> None:
        """A kill or a full disk may have cut the last line."""
        data = self.path.read_bytes()
        self._file.truncate(data.rfind(b"\n") + 1)

    def _require_same(self, old: object, new: dict[str, Any]) -> None:
        if not isinstance(old, dict):
            raise InputError(f"{self.path} is no journal of pairs: its first line holds no settings", hint=RESTART)
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            changes = "; ".join(
                f"{name}: {json.dumps(old.get(name))} then, {json.dumps(new.get(name))} now" for name in names
            )
            raise InputError(
                f"{self.path} was begun with other settings: {changes}", hint=f"use the same settings; {RESTART}"
            )

    def _append(self, row: Mapping[str, Any]) -> None:
        try:
            data = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
            if self._file.write(data) != len(data):
                raise OSError(None, "the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def add(self, outcome: Outcome) -> None:
        """Keeps the outcome of the next prompt.

        Raises:
            InputError: the disk is full; what was kept before stays.
        """
        with held_back():
            self._append({**vars(outcome), "pairs": [pair_row(pair) for pair in outcome.pairs]})
            self.outcomes.append(outcome)

    def remove(self) -> None:
        """Deletes the journal of a run that is complete."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _outcome(place: str, row: Mapping[str, Any]) -> Outcome:
    try:
        unsafety = row.get("unsafety")
        return Outcome(
            tuple(parse_pair(pair) for pair in row["pairs"]),
            {str(k): int(v) for k, v in row["dropped"].items()},
            tuple(dict(line) for line in row.get("left_out", ())),
            None if unsafety is None else (float(unsafety[0]), float(unsafety[1])),
        )
    except (InputError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{place}: expected the outcome of a prompt: {error}", hint=RESTART) from None
