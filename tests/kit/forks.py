"""Commands of edgepatch, and exporters of ONNX, in processes of their own that find imported what takes longer than their work.

They are forks of a process that has imported it and done nothing else: with their own signals, exit code, files and children. What
matters at the start of a program is tested with programs that are started.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from edgepatch.processes import ending, programs
from edgepatch.processes.programs import Ended

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "peft",
        "safetensors.torch",
        "gguf",
        "pydantic",
        "edgepatch.cli",
        "edgepatch.inspection.models",
        "edgepatch.runtimes",
        "edgepatch.store.device",
        "edgepatch.training.patching",
        "onnxruntime_genai.models.builder",
    ]
)
COMMAND = "from edgepatch import cli\ncli.main()\n"
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
socket.send_fds(connection, [b"."], [0, 1, 2])
connection.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode())
connection.shutdown(socket.SHUT_WR)
replies = connection.makefile()
pid = int(replies.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(replies.readline())
sys.exit(code if code >= 0 else 128 - code)
"""


class Streams:
    """Open files of this process, on their way to become the standard streams of another."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.descriptors = descriptors

    def __getstate__(self) -> list[Any]:
        return [DupFd(descriptor) for descriptor in self.descriptors]

    def __setstate__(self, sent: list[Any]) -> None:
        self.descriptors = [descriptor.detach() for descriptor in sent]


def started(
    program: str, arguments: list[str], env: Mapping[str, str], folder: str, descriptors: Sequence[int]
) -> BaseProcess:
    """A process that runs a program with these arguments, environment, working folder and standard streams."""
    process = CONTEXT.Process(target=_run, args=(program, arguments, dict(env), folder, Streams(descriptors)))
    process.start()
    return process


def _run(program: str, arguments: list[str], env: dict[str, str], folder: str, streams: Streams) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, descriptor in enumerate(streams.descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # The streams of this process knew other files, and whether one can seek there.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["edgepatch", *arguments]
    try:
        exec(program, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out


class Workers:
    """``multiprocessing`` for modules that start workers of their own: each is a fork, with the environment of the process that starts it."""

    Pipe = staticmethod(CONTEXT.Pipe)

    def get_context(self, _: str) -> Workers:
        return self

    def Process(self, *, target: Callable[..., None], args: tuple[object, ...], daemon: bool) -> BaseProcess:
        return CONTEXT.Process(target=_work, args=(dict(os.environ), target, args), daemon=daemon)


def _work(env: dict[str, str], target: Callable[..., None], args: tuple[object, ...]) -> None:
    os.environ.clear()
    os.environ.update(env)
    target(*args)


class Fork:
    """A command of edgepatch that runs, with what tests use of ``subprocess.Popen``."""

    def __init__(
        self,
        *arguments: object,
        before: str = "",
        program: str = COMMAND,
        env: Mapping[str, str] = os.environ,
        folder: Path | None = None,
    ) -> None:
        """Starts the command.

        Args:
            arguments: behind ``edgepatch``.
            before: source that runs in the process before the command.
            program: another source than that of the command.
            env: the environment of the process.
            folder: the folder it works in; this process's own when ``None``.
        """
        self.args = list(map(str, arguments))
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 - closed in __exit__
        with open(os.devnull) as nothing:
            streams = (nothing.fileno(), self._output.fileno(), self._errors.fileno())
            self._process = started(before + program, self.args, env, str(folder or Path.cwd()), streams)

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """Minus the signal, where one ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr), whole."""
        self.wait(timeout)
        for file in (self._output, self._errors):
            file.seek(0)
        return self._output.read().decode(), self._errors.read().decode()

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self._process.pid:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *raised: object) -> None:
        if any(raised):
            self.kill()
        self._process.join()
        self._output.close()
        self._errors.close()


def run_program(
    command: Sequence[object], *, environment: Mapping[str, str] | None = None, folder: Path | str | None = None
) -> Ended:
    """``edgepatch.processes.programs.run_program``, as exporters call it: a program of this Python is a fork, any other is started."""
    python, option, program, *arguments = map(str, command)
    if (python, option) != (sys.executable, "-c"):
        return programs.run_program(command, environment=environment, folder=folder)
    env = {**os.environ, **(environment or {})}
    with Fork(*arguments, program=program, env=env, folder=Path(folder) if folder else None) as fork:
        output, complaints = fork.communicate()
    code = fork.returncode or 0
    return programs.Ended(output, complaints, ending(code, complaints).failure if code else "")


@contextmanager
def on_the_path(folder: Path) -> Iterator[Path]:
    """A folder with an ``edgepatch`` that shells find there; each call of it is a fork.

    Args:
        folder: a new folder.
    """
    folder.mkdir()
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:  # addresses are short
        address = f"{short}/socket"
        listener.bind(address)
        listener.listen()
        (folder / "edgepatch").write_text(CLIENT.format(python=sys.executable, address=address))
        (folder / "edgepatch").chmod(0o755)
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        yield folder
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


def _serve(connection: socket.socket) -> None:
    with connection:
        _, descriptors, *_ = socket.recv_fds(connection, 1, 3)
        arguments, env, folder = json.loads(connection.makefile("rb").read())
        process = started(COMMAND, arguments, env, folder, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(f"{process.pid}\n".encode())
        process.join()
        connection.sendall(f"{process.exitcode}\n".encode())
