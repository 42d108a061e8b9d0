"""What meets on a machine, told by digests: its CPU, a C library as it is installed, the content of files.

Content is hashed once. Its digest is remembered under what the system says of the file (place, size, times, inode), so that a later
start asks for a digest in microseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.files.strict_json import read_json

CACHE_VARIABLE = "EDGEPATCH_CACHE_DIR"
SETTLED_S = 4.0
"""Age from which a file's times tell every change: FAT, on the cards of small devices, counts in steps of two seconds."""

CHUNK_BYTES = 4 * 2**20
CPUINFO_BYTES = 64 * 1024
"""Of /proc/cpuinfo: enough for all kinds of cores of a small machine, and a server's cores are of one kind."""

CPU_FACTS = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa", "uarch")
IS_CODE = re.compile(r"\.(py|pyd|dll|dylib|so(\.\d+)*)$")
VARIABLES = ("GGML_", "LLAMA_", "ORT_", "CUDA_", "LD_PRELOAD", "LD_LIBRARY_PATH")
BESIDE_THE_LIBRARY = ("LLAMA_API", "LLAMA_ARG")  # settings of llama.cpp's programs, and a secret among them


def cache_folder() -> Path:
    """Where measurements are kept: ``EDGEPATCH_CACHE_DIR``, or the user's cache folder."""
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder)
    from platformdirs import user_cache_path

    return user_cache_path("edgepatch", appauthor=False)


def digest_of(facts: Any) -> str:
    """SHA-256 of a JSON value; what JSON does not know counts as its text."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def read_memory(file: Path) -> dict[str, Any]:
    """A remembered JSON object; empty where there is none, or none that can be read."""
    try:
        return read_json(file)
    except InputError:
        return {}


def keep_memory(file: Path, facts: dict[str, Any]) -> None:
    """Remembers a JSON object, where the device can: on one that cannot be written to it is found out each time."""
    from edgepatch.files.writing import write_atomically  # a child, whose start is paid for, keeps nothing

    with contextlib.suppress(InputError):
        write_atomically(file, json.dumps(facts).encode())


def signature(files: Sequence[Path]) -> list[list[Any]]:
    """What the system says of files, of which something changes when their content does.

    Raises:
        InputError: one is not there.
    """
    try:
        return [_signature(file) for file in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}", hint="check the path") from error


def _signature(file: Path) -> list[Any]:
    status = os.stat(file)
    return [
        os.path.abspath(file),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
        status.st_dev,
    ]


def remembered_content(signed: list[list[Any]]) -> str | None:
    """The content's digest of files with this signature, where they were hashed before."""
    digest = read_memory(_content_file(signed)).get("sha256")
    return digest if isinstance(digest, str) else None


def hash_content(files: Sequence[Path], signed: list[list[Any]], ended: threading.Event | None = None) -> str:
    """SHA-256 over the content of files, read from end to end; remembered where nobody has just written to them.

    Args:
        files: the files.
        signed: their signature from before.
        ended: set from another thread, it ends the reading; the digest is then of no use.

    Raises:
        InputError: one cannot be read.
    """
    newest = max(times for entry in signed for times in entry[2:4]) / 1e9
    settled = time.time() - newest > SETTLED_S
    whole = hashlib.sha256()
    try:
        for file, (_, size, *_) in zip(files, signed, strict=True):
            whole.update(f"{size} bytes:".encode())
            with file.open("rb") as opened:
                while (ended is None or not ended.is_set()) and (part := opened.read(CHUNK_BYTES)):
                    whole.update(part)
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}", hint="check the path") from error
    digest = whole.hexdigest()
    if settled and (ended is None or not ended.is_set()) and signature(files) == signed:
        keep_memory(_content_file(signed), {"sha256": digest})
    return digest


def _content_file(signed: list[list[Any]]) -> Path:
    return cache_folder() / "digests" / f"{digest_of(signed)}.json"


def content(files: Sequence[Path]) -> str:
    """SHA-256 over the content of files: remembered, or read now."""
    signed = signature(files)
    return remembered_content(signed) or hash_content(files, signed)


def cpu_facts() -> list[str]:
    """The CPU's model and everything that it can do."""
    try:
        with open("/proc/cpuinfo", "rb") as file:
            lines = set(file.read(CPUINFO_BYTES).decode("utf-8", "replace").splitlines()[:-1])
    except OSError:
        lines = set()
    facts = sorted(line for line in lines if line.startswith(CPU_FACTS))
    return facts or [platform.machine(), platform.processor()]


def library_files(package: str) -> list[Path]:
    """Code and shared objects of an installed package; empty where it is not installed. Nothing of it is loaded."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    folders = [root, root / "lib", root / "capi", Path(os.environ.get("LLAMA_CPP_LIB_PATH", root))]
    names = {name for folder in set(folders) if folder.is_dir() for name in map(str, folder.iterdir())}
    return [Path(name) for name in sorted(names) if IS_CODE.search(name)]


def machine(package: str) -> str:
    """Digest of a C library's build, the CPU that it runs on, and the variables that it reads."""
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)}
    read = {name: value for name, value in variables.items() if not name.startswith(BESIDE_THE_LIBRARY)}
    files = library_files(package)
    return digest_of([_library_content(package) if files else "", cpu_facts(), read])


@cache
def _library_content(package: str) -> str:
    """Once a process: what is loaded stays what it was."""
    return content(library_files(package))
