"""What this machine brings: versions, CPU, memory, GPU, and what each model library really computes.

A library is asked in children (``probing``), because one that was built for another CPU, or by a compiler that got it wrong, ends its
process; ``llamacpp_types``, ``onnx_types`` and ``torch_types`` are what the children run.
"""

from __future__ import annotations

import platform
from typing import Any

import edgepatch
from edgepatch import compilation
from edgepatch.converters.first_contact import remembered_notes
from edgepatch.defaults import chosen_settings
from edgepatch.doctor.machine import cpu, gpus, memory
from edgepatch.doctor.packages import extras, packages
from edgepatch.doctor.probing import LIBRARIES, probe_libraries
from edgepatch.errors import InputError, install_command

PURPOSES = {
    "run GGUF models": "gguf",
    "run ONNX models": "onnx",
    "serve models": "serve",
    "train patches": "train",
    "convert models": "convert",
    "measure with lm-eval": "harness",
}
"""What people want to do -> the extra that does it."""

__all__ = [
    "cpu",
    "examine",
    "extras",
    "gpus",
    "members",
    "missing",
    "packages",
    "remedy",
    "unused_instructions",
    "verdicts",
]


def examine() -> dict[str, Any]:
    """The whole report, as JSON values."""
    libraries, weight_types = probe_libraries()
    return {
        "edgepatch": edgepatch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "memory": memory(),
        "gpus": gpus(),
        "packages": packages(),
        "libraries": libraries,
        "weight_types": weight_types,
        "limited_models": remembered_notes(),
        "settings": chosen_settings(),
    }


def verdicts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(purpose, "ready" or what is missing and the command that mends it), of everything in ``PURPOSES``.

    Args:
        report: of ``examine``.
    """
    rows = []
    for purpose, extra in PURPOSES.items():
        names = missing(report, extra)
        rows.append((purpose, f"needs {', '.join(names)}: `{remedy(report, extra)}`" if names else "ready"))
    return rows


def missing(report: dict[str, Any], extra: str) -> list[str]:
    """What keeps an extra from working: packages that are not installed, libraries that do not load, weight types that they get wrong.

    A type that llama.cpp runs only without extra buffers works.

    Args:
        report: of ``examine``.
        extra: e.g. "gguf".

    Raises:
        InputError: there is no such extra.
    """
    return _absent(report, extra) + _broken(report, extra)


def _absent(report: dict[str, Any], extra: str) -> list[str]:
    return [row["name"] for row in report["packages"] if row["name"] in members(extra) and row["version"] is None]


def _broken(report: dict[str, Any], extra: str) -> list[str]:
    needed = [name for name, library in LIBRARIES.items() if library.distributions & members(extra)]
    errors = {name: report["libraries"].get(name, {}).get("error") for name in needed}
    rows = [row for row in report["weight_types"] if row["library"] in needed and not row["works"]]
    return [f"{name} ({error})" for name, error in errors.items() if error] + [
        f"{row['library']} with {row['type']} weights ({row['note']})" for row in rows
    ]


def members(extra: str) -> set[str]:
    """The distributions that an extra installs.

    Raises:
        InputError: there is no such extra.
    """
    distributions = extras()
    if extra not in distributions:
        raise InputError(f"no extra is named {extra}", hint=f"the extras are {', '.join(sorted(distributions))}")
    return distributions[extra]


def unused_instructions(report: dict[str, Any]) -> list[str]:
    """Instructions of this CPU that the installed llama.cpp was compiled without, and is several times slower for.

    Args:
        report: of ``examine``.
    """
    system_info = report["libraries"].get("llama_cpp", {}).get("system_info")
    if system_info is None:
        return []
    usable = [name for name, (_, flag) in compilation.INSTRUCTIONS.items() if flag in report["cpu"]["features"]]
    return [name for name in usable if f"{name} = 1" not in system_info]


def remedy(report: dict[str, Any], extra: str) -> str:
    """The command that mends what ``missing`` names; llama.cpp, where it does not compute, has to be compiled for this machine."""
    broken = _broken(report, extra)
    is_compiled = any(name.startswith("llama_cpp") for name in broken) and not _absent(report, extra)
    return compilation.COMMAND if is_compiled else install_command(extra, is_again=bool(broken))
