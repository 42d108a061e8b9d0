"""An unmodified llama-server, built from the sources that llama-cpp-python brings, on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from edgepatch import compilation
from edgepatch.bench.checkout import ROOT
from edgepatch.bench.served import free_port
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.llama_server.client import LlamaServer
from edgepatch.processes.programs import run_program, running

FOLDER = ROOT / "out" / "llama-server"
VARIABLE = "EDGEPATCH_LLAMA_SERVER"
PACKAGE = "llama_cpp_python"
CMAKE_FLAGS = [
    "-G",
    "Ninja",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
]
START_TIMEOUT_S = 60


def build_server(folder: Path) -> Path:
    """llama-server of the installed llama-cpp-python's own llama.cpp; what is already compiled alike is not compiled again.

    Args:
        folder: for sources and build.

    Raises:
        EdgepatchError: a step failed; its output is on the terminal.
    """
    binary = folder / "build" / "bin" / "llama-server"
    sources = fetch_sources(folder) / "vendor" / "llama.cpp"
    # CMake itself does not read this variable, and without its options the server would be compiled without AVX.
    options = shlex.split(compilation.build_environment()["CMAKE_ARGS"])
    # A build of an older version, or one with other options, is brought up to date; ninja sees what has changed.
    run_command(["cmake", "--fresh", "-S", sources, "-B", folder / "build", *CMAKE_FLAGS, *options])
    run_command(["ninja", "-C", folder / "build", "llama-server"])
    return binary


def instructions_of(binary: Path) -> str:
    """What a llama-server says of the instructions that it was compiled with, as in "AVX2 = 1 | FMA = 1".

    Raises:
        InputError: it says nothing, or does without fast ones that this CPU has: any other server would look good beside it.
    """
    # It tells this before it looks for a model, and then ends because there is none.
    command = [binary, "--log-verbosity", "4", "--model", binary.with_name("no-model.gguf"), "--port", str(free_port())]
    done = run_program(command, deadline_s=START_TIMEOUT_S)
    told = re.search(r"system_info:.*?\|\s*(.*?)[\s|]*$", done.output + done.complaints, re.MULTILINE)
    if told is None:
        words = done.failure[:200] if not binary.is_file() else "a program that tells no system_info"
        raise InputError(f"{binary}: expected llama-server, found {words}", "edgepatch bench llama-server builds one")
    if lacking := compilation.left_out(told[1]):
        hint = "compile it with -DGGML_NATIVE=ON, or let `edgepatch bench llama-server` build it"
        raise InputError(f"{binary}: compiled without {', '.join(lacking)}, which this CPU has", hint)
    return told[1]


def fetch_sources(folder: Path) -> Path:
    """The unpacked source distribution of the installed llama-cpp-python; llama.cpp is in its ``vendor`` folder.

    Args:
        folder: for the archive and what it holds; what is already there is used.

    Raises:
        EdgepatchError: it cannot be downloaded.
    """
    name = f"{PACKAGE}-{version(PACKAGE)}"
    sources = folder / name
    if not sources.is_dir():
        archives = folder / "sdist"
        if not (archives / f"{name}.tar.gz").is_file():
            requirement = f"{PACKAGE}=={version(PACKAGE)}"
            run_command(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--no-binary",
                    PACKAGE,
                    "--no-deps",
                    "--dest",
                    archives,
                    requirement,
                ]
            )
        temporary = folder / f".{name}"
        with tarfile.open(archives / f"{name}.tar.gz") as archive:
            archive.extractall(temporary, filter="data")
        (temporary / name).rename(sources)
        temporary.rmdir()
    return sources


def run_command(command: Sequence[str | Path]) -> None:
    if shutil.which(str(command[0])) is None:
        raise InputError(f"{command[0]} is missing", hint="install cmake and ninja")
    done = run_program(command, environment=compilation.build_environment(), is_shown=True)
    if done.failure:
        raise EdgepatchError(f"{Path(command[0]).name} {done.failure}")


@contextlib.contextmanager
def running_server(binary: Path, flags: Sequence[str], log: Path) -> Iterator[LlamaServer]:
    """A llama-server on a free port of loopback, killed at the end.

    Args:
        binary: llama-server.
        flags: its arguments but host and port.
        log: gets its output.

    Raises:
        EdgepatchError: it does not come up.
    """
    port = free_port()
    command = [str(binary), *flags, "--host", "127.0.0.1", "--port", str(port), "--threads", "1", "--no-warmup"]
    with log.open("ab") as output, running(command, output) as process:
        server = LlamaServer(f"http://127.0.0.1:{port}")
        _wait(server, process, log)
        yield server


def _wait(server: LlamaServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(InputError):
            if server.get("/health").ok:
                return
        time.sleep(0.05)
    raise EdgepatchError(f"llama-server does not come up: {log.read_text(errors='replace')[-2000:]}")


def find_server(folder: Path) -> Path:
    """The binary that the environment names, else the one built in a folder, built now if need be."""
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise InputError(f"{VARIABLE}: there is no {named}", hint="unset it to build llama-server")
    return Path(named) if named else build_server(folder)
