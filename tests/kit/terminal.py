"""A terminal of its own for ``edgepatch chat``, as a person has it."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time


class Terminal:
    """``chat`` at a terminal of its own, as a person has it; ends with the block."""

    def __init__(self, *arguments: object) -> None:
        self._screen, self._seen = "", 0
        self._process, self._file = pty.fork()
        if self._process == 0:
            environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "edgepatch.cli", "chat", *map(str, arguments)]
            os.execve(sys.executable, command, environment)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        os.close(self._file)

    def until(self, text: str, timeout_s: float = 60) -> None:
        """Reads the screen until a text stands there behind the last one."""
        end = time.monotonic() + timeout_s
        while (place := self._screen.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"expected {text!r}, found {self._screen!r}"
            if select.select([self._file], [], [], 0.2)[0]:
                self._screen += os.read(self._file, 65536).decode("utf-8", "replace")
        self._seen = place + len(text)

    def until_more(self, timeout_s: float = 60) -> None:
        """Reads the screen until anything stands there behind the last text."""
        end = time.monotonic() + timeout_s
        while len(self._screen) == self._seen:
            assert time.monotonic() < end, f"expected more, found {self._screen!r}"
            if select.select([self._file], [], [], 0.2)[0]:
                self._screen += os.read(self._file, 65536).decode("utf-8", "replace")

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def code(self, timeout_s: float = 60) -> int:
        """The exit code."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with contextlib.suppress(OSError):  # the other side is gone
                if select.select([self._file], [], [], 0.1)[0]:
                    os.read(self._file, 65536)
            ended, status = os.waitpid(self._process, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"chat did not end; found {self._screen!r}")
