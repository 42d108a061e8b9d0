"""The machine: CPU, memory, GPUs."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from edgepatch.processes.programs import run_program

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
    done = run_program(query, deadline_s=20)
    rows = [re.split(r",\s*", line.strip()) for line in done.output.splitlines()] if not done.failure else []
    return [
        {"name": row[0], "memory_bytes": int(row[1]) * 2**20 if row[1].isdigit() else None, "driver": row[2]}
        for row in rows
        if len(row) == 3
    ]
