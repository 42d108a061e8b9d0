"""The start of a GGUF file as bytes: what ``header`` reads."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UINT32, STRING = 4, 8  # value types


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file that is to be.

    Attributes:
        shape: dimensions in numpy's order.
        ggml_type: number of its type.
        num_bytes: of its values.
    """

    shape: tuple[int, ...]
    ggml_type: int
    num_bytes: int


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def entry(key: str, value: str | int) -> bytes:
    """An entry of the metadata: a text, or a count."""
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", STRING) + _string(value)
    return _string(key) + struct.pack("<II", UINT32, value)


def padding(length: int, alignment: int) -> bytes:
    """What fills up so many bytes to the next boundary."""
    return bytes(-length % alignment)


def file_start(entries: Iterable[bytes], tensors: Mapping[str, TensorEntry], alignment: int) -> bytes:
    """All that comes before the values of the tensors, each of which is padded to the alignment in its turn."""
    listed, table, offset = list(entries), b"", 0
    for name, tensor in tensors.items():
        dimensions = tensor.shape[::-1]
        table += _string(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        table += struct.pack("<IQ", tensor.ggml_type, offset)
        offset += tensor.num_bytes + len(padding(tensor.num_bytes, alignment))
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(listed)) + b"".join(listed) + table
    return start + padding(len(start), alignment)
