"""The header of a GGUF file: its metadata, and where its tensors lie.

Read by a small strict parser: llama.cpp ends the process on some damaged files, and the gguf package's reader can run out of
memory on a damaged length.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a GGUF file.

    Attributes:
        shape: dimensions in numpy's order.
        ggml_type: number of its type.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset: int

    @property
    def num_bytes(self) -> int:
        """Of its values; 0 for a type that is newer than ``BLOCK_SIZES``."""
        values, size = BLOCK_SIZES.get(self.ggml_type, (1, 0))
        return prod(self.shape) // values * size


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor table of a GGUF file.

    Attributes:
        path: the file.
        metadata: key -> string, number, list of strings, or numpy array of numbers.
        tensors: name -> where it lies; all lie within the file.
        spans: key of the metadata -> where its entry begins and ends in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_parts(self) -> int:
        """Of a split model, of which this file is one; 1 for a whole one."""
        count = self.metadata.get("split.count", 1)
        return count if isinstance(count, int) else 1

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata["general.architecture"])

    def find(self, name: str) -> Any:
        """The architecture's own value ``name`` ("rope.scaling.type"); ``None`` where the file has none."""
        return self.metadata.get(f"{self.architecture}.{name}")

    def setting(self, name: str, default: float | None = None) -> float:
        """The architecture's own number ``name`` ("block_count"), which must be positive.

        Raises:
            InputError: the file has no such number and there is no default, or it differs between layers.
        """
        value = self.find(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self._refuse(name, "a positive number", value)
        return value

    def per_layer(self, name: str, num_layers: int, default: int | None = None) -> list[int]:
        """The architecture's own count ``name`` ("attention.head_count_kv") in every layer; 0 where a layer has none.

        Raises:
            InputError: it is negative, 0 everywhere, of another kind, or given for fewer layers.
        """
        value = self.find(name)
        if not isinstance(value, np.ndarray):
            count = self.setting(name, default)
            if count != int(count):
                raise self._refuse(name, "a count", value)
            return [int(count)] * num_layers
        if value.dtype.kind not in "iu" or len(value) < num_layers or value.min() < 0 or not value.any():
            raise self._refuse(name, f"{num_layers} counts", value.tolist()[:8])
        return [int(v) for v in value[:num_layers]]

    def _refuse(self, name: str, expected: str, actual: object) -> InputError:
        key = f"{self.architecture}.{name}"
        return InputError(f"{self.path}: {key}: expected {expected}, found {actual}", hint="get the model again")

    def vector(self, name: str) -> NDArray[np.float32]:
        """A one-dimensional float tensor, as float32.

        Raises:
            InputError: the tensor is quantized.
        """
        info = self.tensors[name]
        if info.ggml_type not in (0, 1):
            raise InputError(f"{self.path}: {name}: expected F32 or F16, found type {info.ggml_type}")
        dtype = np.dtype("<f4" if info.ggml_type == 0 else "<f2")
        return np.fromfile(self.path, dtype, prod(info.shape), offset=info.offset).astype(np.float32)


LENGTH = struct.Struct("<Q")

BLOCK_SIZES: dict[int, tuple[int, int]] = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    9: (32, 40),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    15: (256, 292),
    16: (256, 66),
    17: (256, 74),
    18: (256, 98),
    19: (256, 50),
    20: (32, 18),
    21: (256, 110),
    22: (256, 82),
    23: (256, 136),
    24: (1, 1),
    25: (1, 2),
    26: (1, 4),
    27: (1, 8),
    28: (1, 8),
    29: (256, 56),
    30: (1, 2),
    34: (256, 54),
    35: (256, 66),
    39: (32, 17),
    40: (64, 36),
    41: (128, 18),
}
"""ggml type -> (values per block, bytes per block): ``gguf.GGML_QUANT_SIZES``, whose package takes longer to import than a header to read."""


class _Cursor:
    """Reads a GGUF header value by value; every read is checked against the end of the file."""

    SCALARS = "BbHhIif?sAQqd"  # by GGUF value type; "s" string, "A" array

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} bytes expected at {self.position}, the file ends at {len(self.data)}")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        """A name, or a value that is text; llama.cpp reads both only as far as a NUL, and would see another one than we do."""
        text = self.take(self.number("Q")).decode("utf-8")
        if "\0" in text:
            raise ValueError(f"a NUL in the text {text[:40]!r}")
        return text

    def value(self) -> Any:
        code = self._code()
        if code != "A":
            return self.string() if code == "s" else self.number(code)
        code, count = self._code(), self.number("Q")
        if code == "s":
            return self._strings(count)
        if code == "A":
            raise ValueError("an array of arrays")
        dtype = np.dtype("<" + code)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _strings(self, count: int) -> list[str]:
        """As ``string``, many times: vocabularies are the most of a header, and every start of a program waits for them."""
        data, position, end, pieces = self.data, self.position, len(self.data), []
        for _ in range(count):
            start = position + LENGTH.size
            position = start + (LENGTH.unpack_from(data, position)[0] if start <= end else 0)
            if position > end or start > end:
                raise ValueError(f"a string expected at {start}, the file ends at {end}")
            pieces.append(data[start:position])
        # Decoded at once, in two thirds of the time: no character of UTF-8 reaches over the NUL between two texts.
        strings = b"\0".join(pieces).decode("utf-8").split("\0") if pieces else []
        if len(strings) != count:
            raise ValueError("a NUL in a text of a list")
        self.position = position
        return strings

    def _code(self) -> str:
        kind = self.number("I")
        if kind >= len(self.SCALARS):
            raise ValueError(f"unknown value type {kind}")
        return self.SCALARS[kind]


def _read_tensors(cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.number("I")
        if name in tensors or not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r} appears twice or has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        tensors[name] = TensorInfo(shape, cursor.number("I"), cursor.number("Q"))
    return tensors


def _place_tensors(cursor: _Cursor, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """Turns offsets within the data into offsets in the file, and checks that every tensor lies inside."""
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment}")
    start = -(-cursor.position // alignment) * alignment
    placed = {}
    for name, info in tensors.items():
        values = BLOCK_SIZES.get(info.ggml_type, (1, 0))[0]
        end = start + info.offset + info.num_bytes  # of a newer type only the start is checked
        if info.shape[-1] % values or info.offset % alignment or min(info.shape) < 1 or end > len(cursor.data):
            raise ValueError(f"tensor {name} of shape {info.shape} does not lie in the file")
        placed[name] = TensorInfo(info.shape, info.ggml_type, start + info.offset)
    return placed


def parse_header(path: Path, data: bytes | mmap.mmap) -> GGUFHeader:
    """The header of a GGUF file whose content is at hand.

    Raises:
        ValueError, TypeError: it is truncated, damaged, or no GGUF file.
    """
    cursor = _Cursor(data)
    magic, version = cursor.take(4), cursor.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(
            f"not a little-endian GGUF file of version 2 or 3: it starts with {magic!r}, version {version}"
        )
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(num_keys):
        start, key = cursor.position, cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key} appears twice")
        metadata[key] = cursor.value()
        spans[key] = (start, cursor.position)
    tensors = _read_tensors(cursor, num_tensors)
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("it does not say its architecture")
    placed = _place_tensors(cursor, tensors, metadata.get("general.alignment", 32))
    return GGUFHeader(path, metadata, placed, spans)


def read_header(path: Path) -> GGUFHeader:
    """Metadata and tensor table of a GGUF model, every length checked against the file's.

    Raises:
        InputError: the file is missing, truncated, damaged, or no GGUF model.
    """
    header = read_any_header(path)
    _require_model(header)
    return header


def _require_model(header: GGUFHeader) -> None:
    """Refuses sound files that hold something else than a language model."""
    path = header.path
    if header.num_parts > 1:
        raise InputError(
            f"{path} is one of {header.num_parts} parts of a model",
            hint="merge them: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    if header.metadata.get("general.type") == "adapter":
        raise InputError(f"{path} is an adapter (LoRA), not a model", hint="name the model that it was made for")
    if not header.tensors and "tokenizer.ggml.tokens" in header.metadata:
        raise InputError(f"{path} holds a vocabulary and no weights", hint="name the file of the whole model")
    if "token_embd.weight" not in header.tensors:
        raise InputError(
            f"{path} is damaged, truncated or no GGUF model: it holds no language model",
            hint="`edgepatch show` says what it holds",
        )


def read_any_header(path: Path) -> GGUFHeader:
    """As ``read_header``, of GGUF files of every kind: also of adapters, of vocabularies, and of parts of a split model.

    Raises:
        InputError: the file is missing, truncated, damaged, or no GGUF file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse_header(path, data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="name a GGUF file") from error
    except (ValueError, TypeError) as error:
        hint = "download or convert the model again"
        raise InputError(f"{path} is damaged, truncated or no GGUF model: {error}", hint) from None
