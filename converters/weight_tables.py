"""The weights of a Transformers folder as their files' headers describe them, read without a model library.

A safetensors file starts with a table of its tensors. It comes from strangers, so every number in it is checked against the
file's size before anything is read by it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.peft.adapters import PICKLES
from edgepatch.errors import InputError
from edgepatch.files import strict_json

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file; the format's own limit."""

MAX_INDEX_BYTES = 100_000_000
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
VECTOR_TYPES: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
        path: the file.
        dtype: its type by the format's name ("BF16").
        shape: its dimensions.
        offset: of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_values(self) -> int:
        """Of all dimensions."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return (self.num_values * DTYPE_BITS[self.dtype] + 7) // 8

    def vector(self) -> NDArray[np.float32]:
        """The values of a one-dimensional float tensor, as float32.

        Raises:
            InputError: it is of another type.
        """
        kind = VECTOR_TYPES.get(self.dtype)
        if kind is None:
            raise InputError(f"{self.path}: expected a vector of floats, found {self.dtype}")
        values = np.fromfile(self.path, kind, self.num_values, offset=self.offset)
        if self.dtype == "BF16":  # the upper half of a float32
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


@dataclass(frozen=True)
class TensorTable:
    """The table at the start of a safetensors file.

    Attributes:
        tensors: by their names.
        metadata: what else the file says.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_table(path: Path) -> TensorTable:
    """The table of a safetensors file, every tensor of it within the file.

    Raises:
        InputError: the file cannot be read, is damaged or truncated, or is no safetensors file.
    """
    hint = "download the model again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(MAX_HEADER_BYTES, max(size - 8, 0)):
                raise InputError(f"{path} is damaged, truncated or no safetensors file: it has no header", hint)
            entries = strict_json.loads(file.read(length))
        if not isinstance(entries, dict):
            raise ValueError("its header is no object")
        metadata = entries.pop("__metadata__", None) or {}
        tensors = {name: _tensor(path, entry, 8 + length, size, name) for name, entry in entries.items()}
        return TensorTable(tensors, {str(key): str(value) for key, value in metadata.items()})
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged or truncated: {error}", hint) from None


def _tensor(path: Path, entry: Any, start: int, size: int, name: str) -> StoredTensor:
    first, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPE_BITS:
        raise ValueError(f"tensor {name:.80}: unknown type {entry['dtype']!r:.40}")
    if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
        raise ValueError(f"tensor {name:.80}: its shape or place is no whole number")
    tensor = StoredTensor(path, entry["dtype"], shape, start + first)
    if end - first != tensor.num_bytes or start + end > size:
        raise ValueError(f"tensor {name:.80} of shape {list(shape)} does not lie in the file")
    return tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those of its index, the single one, or all that are there.

    Raises:
        InputError: there are none, one of the index is missing, or the index is damaged; or an adapter lies among them, which
            libraries apply without a word.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise InputError(
            f"{folder}: {ADAPTER_FILE} lies beside the weights: Transformers would apply that adapter unasked, and other libraries not",
            hint="move the adapter's files out of the folder, or merge it into the weights",
        )
    if (folder / INDEX_FILE).is_file():
        names = _indexed(folder / INDEX_FILE)
    else:
        single = (folder / SINGLE_FILE).is_file()
        names = [SINGLE_FILE] if single else sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        pickle_note = f", found the pickle {pickles[0]}, which can run code when it is read" if pickles else ""
        raise InputError(f"no safetensors weights in {folder}{pickle_note}", hint="save the model with safetensors")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: expected {len(names)} files of weights, {len(missing)} are missing, the first {missing[0]}",
            hint="download the model again",
        )
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    value = strict_json.read_json(index, MAX_INDEX_BYTES, what="index of weights", hint="download the model again")
    try:
        names = sorted(set(value["weight_map"].values()))
        if not all(Path(name).name == name for name in names):
            raise ValueError("it names files outside of its folder")
        return names
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged: {error}", hint="download the model again") from None


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder.

    Raises:
        InputError: as ``weight_files`` and ``read_table``.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        tensors |= read_table(path).tensors
    return tensors
