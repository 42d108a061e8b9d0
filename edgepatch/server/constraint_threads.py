"""Threads that compile constraints, beside the one that owns the model: a schema that takes long holds up no reply, and no other schema."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from edgepatch.decoding.constraints import CompiledConstraint, Constraint, ConstraintEngine, SlowConstraintError
from edgepatch.server.refusals import Refusal

MAX_WAITING = 32
"""Constraints in one lane; more are told to come again."""

InTime = Callable[["Future[CompiledConstraint]"], Awaitable[CompiledConstraint]]


class ConstraintThreads:
    """Two lanes: what compiles quickly, as most do, never waits behind what does not."""

    def __init__(self) -> None:
        self._quick, self._slow = _Lane("edgepatch-constraints"), _Lane("edgepatch-slow-constraints")

    async def compile(self, engine: ConstraintEngine, constraint: Constraint, in_time: InTime) -> CompiledConstraint:
        """A compiled constraint.

        Args:
            engine: of the model.
            constraint: what a reply must look like.
            in_time: awaits a future of the threads, for as long as the request has.

        Raises:
            InputError: it cannot be compiled, or costs too much.
            Refusal: 503, too many wait.
        """
        if (found := engine.find(constraint)) is not None:
            return found
        try:
            return await in_time(self._quick.submit(lambda: engine.compile(constraint, is_quick=True)))
        except SlowConstraintError:
            return await in_time(self._slow.submit(lambda: engine.compile(constraint)))

    def close(self) -> None:
        """Begins nothing more."""
        self._quick.close()
        self._slow.close()


class _Lane:
    """One thread, and who waits for it."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._num_waiting, self._lock = 0, threading.Lock()

    def submit(self, work: Callable[[], CompiledConstraint]) -> Future[CompiledConstraint]:
        with self._lock:
            if self._num_waiting >= MAX_WAITING:
                raise Refusal(
                    503, f"{MAX_WAITING} schemas and grammars wait to be compiled; try again later", code="queue_full"
                )
            self._num_waiting += 1
        future = self._thread.submit(work)
        future.add_done_callback(self._leave)
        return future

    def _leave(self, _: Future[CompiledConstraint]) -> None:
        with self._lock:
            self._num_waiting -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
