"""Safetensors files written a piece of a tensor at a time: a checkpoint may be larger than memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgepatch.progress import Progress

DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
"""Type of the weights -> its name in safetensors, and bytes of a value."""

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that is to be written.

    Attributes:
        shape: its dimensions.
        pieces: gives its values in pieces that follow one another in memory.
    """

    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[np.float32]]]


def write_weights(folder: Path, tensors: Mapping[str, CheckpointTensor], dtype: str, progress: Progress) -> None:
    """Writes ``model.safetensors``, or several shards and their index.

    Args:
        folder: gets the files.
        tensors: name in the checkpoint -> tensor.
        dtype: one of ``DTYPES``.
        progress: told how many bytes are written.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    size = DTYPES[dtype][1]
    shards = _shards(tensors, size)
    total, done = sum(prod(t.shape) for t in tensors.values()) * size, 0
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as stream:
            _write_header(stream, {name: tensors[name].shape for name in names}, dtype)
            for name in names:
                for piece in tensors[name].pieces():
                    done += stream.write(_in_dtype(piece, dtype))
                    progress("dequantize", done, total)
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        document = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, CheckpointTensor], size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        num_bytes = prod(tensor.shape) * size
        if shards[-1] and filled + num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards


def _write_header(stream: BinaryIO, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    name_of_type, size = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + prod(shape) * size
        entries[name] = {"dtype": name_of_type, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)


def _in_dtype(piece: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "float32":
        return np.ascontiguousarray(piece, "<f4").tobytes()
    import torch

    rounded = torch.from_numpy(np.array(piece).reshape(-1)).to(
        torch.bfloat16
    )  # a copy: pieces may lie in a read-only buffer
    return rounded.view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
