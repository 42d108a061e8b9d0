"""A child that is kept, for work that is too short for a process of its own."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from importlib import import_module
from typing import Any

from edgepatch.processes import Outcome, answered, command_line, death, end, harden, read_answer

START_DEADLINE_S = 10.0
WAITING = 6
"""So much longer than its computing time may a kept child take on a busy machine."""

WARM_UP_BYTES = 2**16  # fits into a socket's buffer
LENGTH_BYTES = 8


class KeptChild:
    """A child that answers one request after the other, for work that is too short for a process of its own.

    It is started when it is first needed and ends with this process. One that dies, or does not answer in time, is ended, and the next
    request gets a fresh one; so no request can harm another.

    Args:
        target: "package.module:function", a function of one JSON value that returns one.
        memory_bytes: what the child may take beyond what it has when it is ready; without a limit where the system knows none.
    """

    def __init__(self, target: str, memory_bytes: int) -> None:
        self._target, self._memory_bytes = target, memory_bytes
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._unread: list[float] = []  # deadlines of answers that nobody waits for, and that come first
        self._owner = 0

    def prepare(self, request: Any, deadline_s: float) -> None:
        """Starts the child, where there is none, with a request whose answer nobody waits for; what is wrong with it is told later."""
        data = _frame(request, deadline_s)
        with self._lock, suppress(OSError):
            self._start()
            if len(data) <= WARM_UP_BYTES and len(self._unread) < 2:  # more would block until the child reads
                self._send(data, deadline_s)
                self._unread.append(deadline_s)

    def ask(self, request: Any, deadline_s: float) -> Outcome:
        """The answer to a request.

        Args:
            request: a JSON value.
            deadline_s: computing time, so that a busy machine refuses nothing; the child is ended when it has used that up, or has
                not answered after ``WAITING`` times as long.

        Raises:
            ValueError, TypeError, RecursionError: the request is no JSON value.
        """
        data = _frame(request, deadline_s)
        with self._lock:
            try:
                return self._ask(data, deadline_s)
            except BaseException:  # Ctrl-C: an answer that comes now would be taken for that to the next request
                self._drop()
                raise

    def _ask(self, data: bytes, deadline_s: float) -> Outcome:
        try:
            self._make_ready()
            self._send(data, deadline_s)
            return read_answer(self._receive(WAITING * deadline_s))
        except TimeoutError:
            self._drop()
            return Outcome(failure=f"did not answer within {WAITING * deadline_s:g} s", is_late=True)
        except OSError as error:
            code = self._drop()
            if code == -signal.SIGPROF:
                return Outcome(
                    failure=f"used more than {deadline_s:g} s of computing time", signal="SIGPROF", is_late=True
                )
            return death(code) if code < 0 else Outcome(failure=f"could not be asked: {error.strerror or error}")

    def _make_ready(self) -> None:
        """A child that has answered everything before; where one cannot, a request of old is to blame, and a fresh one is started."""
        for may_fail in (True, False):
            self._start()
            try:
                while self._unread:
                    self._receive(WAITING * self._unread[0])
                    del self._unread[0]
                return
            except OSError:
                if not may_fail:
                    raise
                self._drop()

    def _start(self) -> None:
        if self._owner != os.getpid():  # a fork of the process that started it has a child of its own
            self._child = self._channel = None
        if self._child is not None and self._child.poll() is None:
            return
        self._drop()
        module, _, function = self._target.partition(":")
        ours, theirs = socket.socketpair()
        try:
            self._child = subprocess.Popen(
                command_line(
                    f"from edgepatch.processes import kept; kept.serve({module!r}, {function!r}, {theirs.fileno()}, {self._memory_bytes})"
                ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONFAULTHANDLER": ""},
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel, self._owner, self._unread = ours, os.getpid(), [START_DEADLINE_S]  # it says when it is ready
        atexit.unregister(self.close)
        atexit.register(self.close)

    def _send(self, data: bytes, deadline_s: float) -> None:
        assert self._channel is not None  # _start
        self._channel.settimeout(deadline_s)
        self._channel.sendall(data)

    def _receive(self, deadline_s: float) -> bytes:
        assert self._channel is not None  # _start
        return _receive(self._channel, deadline_s)

    def _drop(self) -> int:
        """Ends the child; the code with which it ended by itself, where it did."""
        code = 0
        if self._channel is not None:
            self._channel.close()
        if self._child is not None and self._owner == os.getpid():
            with suppress(subprocess.TimeoutExpired):
                code = self._child.wait(0.2)  # one that has just died is not yet known to be dead
            end(self._child)
        self._child, self._channel, self._unread = None, None, []
        return code

    def close(self) -> None:
        """Ends the child; a later request starts another."""
        with self._lock:
            self._drop()


def _frame(request: Any, deadline_s: float) -> bytes:
    data = json.dumps({"request": request, "deadline_s": deadline_s}).encode()
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def _receive(channel: socket.socket, deadline_s: float | None) -> bytes:
    """The next message.

    Raises:
        TimeoutError: it was not there in time.
        OSError: the other side is gone.
    """
    end = None if deadline_s is None else time.monotonic() + deadline_s
    length = int.from_bytes(_receive_exactly(channel, LENGTH_BYTES, end), "big")
    return _receive_exactly(channel, length, end)


def _receive_exactly(channel: socket.socket, size: int, end: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        left_s = None if end is None else end - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise TimeoutError
        channel.settimeout(left_s)
        part = channel.recv(min(size - len(data), 2**20))
        if not part:
            raise ConnectionResetError("the child is gone")
        data += part
    return bytes(data)


def serve(module: str, function: str, descriptor: int, memory_bytes: int) -> None:
    """In a kept child: answers requests until the parent is gone."""
    harden()
    channel = socket.socket(fileno=descriptor)
    work = getattr(import_module(module), function)
    _limit_memory(memory_bytes)
    document = b'{"value": null}'
    with suppress(OSError):
        while True:
            channel.settimeout(None)
            channel.sendall(len(document).to_bytes(LENGTH_BYTES, "big") + document)
            request = json.loads(_receive(channel, None))
            # The system ends it, whatever a library is doing; also where the parent has died meanwhile.
            signal.setitimer(signal.ITIMER_PROF, request["deadline_s"])
            signal.setitimer(signal.ITIMER_REAL, WAITING * request["deadline_s"] + 1)
            document = answered(work, request["request"])
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    os._exit(0)


def _limit_memory(more_bytes: int) -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + more_bytes, taken + more_bytes))
