"""Threads that tokenize, beside the one that owns the model: a prompt that takes long to read, or is refused, holds up no reply."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LONG_TEXT = 2**16
NUM_SHORT = 2


class TextThreads:
    """Two lanes: texts of usual length never wait behind long ones, which are read one after the other."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(NUM_SHORT, thread_name_prefix="edgepatch-text")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="edgepatch-long-text")

    def submit(self, num_characters: int, work: Callable[[], T]) -> Future[T]:
        """Does work on so many characters of text when a thread is free; a future that is cancelled before is never begun."""
        return (self._long if num_characters > LONG_TEXT else self._short).submit(work)

    def close(self) -> None:
        """Begins nothing more."""
        for lane in (self._short, self._long):
            lane.shutdown(wait=False, cancel_futures=True)
