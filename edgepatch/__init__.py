"""Safety policy patches for quantized language models on edge devices.

The names below are loaded on first use, so that ``import edgepatch`` is quick and needs no model library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "EdgepatchError",
    "KVSeed",
    "ModelSpec",
    "Patch",
    "Sampling",
    "SoftPrompt",
    "__version__",
    "load",
    "read_patch",
    "write_patch",
]

if TYPE_CHECKING:
    from edgepatch.decoding.sampling import Sampling
    from edgepatch.errors import EdgepatchError
    from edgepatch.patch.file import Patch, read_patch, write_patch
    from edgepatch.runtimes import load_runtime as load
    from edgepatch.tensors import KVSeed, ModelSpec, SoftPrompt

_HOMES = {
    "EdgepatchError": ("edgepatch.errors", "EdgepatchError"),
    "KVSeed": ("edgepatch.tensors", "KVSeed"),
    "ModelSpec": ("edgepatch.tensors", "ModelSpec"),
    "Patch": ("edgepatch.patch.file", "Patch"),
    "Sampling": ("edgepatch.decoding.sampling", "Sampling"),
    "SoftPrompt": ("edgepatch.tensors", "SoftPrompt"),
    "load": ("edgepatch.runtimes", "load_runtime"),
    "read_patch": ("edgepatch.patch.file", "read_patch"),
    "write_patch": ("edgepatch.patch.file", "write_patch"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgepatch' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
