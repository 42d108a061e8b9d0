"""Nested values with tensors in them as one safetensors file: the tensors as such, all else as JSON in its metadata. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically

KEY = "edgepatch.tree"
TENSOR, TUPLE, ITEMS = "$tensor", "$tuple", "$items"


def write_tree(path: Path, tree: Any) -> None:
    """Writes a tree of objects, lists, tuples, numbers, texts and PyTorch tensors.

    Raises:
        InputError: the file cannot be written; the old one stays.
    """
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    plain = _plain(tree, tensors)
    write_atomically(path, save(tensors, {KEY: json.dumps(plain)}))


def read_tree(path: Path, device: str = "cpu") -> Any:
    """The tree in a file that ``write_tree`` wrote.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        InputError: it cannot be read, or is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=device) as file:
            plain = json.loads((file.metadata() or {})[KEY])
            return _tree(plain, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: expected a tree of tensors, found something damaged or else: {error}") from None


def _plain(value: Any, tensors: dict[str, Any]) -> Any:
    """A value as JSON knows it; tensors go aside, each under a number."""
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone().contiguous()  # two names of one memory are two tensors
        return {TENSOR: name}
    if isinstance(value, dict):
        return {ITEMS: [[_plain(key, tensors), _plain(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {TUPLE: [_plain(entry, tensors) for entry in value]}
    return [_plain(entry, tensors) for entry in value] if isinstance(value, list) else value


def _tree(value: Any, tensors: dict[str, Any]) -> Any:
    """The inverse of ``_plain``."""
    if isinstance(value, list):
        return [_tree(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == TENSOR:
        return tensors[content]
    if kind == TUPLE:
        return tuple(_tree(entry, tensors) for entry in content)
    if kind != ITEMS:
        raise ValueError(f"unknown kind {kind!r}")
    return {_tree(key, tensors): _tree(entry, tensors) for key, entry in content}
