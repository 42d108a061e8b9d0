"""llama-cpp-python, compiled for this machine: with flags that its compiler can be trusted with, once, and kept.

Registries have no wheels of it, and what pip compiles by itself may end the process at the first token (``compilers`` says why).

``python -m edgepatch.compilation`` compiles it where need be and installs it into the environment of that Python. It runs before anything
else is installed, so it needs the standard library and pip alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from edgepatch.compilation.compilers import toolchain, uses_amx
from edgepatch.errors import EdgepatchError, InputError, MissingExtraError
from edgepatch.files.writing import hint_behind
from edgepatch.processes.programs import run_program

DISTRIBUTION = "llama-cpp-python"
COMMAND = "python -m edgepatch.compilation"
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

EPOCH_SECONDS = "315532800"  # the oldest time that a zip file can tell: the same build gives the same wheel
OPTIONS = "-DGGML_NATIVE=ON"
"""llama.cpp's own default, but not where ``SOURCE_DATE_EPOCH`` is set: there it compiles without AVX and all that came after it."""

INSTRUCTIONS = {"AVX2": ("__AVX2__", "avx2"), "DOTPROD": ("__ARM_FEATURE_DOTPROD", "asimddp")}
"""What llama.cpp calls instructions that make it several times faster -> the compiler's macro, the flag in /proc/cpuinfo."""

PIP_TIMEOUT_S = 3600
IMPORT_TIMEOUT_S = 120
ERROR_LINES = 4


def build_environment() -> dict[str, str]:
    """This process's variables, with the flags and options that llama.cpp has to be compiled with; the caller's options win."""
    flags = " ".join(toolchain().flags)
    own = {name: f"{os.environ.get(name, '')} {flags}".strip() for name in ("CFLAGS", "CXXFLAGS")}
    options = f"{OPTIONS} {os.environ.get('CMAKE_ARGS', '')}".strip()
    return {**os.environ, "SOURCE_DATE_EPOCH": EPOCH_SECONDS, "CMAKE_ARGS": options, **(own if flags else {})}


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
        "options": OPTIONS,
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
            built = next(Path(work).glob("*.whl"))
            target = folder / _key(built.name.split("-")[1])
            target.mkdir(exist_ok=True)
            return built.replace(target / built.name)
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
    done = run_program(command, environment=build_environment(), deadline_s=PIP_TIMEOUT_S)
    if done.failure:
        lines = [line.strip(" │") for line in done.complaints.splitlines()] or [done.failure]
        # Behind "ERROR: Exception:" stands a traceback, whose last line is the reason.
        errors = [line for line in lines if line.startswith("ERROR") and line != "ERROR: Exception:"] or lines[-1:]
        complaint = re.sub(r" \(from versions: [^)]*\)", "", "; ".join(errors[-ERROR_LINES:]))
        raise EdgepatchError(f"pip {arguments[0]}: {complaint}", hint=hint_behind(done.complaints, hint))


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


def left_out(system_info: str) -> list[str]:
    """Fast instructions that this CPU has and this compiler knows, and that a build of llama.cpp was made without.

    Args:
        system_info: what the build says of itself, as in "AVX2 = 1 | FMA = 1".
    """
    usable = [name for name, (macro, _) in INSTRUCTIONS.items() if f"#define {macro} 1" in toolchain().native]
    return [name for name in usable if f"{name} = 1" not in system_info]


def lacks_instructions() -> bool:
    """Whether the library in this environment was compiled without some of them."""
    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    done = run_program([sys.executable, "-c", code], deadline_s=IMPORT_TIMEOUT_S)
    return not done.failure and bool(left_out(done.output))


def install(version: str | None) -> bool:
    """Installs llama-cpp-python, unless what is there holds nothing that this compiler gets wrong and uses this CPU's instructions.

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
    if present is not None and present == (version or present) and not is_suspect and not lacks_instructions():
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
    pin = re.search(rf"^{DISTRIBUTION}\s*==\s*([^\s;#]+)", text, re.MULTILINE)
    return pin[1] if pin else None
