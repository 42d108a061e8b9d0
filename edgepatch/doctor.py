"""What this machine brings: versions, CPU, memory, GPU, and whether each model library really loads.

A native library is loaded in a process of its own (``python -m edgepatch.doctor llama_cpp``): one that was built for another
CPU dies of an illegal instruction, and the doctor must live to say so.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import edgepatch
from edgepatch.defaults import chosen_settings
from edgepatch.errors import InputError

PROBE_TIMEOUT_S = 120
PROBED_PACKAGES = {
    "llama_cpp": {"llama-cpp-python"},
    "onnxruntime": {"onnxruntime", "onnxruntime-gpu"},
    "torch": {"torch"},
}
"""Import name -> distributions that provide it."""

CPU_FEATURES = {
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512vbmi",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "asimddp",
    "asimdhp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
}
"""Flags of /proc/cpuinfo that the kernels of llama.cpp and ONNX Runtime make use of."""


def extras() -> dict[str, set[str]]:
    """Extra -> the distributions that it installs, from the metadata of the installed edgepatch.

    Raises:
        InputError: edgepatch runs from a checkout that is not installed.
    """
    try:
        lines = importlib.metadata.requires("edgepatch") or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError("edgepatch is not installed, only on the path", hint="pip install -e .") from None
    direct: dict[str, set[str]] = {}
    for line in lines:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        requirement = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line)
        if extra and requirement:
            name, nested = requirement.groups()
            parts = {f"[{part}]" for part in nested.split(",")} if name == "edgepatch" else {name}
            direct.setdefault(extra.group(1), set()).update(parts)
    return {name: _expanded(name, direct) for name in direct}


def _expanded(extra: str, direct: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    for name in direct.get(extra, set()):
        found |= _expanded(name[1:-1], direct) if name.startswith("[") else {name}
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> list[dict[str, Any]]:
    """Every optional package: version or ``None``, and the extras that install it, the narrowest first."""
    by_extra = sorted(extras().items(), key=lambda item: (len(item[1]), item[0]))
    names = sorted(set().union(*(members for _, members in by_extra)))
    rows = []
    for name in names:
        homes = [extra for extra, members in by_extra if name in members]
        rows.append(
            {
                "name": name,
                "version": _version(name),
                "extras": homes,
                "install": f"pip install 'edgepatch[{homes[0]}]'",
            }
        )
    return rows


def cpu() -> dict[str, Any]:
    """Model name, features, and the cores that this process may use."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    model = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", text, re.MULTILINE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model.group(1) if model else platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "features": sorted(CPU_FEATURES & set(flags.group(1).split())) if flags else [],
    }


def memory() -> dict[str, int | None]:
    """Bytes of memory, and of memory that can be had now (``None`` where the system does not say)."""
    info = Path("/proc/meminfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return {
        f"{name}_bytes": kib[key] * 1024 if key in kib else None
        for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))
    }


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs that the driver reports; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [re.split(r",\s*", line.strip()) for line in output.splitlines()]
    return [
        {"name": row[0], "memory_bytes": int(row[1]) * 2**20 if row[1].isdigit() else None, "driver": row[2]}
        for row in rows
        if len(row) == 3
    ]


def _probe_llama_cpp() -> dict[str, Any]:
    from llama_cpp import llama_cpp

    return {
        "system_info": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "gpu_offload": bool(llama_cpp.llama_supports_gpu_offload()),
        "session_version": llama_cpp.LLAMA_SESSION_VERSION,
        "state_version": llama_cpp.LLAMA_STATE_SEQ_VERSION,
    }


def _probe_onnxruntime() -> dict[str, Any]:
    import onnxruntime

    return {"providers": onnxruntime.get_available_providers()}


def _probe_torch() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(count)],
        "num_threads": torch.get_num_threads(),
    }


PROBES = {"llama_cpp": _probe_llama_cpp, "onnxruntime": _probe_onnxruntime, "torch": _probe_torch}


def _start_probe(name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgepatch.doctor", name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish_probe(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        output, errors = process.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"did not load within {PROBE_TIMEOUT_S} s"}
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {"error": f"died of {name} while loading; install it again so that it is built for this CPU"}
    if process.returncode:
        return {"error": (errors.strip().splitlines() or ["failed without a message"])[-1]}
    return dict(json.loads(output.splitlines()[-1]))


def libraries() -> dict[str, dict[str, Any]]:
    """Import name -> what an installed model library reports of itself, or ``{"error": ...}`` where it does not load."""
    installed = [name for name, homes in PROBED_PACKAGES.items() if any(_version(home) for home in homes)]
    processes = {name: _start_probe(name) for name in installed}
    return {name: _finish_probe(process) for name, process in processes.items()}


def examine() -> dict[str, Any]:
    """The whole report, as JSON values."""
    return {
        "edgepatch": edgepatch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "memory": memory(),
        "gpus": gpus(),
        "packages": packages(),
        "libraries": libraries(),
        "settings": chosen_settings(),
    }


def missing(report: dict[str, Any], extra: str) -> list[str]:
    """What keeps an extra from working: packages that are not installed, libraries that do not load.

    Args:
        report: of ``examine``.
        extra: e.g. "gguf".

    Raises:
        InputError: there is no such extra.
    """
    known = extras()
    if extra not in known:
        raise InputError(f"no extra is named {extra}", hint=f"the extras are {', '.join(sorted(known))}")
    absent = [row["name"] for row in report["packages"] if row["name"] in known[extra] and row["version"] is None]
    broken = [
        f"{name} ({report['libraries'][name]['error']})"
        for name, homes in PROBED_PACKAGES.items()
        if homes & known[extra] and "error" in report["libraries"].get(name, {})
    ]
    return absent + broken


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
