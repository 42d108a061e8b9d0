"""The one thread that owns the session, and the queue in front of it.

Each round the thread answers short calls (reading the vocabulary's texts), gives free sequences to waiting generations, and advances every running
one by one step: a part of its prompt, or a token, which all that have read their prompts get in one batch. So a long prompt or
reply holds nobody up for longer than one step. The first token is drawn as soon as its prompt is read: it needs no batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, TypeVar

from edgepatch.decoding.replies import Continuation, Piece
from edgepatch.errors import EdgepatchError, InactivePatchError
from edgepatch.runtimes.session import Session
from edgepatch.server.generations import Event, Finished, Generation, Started, steps_of
from edgepatch.server.metrics import Metrics
from edgepatch.server.refusals import Refusal

T = TypeVar("T")
State = Literal["loading", "ok", "stopping", "failed"]


@dataclass(eq=False)
class _Running:
    generation: Generation
    sequence: int
    steps: Iterator[Event | Continuation | None]
    continuation: Continuation | None = None  # from the end of the prompt to the last token


class Scheduler:
    """Serves generations on the sequences of one session.

    Args:
        load: makes the session, on the scheduler's thread.
        max_waiting: the most generations that wait for a sequence.
        metrics: counts what happens.
        on_ready: called when generations can be submitted.
        on_failed: called with the error when the runtime cannot be loaded, or can no longer be trusted.
    """

    def __init__(
        self,
        load: Callable[[], Session],
        max_waiting: int,
        metrics: Metrics,
        on_ready: Callable[[], None] = lambda: None,
        on_failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.state: State = "loading"
        self.error: BaseException | None = None
        self._load, self._max_waiting, self._metrics = load, max_waiting, metrics
        self._on_ready, self._on_failed = on_ready, on_failed
        self._changed = threading.Condition()
        self._calls: deque[Callable[[Session], None]] = deque()
        self._waiting: deque[deque[Generation]] = deque()
        self._running: list[_Running] = []
        self._free: list[int] = []  # the one that has been free for longest comes first
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._work, name="edgepatch-runtime", daemon=True)

    # Called from other threads.

    def start(self) -> None:
        """Loads the runtime and serves."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Generations that wait for a sequence."""
        with self._changed:
            return sum(len(group) for group in self._waiting)

    @property
    def num_running(self) -> int:
        """Generations that hold a sequence."""
        return len(self._running)

    def call(self, function: Callable[[Session], T]) -> Future[T]:
        """Runs a short function of the runtime between two steps.

        Raises:
            Refusal: 503, the server is loading or stopping.
        """
        result: Future[T] = Future()

        def run(session: Session) -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(function(session))
            except Exception as error:
                result.set_exception(error)

        with self._changed:
            self.require_serving()
            self._calls.append(run)
            self._changed.notify()
        return result

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queues the generations of one request. Waiting requests take turns, the oldest first.

        Raises:
            Refusal: 503, the queue is full, or the server is loading or stopping.
        """
        with self._changed:
            self.require_serving()
            waiting = sum(len(group) for group in self._waiting)
            if waiting and waiting + len(generations) > self._max_waiting:
                message = f"the queue is full: expected at most {self._max_waiting} waiting, found {waiting}"
                raise Refusal(503, f"{message}; try again later", code="queue_full")
            self._waiting.append(deque(generations))
            self._changed.notify()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """Takes generations out of the queue, or off their sequences before the next step; finished ones stay so."""
        with self._changed:
            for generation in generations:
                generation.cancelled = True
            kept = (deque(g for g in group if not g.cancelled) for group in self._waiting)
            self._waiting = deque(group for group in kept if group)
            self._changed.notify()

    def drain(self, grace_s: float) -> None:
        """Takes nothing new; what is not finished within the grace period is cancelled, then the thread ends."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopping"
            self._deadline = time.monotonic() + grace_s
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def require_serving(self) -> None:
        """Lets a request go on.

        Raises:
            Refusal: 503, the server is loading or stopping.
        """
        if self.state != "ok":
            reasons = {"loading": "the model is loading", "stopping": "the server is stopping"}
            raise Refusal(503, reasons.get(self.state, "the server has failed"), code=f"server_{self.state}")

    # On the scheduler's own thread.

    def _work(self) -> None:
        try:
            with closing(self._load()) as session:
                self._serve(session)
        except BaseException as error:
            self.error = error
            with self._changed:
                self.state = "failed"
            self._on_failed(error)
        self._abandon()

    def _serve(self, session: Session) -> None:
        self._free = list(range(session.num_sequences))
        with self._changed:
            stopped = self._deadline is not None  # while it was loading
            self.state = "stopping" if stopped else "ok"
        if not stopped:
            self._on_ready()
        while self._wait():
            while self._calls:
                self._calls.popleft()(session)
            self._admit(session)
            for running in [running for running in self._running if running.generation.cancelled]:
                self._metrics.count("generations_cancelled")
                self._release(running)
            prepared = [running for running in self._running if running.continuation is not None]
            for running in [running for running in self._running if running.continuation is None]:
                self._prepare(session, running)
            self._draw(session, prepared)

    def _wait(self) -> bool:
        """Sleeps until there is something to do; false when the thread shall end."""
        with self._changed:
            while not (self._calls or self._waiting or self._running or self._deadline is not None):
                self._changed.wait()
            if self._deadline is None:
                return True
            return bool(self._calls or self._waiting or self._running) and time.monotonic() < self._deadline

    def _admit(self, session: Session) -> None:
        while self._free and (generation := self._next_waiting()):
            # `max` takes the first of equals: where nothing fits, the sequence that has been free for longest.
            sequence = max(self._free, key=lambda s: _num_kept(session, generation.tokens, s))
            self._free.remove(sequence)
            self._running.append(_Running(generation, sequence, steps_of(session, generation, sequence)))

    def _next_waiting(self) -> Generation | None:
        """One generation of the request whose turn it is; its others wait behind those of the other requests."""
        with self._changed:
            if not self._waiting:
                return None
            group = self._waiting.popleft()
            generation = group.popleft()
            if group:
                self._waiting.append(group)
            return generation

    def _prepare(self, session: Session, running: _Running) -> None:
        """One step up to the first token, or behind the last."""
        try:
            step = next(running.steps, Finished())
        except InactivePatchError:
            raise  # nothing that this runtime says can be trusted any more
        except Exception as error:
            step = Finished(error)
        if isinstance(step, Continuation):
            running.continuation = step
            self._draw(session, [running])
        elif step is not None:
            self._tell(running, step)

    def _draw(self, session: Session, prepared: Sequence[_Running]) -> None:
        """A token of each."""
        if not prepared:
            return
        events: Sequence[Piece | Exception]
        try:
            events = session.advance([r.continuation for r in prepared if r.continuation is not None])
        except InactivePatchError:
            raise
        except Exception as error:
            events = [error] * len(prepared)
        for running, event in zip(prepared, events, strict=True):
            self._tell(running, Finished(event) if isinstance(event, Exception) else event)
            if isinstance(event, Piece) and event.finish_reason:
                running.continuation = None

    def _tell(self, running: _Running, event: Event) -> None:
        _count(self._metrics, event, len(running.generation.tokens))
        _emit(running.generation, event)
        if isinstance(event, Finished):
            self._release(running)

    def _release(self, running: _Running) -> None:
        running.steps.close()  # type: ignore[attr-defined]  # a generator
        self._running.remove(running)
        self._free.append(running.sequence)

    def _abandon(self) -> None:
        """Tells everyone who still waits that nothing comes."""
        with self._changed:
            if self.state != "failed":
                self.state = "stopping"
            left = [g for group in self._waiting for g in group] + [r.generation for r in self._running]
            self._waiting.clear()
            self._running.clear()
            calls, self._calls = self._calls, deque()
        end = Refusal(
            503,
            "the server is stopping" if self.error is None else "the server has failed",
            code=f"server_{self.state}",
        )
        for generation in left:
            _emit(generation, Finished(end))
        for call in calls:
            call(_Gone(end))  # type: ignore[arg-type]


class _Gone:
    """Stands in for the runtime after the end: every call gets the error."""

    def __init__(self, error: EdgepatchError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> object:
        raise self._error


def _num_kept(session: Session, tokens: Sequence[int], sequence: int) -> int:
    """What a prompt finds in a sequence; nothing where it would throw away most of what another conversation left."""
    cached = session.sequences.num_cached(tokens, sequence)
    return cached if 2 * cached > len(session.sequences.evaluated(sequence)) else 0


def _count(metrics: Metrics, event: Event, num_tokens: int) -> None:
    """Counts what an event of a generation with so many tokens in its prompt stands for."""
    if isinstance(event, Started):
        metrics.count("prompt_tokens", num_tokens)
        metrics.count("cached_prompt_tokens", event.cached_tokens)
    elif isinstance(event, Piece):
        metrics.count("completion_tokens")
    elif isinstance(event, Finished):
        metrics.count("generations_failed" if event.error else "generations_finished")


def _emit(generation: Generation, event: Event) -> None:
    try:
        generation.emit(event)
    except RuntimeError:  # the event loop of the listener is closed
        generation.cancelled = True
