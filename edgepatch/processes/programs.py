"""Other programs as children: run to their end, or running beside this process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgepatch.processes import end, ending


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        output: what it wrote to standard output; "" where that was shown.
        complaints: what it wrote to standard error; "" where that was shown.
        failure: as the end of a sentence that starts with its name ("failed (exit code 1): ..."); "" where it did its work.
    """

    output: str = ""
    complaints: str = ""
    failure: str = ""


def run_program(
    command: Sequence[object],
    *,
    deadline_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | str | None = None,
    is_shown: bool = False,
) -> Ended:
    """Runs a program to its end. Whatever ends the wait early (Ctrl-C, a signal that raises) ends it and what it started.

    Args:
        command: the program and its arguments.
        deadline_s: it is ended when it has not done its work by then.
        environment: variables set for it, besides those of this process.
        folder: in which it runs.
        is_shown: whether its output goes where that of this process goes.
    """
    pipe = None if is_shown else subprocess.PIPE
    try:
        child = _start(command, pipe, pipe, environment, folder)
    except OSError as error:
        return Ended(failure=f"could not be started: {error.strerror}")
    try:
        output, complaints = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return Ended(failure=f"was not done within {deadline_s:g} s")
    finally:
        end(child)
    printed, complained = ((data or b"").decode("utf-8", "replace") for data in (output, complaints))
    words = "its output is above" if is_shown else complained
    return Ended(printed, complained, ending(child.returncode, words).failure if child.returncode else "")


@contextmanager
def running(command: Sequence[object], log: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs beside this process and is ended with the block.

    Args:
        command: the program and its arguments.
        log: gets all that it writes; without one that is thrown away.

    Raises:
        OSError: it could not be started.
    """
    child = _start(command, log or subprocess.DEVNULL, subprocess.STDOUT, None, None)
    try:
        yield child
    finally:
        end(child)


def _start(
    command: Sequence[object],
    output: IO[bytes] | int | None,
    complaints: int | None,
    environment: Mapping[str, str] | None,
    folder: Path | str | None,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=complaints,
        env={**os.environ, **(environment or {})},
        cwd=folder,
        start_new_session=True,  # Ctrl-C reaches this process, which ends the child
    )
