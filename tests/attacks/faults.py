"""A file system that fails at a chosen step, for the store.

``Faults`` stands between ``edgepatch.store.files`` and ``os``. It counts the steps that touch the disk, and at one of them it
ends the process (all later steps fail too, as those of a dead process do) or lets the step fail with an error of the disk.
What was written but not made durable by then is lost half of the times, as in a power cut.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgepatch.store import files

STEPS = (
    "open",
    "read",
    "write",
    "fsync",
    "replace",
    "unlink",
    "mkdir",
    "makedirs",
    "ftruncate",
    "lseek",
    "fstat",
    "lstat",
    "close",
)


class Killed(BaseException):
    """The process has ended; no handler of an error sees that."""


class Faults:
    """``os`` with one fault.

    Args:
        at: number of the step that fails, from 0.
        fault: an ``errno``, or ``None`` for the end of the process.
        share: of the bytes of a write that reach the disk before the fault.
    """

    def __init__(self, at: int, fault: int | None, share: float = 0.0) -> None:
        self._at, self._fault, self._share = at, fault, share
        self.names: list[str] = []
        self.is_dead = False
        self._open: set[int] = set()
        self._volatile: dict[int, tuple[int, int]] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._step(name, real) if name in STEPS else real

    def _step(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.is_dead:
                raise Killed
            self.names.append(name)
            if len(self.names) - 1 == self._at:
                self._fail(name, real, arguments)
            result = real(*arguments, **options)
            self._note(name, arguments, result)
            return result

        return call

    def _fail(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if name == "write" and self._share:
            handle, data = arguments
            self._note(name, arguments, real(handle, bytes(data)[: int(len(data) * self._share)]))
        if self._fault is None:
            self.is_dead = True
            raise Killed
        if name == "close":  # closes even where it reports an error, as on Linux
            self._note(name, arguments, real(*arguments))
        raise OSError(self._fault, os.strerror(self._fault), str(arguments[0]))

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self._open.add(result)
        elif name == "close":
            self._open.discard(arguments[0])
            self._forget(arguments[0])
        elif name == "write" and arguments[0] not in self._volatile:
            kept = os.dup(arguments[0])
            self._volatile[arguments[0]] = (kept, os.fstat(kept).st_size - result)
        elif name == "fsync":
            self._forget(arguments[0])

    def _forget(self, handle: int) -> None:
        if handle in self._volatile:
            os.close(self._volatile.pop(handle)[0])

    def end(self) -> None:
        """What the end of a process does: its files are closed, its lock is free; the disk forgets what was not durable."""
        for kept, size in self._volatile.values():
            if self.is_dead and random.Random(self._at).random() < 0.5:
                os.ftruncate(kept, size)
            os.close(kept)
        for handle in self._open:
            os.close(handle)
        self._open, self._volatile = set(), {}


@contextmanager
def faulty(faults: Faults) -> Iterator[Faults]:
    """The store's files under a fault, until the end of the block."""
    files.os = faults  # type: ignore[assignment, attr-defined]
    try:
        yield faults
    finally:
        files.os = os  # type: ignore[attr-defined]
        faults.end()
