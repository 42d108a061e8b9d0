"""The state of one sequence in llama.cpp's KV cache, as ``llama_state_seq_get_data`` writes it.

No version of llama.cpp promises this layout, and its headers change without a version number. So nothing here is written from
knowledge alone: the structure is read from a state that the running library wrote itself (a probe of a few tokens), every field
checked, and refused unless exactly one reading consumes it to the last byte. ``fill`` then repeats that structure for P cells.

Layout (llama.cpp 0c1e570, ``llama_kv_cache::state_write``)::

    header | cache [cache of the sliding-window layers]
    cache: u32 streams = 1 | u32 cells | cells x (i32 position, u32 1, [i32 x, y, token], i32 sequence)
           | u32 values transposed | u32 layers | layers x (i32 type, u64 row bytes, rows)
           | layers x (i32 type, u64 row bytes, rows)              values as rows (flash attention), or
           | layers x (i32 type, u32 element bytes, u32 width, columns)          values transposed
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InactivePatchError

MAX_HEADER_BYTES = 32
EXTENDED_CELL = struct.Struct("<iIiiii")  # position, number of sequences, x, y, token, sequence (M-RoPE)
PLAIN_CELL = struct.Struct("<iIi")


@dataclass(frozen=True)
class LayerRows:
    """Keys or values of one layer.

    Attributes:
        ggml_type: number of the cache's type.
        row_bytes: bytes of one cell.
        rows: (cells x row_bytes) as stored; column-major where values are transposed.
    """

    ggml_type: int
    row_bytes: int
    rows: bytes


@dataclass(frozen=True)
class CacheState:
    """One of llama.cpp's caches.

    Attributes:
        extended: cells carry M-RoPE's further positions.
        transposed: values are stored by column (flash attention off).
        positions: of the cells.
        keys: one entry for each layer that the cache owns, in ascending order of layers.
        values: the same.
    """

    extended: bool
    transposed: bool
    positions: tuple[int, ...]
    keys: tuple[LayerRows, ...]
    values: tuple[LayerRows, ...]


@dataclass(frozen=True)
class SequenceState:
    """All caches of a sequence: one, or two where some layers have a sliding window.

    Attributes:
        header: what stands in front, as the library wrote it.
        sequence: the sequence's number in the cells.
        caches: non-sliding layers first.
    """

    header: bytes
    sequence: int
    caches: tuple[CacheState, ...]


class _UnreadableError(Exception):
    """These bytes are no state of the layout that was tried."""


class _Reader:
    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise _UnreadableError
        self.position, start = end, self.position
        return self.data[start:end]

    def fields(self, code: str) -> tuple[int, ...]:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))


def _expect(holds: bool) -> None:
    if not holds:
        raise _UnreadableError


def _read_cells(reader: _Reader, count: int, extended: bool, sequences: set[int]) -> tuple[int, ...]:
    cell, positions = EXTENDED_CELL if extended else PLAIN_CELL, []
    for _ in range(count):
        position, num_sequences, *_, sequence = cell.unpack(reader.bytes(cell.size))
        _expect(num_sequences == 1 and 0 <= position < 1 << 24)
        sequences.add(sequence)
        positions.append(position)
    return tuple(positions)


def _read_rows(reader: _Reader, cells: int) -> LayerRows:
    ggml_type, row_bytes = reader.fields("iQ")
    _expect(0 <= ggml_type < 256 and 0 < row_bytes < 1 << 24)
    return LayerRows(ggml_type, row_bytes, reader.bytes(cells * row_bytes))


def _read_columns(reader: _Reader, cells: int) -> LayerRows:
    ggml_type, element_bytes, width = reader.fields("iII")
    _expect(0 <= ggml_type < 256 and 0 < element_bytes <= 8 and 0 < width < 1 << 22)
    return LayerRows(ggml_type, element_bytes * width, reader.bytes(cells * element_bytes * width))


def _read_cache(reader: _Reader, extended: bool, sequences: set[int]) -> CacheState:
    streams, cells = reader.fields("II")
    _expect(streams == 1 and 0 < cells < 1 << 20)
    positions = _read_cells(reader, cells, extended, sequences)
    transposed, layers = reader.fields("II")
    _expect(transposed in (0, 1) and 0 < layers < 4096)
    keys = tuple(_read_rows(reader, cells) for _ in range(layers))
    read = _read_columns if transposed else _read_rows
    return CacheState(extended, bool(transposed), positions, keys, tuple(read(reader, cells) for _ in range(layers)))


def _read(data: bytes, header_bytes: int, num_caches: int, extended: bool) -> SequenceState:
    reader, sequences = _Reader(data, header_bytes), set[int]()
    caches = tuple(_read_cache(reader, extended, sequences) for _ in range(num_caches))
    _expect(reader.position == len(data) and len(sequences) == 1)
    return SequenceState(data[:header_bytes], sequences.pop(), caches)


def read_state(data: bytes) -> SequenceState:
    """The structure of a state that the library wrote.

    Raises:
        InactivePatchError: not exactly one reading fits: the library is newer than this module, or the model has further
            memory (recurrent layers, compressed latents).
    """
    readings = []
    for header_bytes in range(0, MAX_HEADER_BYTES + 1, 4):
        for num_caches in (1, 2):
            for extended in (False, True):
                try:
                    readings.append(_read(data, header_bytes, num_caches, extended))
                except _UnreadableError:
                    continue
    if len(readings) != 1:
        raise InactivePatchError(
            f"llama.cpp's state of {len(data)} bytes: expected one reading of its layout, found {len(readings)}",
            hint="the soft prompt must be decoded on the device instead, or use a tested llama-cpp-python",
        )
    return readings[0]


@dataclass(frozen=True)
class KeyFields:
    """Where keys and positions of a cache stand in the bytes of a state.

    Attributes:
        cells: of the table of cells.
        extended: cells carry M-RoPE's further positions.
        num_cells: in the table.
        layers: of each layer's keys.
    """

    cells: slice
    extended: bool
    num_cells: int
    layers: tuple[slice, ...]

    def move(self, state: NDArray[np.uint8], distance: int) -> None:
        """Adds to the position of every cell, in place."""
        cells = state[self.cells].reshape(self.num_cells, -1).view("<i4")
        cells[:, [0, 2, 3] if self.extended else [0]] += distance


def key_fields(probe: SequenceState, num_cells: Sequence[int]) -> list[KeyFields]:
    """Of each cache in a state that ``fill`` gives for so many cells."""
    end, fields = len(probe.header), []
    for cache, count in zip(probe.caches, num_cells, strict=True):
        first = end + struct.calcsize("<II")
        cells = slice(first, first + count * (EXTENDED_CELL if cache.extended else PLAIN_CELL).size)
        end, layers = cells.stop + struct.calcsize("<II"), []
        for layer in cache.keys:
            start = end + struct.calcsize("<iQ")
            end = start + count * layer.row_bytes
            layers.append(slice(start, end))
        end += sum(len(_value_field(layer, cache)) + count * layer.row_bytes for layer in cache.values)
        fields.append(KeyFields(cells, cache.extended, count, tuple(layers)))
    return fields


def fill(
    probe: SequenceState,
    keys: Sequence[Sequence[bytes]],
    values: Sequence[Sequence[bytes]],
    positions: Sequence[Sequence[int]],
) -> bytes:
    """A state of the probe's structure with other contents.

    Args:
        probe: read from the running library.
        keys: for each cache and layer the rows of its cells.
        values: the same, by column where the probe's are.
        positions: of the cells of each cache.

    Raises:
        InactivePatchError: a layer's bytes are not one row of the probe's size for each cell.
    """
    parts = [probe.header]
    for cache, cache_keys, cache_values, cells in zip(probe.caches, keys, values, positions, strict=True):
        parts.append(struct.pack("<II", 1, len(cells)))
        parts += [_cell(cache.extended, position, probe.sequence) for position in cells]
        parts.append(struct.pack("<II", cache.transposed, len(cache.keys)))
        for layer, rows in zip(cache.keys, cache_keys, strict=True):
            parts += [struct.pack("<iQ", layer.ggml_type, layer.row_bytes), _checked(layer, rows, len(cells))]
        for layer, rows in zip(cache.values, cache_values, strict=True):
            parts += [_value_field(layer, cache), _checked(layer, rows, len(cells))]
    return b"".join(parts)


def _cell(extended: bool, position: int, sequence: int) -> bytes:
    if extended:  # text has the same position on every axis; embeddings have no token
        return EXTENDED_CELL.pack(position, 1, position, position, -1, sequence)
    return PLAIN_CELL.pack(position, 1, sequence)


def _value_field(layer: LayerRows, cache: CacheState) -> bytes:
    if not cache.transposed:
        return struct.pack("<iQ", layer.ggml_type, layer.row_bytes)
    element_bytes = 4 if layer.ggml_type == 0 else 2  # llama.cpp transposes unquantized values only
    return struct.pack("<iII", layer.ggml_type, element_bytes, layer.row_bytes // element_bytes)


def _checked(layer: LayerRows, rows: bytes, num_cells: int) -> bytes:
    if len(rows) != num_cells * layer.row_bytes:
        raise InactivePatchError(
            f"llama.cpp's cache: expected {num_cells} rows of {layer.row_bytes} bytes, found {len(rows)} bytes"
        )
    return rows
