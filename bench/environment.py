"""What figures depend on: the processor, the system, and the versions of the libraries that compute."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "llama-cpp-python", "gguf", "onnxruntime", "onnxruntime-genai", "numpy")


def environment() -> dict[str, Any]:
    """Python, platform, processor, and the version of each package."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu_name(), **versions}


def cpu_name() -> str:
    """The processor as the operating system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
