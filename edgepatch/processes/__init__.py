"""Work that may end its process, done in a child: what a C library does with a file, a CPU or a text that it has never met.

A child is a fresh interpreter, never a fork: threads and locks of a library that is loaded already do not survive one. It answers over a
pipe of its own, so nothing that a library prints can be taken for an answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from edgepatch import errors
from edgepatch.errors import EdgepatchError

ERROR_CHARACTERS = 400
FIRST_TO_GO = "1000"  # of -1000 to 1000: where memory runs out, the system ends the child and not its parent


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        value: what it answered; ``None`` where it did not.
        failure: why there is no answer, as the end of a sentence that starts with "it": "died of SIGSEGV"; "" where there is one.
        signal: the name of the signal that ended it, else "".
        error: what the work itself raised on purpose; it counts as an answer, and its words are the child's.
        is_late: whether it had no answer in the time that it was given.
    """

    value: Any = None
    failure: str = ""
    signal: str = ""
    error: EdgepatchError | None = None
    is_late: bool = False


def run_apart(
    target: str,
    request: Any,
    *,
    deadline_s: float,
    environment: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
) -> Outcome:
    """Calls a function in a child process.

    Whatever ends the wait early (Ctrl-C, a signal that raises) ends the child too, and a child never outlives its parent.

    Args:
        target: "package.module:function", a function of one JSON value that returns one.
        request: the value.
        deadline_s: the child is ended when it has not answered by then.
        environment: variables set for the child, besides those of this process.
        pass_fds: open files that the child shall have under the same numbers.
    """
    module, _, function = target.partition(":")
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            command_line(f"from edgepatch import processes; processes.answer({module!r}, {function!r}, {writing})"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(writing, *pass_fds),
            env={**os.environ, **(environment or {}), "PYTHONFAULTHANDLER": ""},
            start_new_session=True,  # Ctrl-C reaches the parent, which decides
        )
    except OSError as error:
        os.close(reading)
        return Outcome(failure=f"could not be started: {error.strerror}")
    finally:
        os.close(writing)
    answer: list[bytes] = []
    reader = threading.Thread(target=lambda: answer.append(_read_all(reading)), daemon=True)
    reader.start()
    try:
        _, printed = child.communicate(json.dumps(request).encode(), timeout=deadline_s)
    except subprocess.TimeoutExpired:
        return Outcome(failure=f"did not answer within {deadline_s:.0f} s", is_late=True)
    finally:
        end(child)
        reader.join()
    return _outcome(child.returncode, answer[0], printed)


def command_line(program: str) -> list[str]:
    """A Python that runs a program of a few words."""
    # The child finds what this process would find, and nothing in the folder where it happens to run.
    paths = [path or os.getcwd() for path in sys.path]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}; {program}"]


def _read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as pipe:
        return pipe.read()


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child and whatever it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def ending(code: int, printed: str) -> Outcome:
    """How a child ended that gave no answer."""
    if code < 0:
        return death(code)
    lines = [line for line in printed.splitlines() if line.strip()] or ["it said nothing"]
    return Outcome(failure=f"failed (exit code {code}): {lines[-1].strip()[:ERROR_CHARACTERS]}")


def _outcome(code: int, answer: bytes, printed: bytes) -> Outcome:
    if code == 0:
        with suppress(ValueError, TypeError, KeyError):
            return read_answer(answer)
    return ending(code, printed.decode("utf-8", "replace"))


def read_answer(answer: bytes) -> Outcome:
    document = json.loads(answer)
    return Outcome(error=_rebuilt(**document["error"])) if "error" in document else Outcome(document["value"])


def death(code: int) -> Outcome:
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return Outcome(failure=f"died of {name}", signal=name)


def _rebuilt(kind: str, message: str, hint: str) -> EdgepatchError:
    """An error of the child; a class that is made of other values than a message becomes the one that it descends from."""
    class_ = getattr(errors, kind, EdgepatchError)
    if not (isinstance(class_, type) and issubclass(class_, EdgepatchError)):
        class_ = EdgepatchError
    return EdgepatchError(message, hint) if class_.__init__ is not EdgepatchError.__init__ else class_(message, hint)


def answer(module: str, function: str, descriptor: int) -> None:
    """In the child: calls the function with the request on standard input and writes what it returns."""
    harden()
    _die_with_parent()
    request = json.load(sys.stdin)
    document = answered(getattr(import_module(module), function), request)
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(document)
    # A library that dies while it tears itself down has answered already.
    os._exit(0)


def answered(work: Callable[[Any], Any], request: Any) -> bytes:
    try:
        document = {"value": work(request)}
    except EdgepatchError as error:
        document = {"error": {"kind": type(error).__name__, "message": str(error), "hint": error.hint}}
    return json.dumps(document).encode()


def harden() -> None:
    """No core files, and first to be ended where memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(FIRST_TO_GO)


def _die_with_parent() -> None:
    """The kernel ends this process together with the *thread* that started it, which waits for the answer."""
    with suppress(OSError, AttributeError):
        import ctypes

        parent_death = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL, 0, 0, 0)
