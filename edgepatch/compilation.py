"""llama-cpp-python, compiled for this machine: with flags that its compiler can be trusted with, once, and kept.

Registries have no wheels of it, and what pip compiles by itself may end the process at the first token: GCC before 13.3 (seen with 11.3
and 12.2) declares eight bytes of the 64 that configure the tiles of AMX as what ``ldtilecfg`` reads, and drops the stores of the rest.
So AMX stays in a build only where a program like llama.cpp's, made by the same compiler, is seen to configure the tiles right; elsewhere
it is compiled out, and the kernels for repacked weights take its place.

``python -m edgepatch.compilation`` compiles it where need be and installs it into the environment of that Python. It runs before anything
else is installed, so it needs the standard library and pip alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgepatch.errors import EdgepatchError, InputError, MissingExtraError

DISTRIBUTION = "llama-cpp-python"
COMMAND = "python -m edgepatch.compilation"
WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
"""They win over ``-march=native`` in any order."""

NATIVE = ("-march=native", "-mcpu=native")
SHAPING = (
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "CPPFLAGS",
    "LDFLAGS",
    "CMAKE_ARGS",
    "CMAKE_GENERATOR",
    "CUDACXX",
    "NVCC_CCBIN",
)
"""Variables that change what a build makes."""

LDTILECFG = re.compile(rb"\xc4[\x02\x22\x42\x62\x82\xa2\xc2\xe2]\x78\x49")
EPOCH_SECONDS = "315532800"  # the oldest time that a zip file can tell
PROBE_TIMEOUT_S = 60
PIP_TIMEOUT_S = 3600
ERROR_LINES = 4

TILE_PROBE = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

struct Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {0};
    uint16_t row_bytes[16] = {0};
    uint8_t rows[16] = {0};
};

// As llama.cpp writes it: a value on the stack that nothing but the instruction reads.
inline void configure() {
    static thread_local bool done = false;
    if (done) return;
    alignas(64) Configuration tiles = {};
    tiles.palette = 1;
    tiles.start_row = 0;
    tiles.rows[0] = 8;  tiles.row_bytes[0] = 64;
    tiles.rows[1] = 8;  tiles.row_bytes[1] = 64;
    tiles.rows[2] = 16; tiles.row_bytes[2] = 32;
    tiles.rows[3] = 16; tiles.row_bytes[3] = 32;
    tiles.rows[4] = 16; tiles.row_bytes[4] = 64;
    tiles.rows[5] = 16; tiles.row_bytes[5] = 64;
    tiles.rows[6] = 16; tiles.row_bytes[6] = 64;
    tiles.rows[7] = 16; tiles.row_bytes[7] = 64;
    _tile_loadconfig(&tiles);
    done = true;
}

__attribute__((noinline)) void fill_stack() {
    volatile unsigned char stack[4096];
    for (int i = 0; i < 4096; ++i) stack[i] = 0xAA;
}

__attribute__((noinline)) void work() { configure(); }

int main() {
    const int request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return 2;
    fill_stack();
    work();
    alignas(64) unsigned char loaded[64];
    __asm__ volatile("sttilecfg %0" : "=m"(loaded));
    unsigned char expected[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        expected[16 + 2 * tile] = tile == 2 || tile == 3 ? 32 : 64;
        expected[48 + tile] = tile < 2 ? 8 : 16;
    }
    return std::memcmp(loaded, expected, 64) ? 1 : 0;
}
"""


# What the compiler can be trusted with.


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler on this machine.

    Attributes:
        command: as words.
        native: every macro that it defines when it compiles for this CPU; "" where there is no compiler. They name its version, the
            instructions that it will use and the CPU that it tunes for.
        flags: what llama.cpp has to be compiled with, for C and for C++.
    """

    command: tuple[str, ...]
    native: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        version = re.search(r'^#define __VERSION__ "(.*)"$', self.native, re.MULTILINE)
        return f"{self.command[0]} ({version[1] if version else 'unknown version'})"


@cache
def toolchain() -> Toolchain:
    """The compiler that CMake will take, and what it can be trusted with; the answer is kept for this process."""
    command = _compiler()
    own = tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
    natives = (_run([*command, *own, flag, "-dM", "-E", "-x", "c++", os.devnull]) for flag in NATIVE)
    native = next((output for output in natives if output), "")
    has_amx = "#define __AMX_INT8__ 1" in native
    return Toolchain(command, native, WITHOUT_AMX if has_amx and not configures_tiles([*command, *own]) else ())


def _compiler() -> tuple[str, ...]:
    """What ``CMAKE_ARGS`` names, else ``CXX``, else c++."""
    named = [word.split("=", 1)[1] for word in shlex.split(os.environ.get("CMAKE_ARGS", "")) if _names_compiler(word)]
    return (named[-1],) if named else tuple(shlex.split(os.environ.get("CXX", ""))) or ("c++",)


def _names_compiler(word: str) -> bool:
    return re.match(r"-DCMAKE_CXX_COMPILER(:\w+)?=", word) is not None


def _run(command: Sequence[str]) -> str:
    """Standard output; "" where the command fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROBE_TIMEOUT_S).stdout
    return ""


def configures_tiles(command: Sequence[str]) -> bool:
    """Whether a program like llama.cpp's, made by a compiler for this CPU, hands all of its configuration to the tiles of AMX.

    Args:
        command: the C++ compiler, with options.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "tiles.cpp"), Path(folder, "tiles")
        source.write_text(TILE_PROBE, encoding="utf-8")
        options = ["-O3", "-DNDEBUG", "-std=gnu++17", NATIVE[0]]
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                [*command, *options, str(source), "-o", str(program)],
                capture_output=True,
                check=True,
                timeout=PROBE_TIMEOUT_S,
            )
            return subprocess.run([str(program)], capture_output=True, timeout=PROBE_TIMEOUT_S).returncode == 0
    return False


def build_environment() -> dict[str, str]:
    """This process's variables, with the flags that llama.cpp has to be compiled with."""
    flags = " ".join(toolchain().flags)
    own = {name: f"{os.environ.get(name, '')} {flags}".strip() for name in ("CFLAGS", "CXXFLAGS")}
    return {**os.environ, "SOURCE_DATE_EPOCH": EPOCH_SECONDS, **(own if flags else {})}


def uses_amx(library: Path) -> bool:
    """Whether a shared library holds the instruction that configures the tiles of AMX."""
    return LDTILECFG.search(library.read_bytes()) is not None


# The wheel.


def wheel(version: str | None, folder: Path | None = None) -> Path:
    """A wheel of llama-cpp-python for this machine.

    It is compiled where none is kept from an earlier build of the same version by the same compiler for the same CPU with the same
    variables. pip's own cache is not used: it tells none of these apart. Where an index that pip is set up with has a wheel, pip takes that.

    Args:
        version: the newest when ``None``.
        folder: where wheels are kept; by default in the user's cache.

    Raises:
        EdgepatchError: pip failed; its last lines are told.
        InputError: the folder cannot be written.
        MissingExtraError: pip is not installed.
    """
    folder = folder or cache_folder()
    kept = sorted((folder / _key(version)).glob("*.whl")) if version else []
    return kept[0] if kept else _compile(version, folder)


def cache_folder() -> Path:
    """Of wheels: in ``EDGEPATCH_CACHE_DIR``, by default the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EDGEPATCH_CACHE_DIR") or Path(user, "edgepatch")) / "wheels"


def _key(version: str) -> str:
    """Of everything that tells one build from another. The wheel fits every Python; its library fits one CPU and one C library."""
    compiler = toolchain()
    facts = {
        "version": version,
        "compiler": [*compiler.command, *compiler.flags],
        "native": compiler.native,
        "machine": [platform.system(), platform.machine(), *platform.libc_ver()],
        "variables": {name: os.environ.get(name, "") for name in SHAPING},
    }
    return f"{version}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"


def _compile(version: str | None, folder: Path) -> Path:
    requirement = f"{DISTRIBUTION}=={version}" if version else DISTRIBUTION
    compiler = toolchain()
    without = " without AMX, whose tiles this compiler does not configure" if compiler.flags else ""
    print(f"note: compiling {requirement} with {compiler.name}{without}; it takes some minutes, once", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as work:
            pip("wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", work, requirement, hint=_compiler_hint())
            made = next(Path(work).glob("*.whl"))
            target = folder / _key(made.name.split("-")[1])
            target.mkdir(exist_ok=True)
            return made.replace(target / made.name)
    except OSError as error:
        hint = "free space, or name another folder with EDGEPATCH_CACHE_DIR"
        raise InputError(f"cannot write {folder}: {error.strerror or error}", hint) from error


def pip(*arguments: str, hint: str = "") -> None:
    """Runs the pip of this Python, with what ``build_environment`` says.

    Args:
        arguments: of pip.
        hint: what to do where it fails.

    Raises:
        EdgepatchError: it failed; its last lines are told.
        MissingExtraError: it is not installed.
    """
    if not importlib.util.find_spec("pip"):
        raise MissingExtraError("pip", "all")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(
        command, env=build_environment(), capture_output=True, text=True, errors="replace", timeout=PIP_TIMEOUT_S
    )
    if done.returncode:
        lines = [line.strip(" │") for line in done.stderr.splitlines()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        told = re.sub(r" \(from versions: [^)]*\)", "", "; ".join(errors[-ERROR_LINES:]))
        raise EdgepatchError(f"pip {arguments[0]}: {told}", hint=hint)


def _compiler_hint() -> str:
    lacking = [tool for tool in ("cc", toolchain().command[0]) if not shutil.which(tool)]
    return f"{', '.join(lacking)} is missing (Debian, Ubuntu: apt install build-essential)" if lacking else ""


# The environment.


def installed_version() -> str | None:
    """Of llama-cpp-python in this environment."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(DISTRIBUTION)
    return None


def installed_libraries() -> list[Path]:
    """llama.cpp's kernels for CPUs in this environment."""
    with suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files(DISTRIBUTION) or []
        return [Path(str(file.locate())) for file in files if re.match(r"libggml-cpu.*\.so$", file.name)]
    return []


def install(version: str | None) -> bool:
    """Installs llama-cpp-python, unless it is there already and holds nothing that this compiler gets wrong.

    Args:
        version: the one that is installed when ``None``, else the newest.

    Returns:
        Whether anything was installed.

    Raises:
        EdgepatchError: pip failed.
        InputError: the wheel cannot be kept.
        MissingExtraError: pip is not installed.
    """
    present = installed_version()
    is_suspect = bool(toolchain().flags) and any(
        uses_amx(library) for library in installed_libraries() if library.is_file()
    )
    if present is not None and present == (version or present) and not is_suspect:
        return False
    pip("install", "--no-deps", "--force-reinstall", str(wheel(version or present)))
    return True


def pinned_version(constraints: Path) -> str | None:
    """Of llama-cpp-python in a constraints file of pip.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        text = constraints.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read {constraints}: {error}", hint="name a constraints file of pip") from None
    found = re.search(rf"^{DISTRIBUTION}\s*==\s*([^\s;#]+)", text, re.MULTILINE)
    return found[1] if found else None


def main() -> int:
    """Installs it for this machine."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Compile llama-cpp-python for this machine and install it."
    )
    parser.add_argument("--constraint", type=Path, help="a constraints file of pip that names the version")
    parser.add_argument("--wheel", action="store_true", help="install nothing; print where the wheel is")
    arguments = parser.parse_args()
    try:
        version = pinned_version(arguments.constraint) if arguments.constraint else None
        if arguments.wheel:
            print(wheel(version or installed_version()))
            return 0
        changed = install(version)
    except EdgepatchError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    print(f"{DISTRIBUTION} {installed_version()}: {'installed' if changed else 'kept'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
