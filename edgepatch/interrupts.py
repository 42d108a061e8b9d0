"""Signals that end work: SIGINT (Ctrl-C), SIGTERM (a supervisor) and SIGHUP (the terminal went) take one orderly way out.

They raise ``Stopped``, a ``KeyboardInterrupt``, so whatever cleans up behind Ctrl-C cleans up behind all of them.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FrameType
from typing import Any, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RETRY_S = 0.05

Function = TypeVar("Function", bound=Callable[..., Any])
_callbacks: set[CodeType] = set()


class Stopped(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def orderly() -> Iterator[None]:
    """Within it the signals raise ``Stopped``, and end nothing by themselves.

    A signal that this process was told to ignore stays ignored: nohup means it, and so does a shell that starts a job in the
    background, where Ctrl-C is for the job in front.
    """
    mine = [number for number in SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        mine = []
    before = {number: signal.signal(number, _stop) for number in mine}
    hook = sys.unraisablehook
    if mine:
        sys.unraisablehook = partial(_raised_again, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    if _is_in_callback(frame):
        _retry(number)
        return
    raise Stopped(number)


def _raised_again(before: Callable[[Any], object], lost: Any) -> None:
    """For what is raised where it can go no further: in a destructor, or in a callback of a weak reference, as imports have."""
    if isinstance(lost.exc_value, Stopped):
        _retry(lost.exc_value.exit_code - 128)
    else:
        before(lost)


def _retry(number: int) -> None:
    retry = threading.Timer(RETRY_S, _send_again, (number,))
    retry.daemon = True
    retry.start()


def _send_again(number: int) -> None:
    """To the main thread itself, so that a call that waits there ends."""
    main = threading.main_thread().ident
    if main is not None and signal.getsignal(number) is _stop:
        signal.pthread_kill(main, number)


def called_from_c(function: Function) -> Function:
    """Marks a function that a C library calls: what is raised there goes no further, so a signal waits until it has returned."""
    _callbacks.add(function.__code__)
    return function


def _is_in_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _callbacks:
            return True
        frame = frame.f_back
    return False


@contextmanager
def held_back() -> Iterator[None]:
    """What is inside happens as a whole: a signal that arrives meanwhile acts at the end. For work of milliseconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if waiting:
            held[signal.Signals(waiting[0])](waiting[0], None)
