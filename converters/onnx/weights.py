"""Weight sketches of ONNX graphs that keep the names of the onnxruntime-genai builder, which is the default exporter.

Other exporters number their weights, so nothing in their graphs says which matrix is which.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.onnx.files import NUMPY_TYPES, GraphFile, Tensor, open_folder
from edgepatch.converters.weight_sketches import Cells, cells
from edgepatch.errors import InputError, MismatchError
from edgepatch.patch.sketches import Sketch, split_name

NAMES = {
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_qkv": "attn.qkv_proj",
    "attn_output": "attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EMBEDDING = "model.embed"
FUSED = ("attn_q", "attn_k", "attn_v")
"""Roles that the builder joins, in this order."""

QUANTIZED = {"_Q8": ("_scales", 8), "_Q4": ("_scales", 4), "_Q8G32": ("_scale", 8), "_Q4G32": ("_scale", 4)}
"""Ending of a matrix in blocks -> (ending of its scales, bits)."""


def sketch_of_onnx(folder: Path, like: Sketch, model_file: str | None = None) -> Sketch:
    """The sketch of an ONNX folder, its weights in float32, float16 or blocks of 8 or 4 bits.

    Args:
        folder: the model's.
        like: the base's sketch, whose positions are read.
        model_file: of several graphs in the folder the one to take.

    Raises:
        InputError: the folder is damaged, or its graph does not name its matrices as the builder does.
        MismatchError: a matrix has another shape.
    """
    file = open_folder(folder, model_file)
    tensors = {tensor.name: tensor for tensor in file.tensors if tensor.name}
    ends = []
    for name, row, column in like.positions:
        stem, first = _place(file, tensors, like, name, row)
        ends.append(_Matrix(file, tensors, stem, name, like.tensors[name][1]).cell(first + row, column))
    low, high = (np.array(end, np.float32) for end in zip(*ends, strict=True))
    return replace(like, low=low, high=high)


def _place(file: GraphFile, tensors: dict[str, Tensor], like: Sketch, name: str, row: int) -> tuple[str, int]:
    """(name in the graph without its ending, what to add to the row)."""
    candidates = _candidates(like, name, row)
    for stem, first in candidates:
        if any(stem + ending in tensors for ending in ("", *QUANTIZED)):
            return stem, first
    raise InputError(
        f"{file.path}: none of its weights is called {candidates[0][0]}",
        hint="only the builder's graphs name their matrices: edgepatch convert base --to onnx",
    )


def _candidates(like: Sketch, name: str, row: int) -> list[tuple[str, int]]:
    layer, role = split_name(name)
    head, prefix = "lm_head.MatMul.weight", f"model.layers.{layer}."
    if layer is None:
        return [(f"{EMBEDDING}_tokens.weight", 0), (head, 0)] if role == "token_embd" else [(head, 0)]
    candidates = [(f"{prefix}{NAMES[role]}.MatMul.weight", 0)]
    if role in FUSED:
        rows = [like.tensors.get(f"blk.{layer}.{other}", (0, 0))[0] for other in FUSED[: FUSED.index(role)]]
        candidates.append((f"{prefix}attn.qkv_proj.MatMul.weight", sum(rows)))
    elif (
        role == "ffn_up" and f"blk.{layer}.ffn_gate" not in like.tensors
    ):  # Phi's matrix of both, which the builder parts
        half = like.tensors[name][0] // 2
        candidates = [
            (f"{prefix}{NAMES['ffn_gate' if row < half else 'ffn_up']}.MatMul.weight", 0 if row < half else -half)
        ]
    return candidates


class _Matrix:
    """A matrix of a graph, read one block at a time."""

    def __init__(self, file: GraphFile, tensors: dict[str, Tensor], stem: str, name: str, inputs: int) -> None:
        self._file, self._tensors, self._stem = file, tensors, stem
        self._ending = next(ending for ending in ("", *QUANTIZED) if stem + ending in tensors)
        main = tensors[stem + self._ending].shape
        if self._ending:
            there = main[1] * main[2] * 8 // QUANTIZED[self._ending][1] if len(main) == 3 else 0
        else:
            there = main[-1] if stem.startswith(EMBEDDING) else main[0]
        if there != inputs:
            raise MismatchError({name: (f"{inputs} inputs", f"{there} in {file.path}")})

    def cell(self, row: int, column: int) -> tuple[float, float]:
        """Ends of the interval that was rounded to one weight."""
        if not self._ending:
            main = self._tensors[self._stem]
            at = row * main.shape[1] + column if self._stem.startswith(EMBEDDING) else column * main.shape[1] + row
            low, high = cells(
                _numbers(self._file, main, at, 1).astype(np.float32).reshape(1, 1), np.zeros(1, np.int64), "F16"
            )
        else:
            low, high = self._block_cells(row, column)
        return float(low[0]), float(high[0])

    def _block_cells(self, row: int, column: int) -> Cells:
        scales_ending, bits = QUANTIZED[self._ending]
        data, scales = self._tensors[self._stem + self._ending], self._tensors[self._stem + scales_ending]
        _, blocks, width = data.shape
        size = width * 8 // bits
        block, place = divmod(column, size)
        levels = _unpacked(_numbers(self._file, data, (row * blocks + block) * width, width), bits)
        scale = float(_numbers(self._file, scales, row * blocks + block, 1)[0])
        zero = self._zero_point(row, blocks, block, bits)
        return cells(((levels - np.float32(zero)) * np.float32(scale))[None], np.array([place]), "Q8_0")

    def _zero_point(self, row: int, blocks: int, block: int, bits: int) -> float:
        """Of one block; in the middle of the range where the graph has none."""
        points = self._tensors.get(self._stem + "_zp")
        if points is None:
            return float(1 << (bits - 1))
        per_row = -(-blocks * bits // 8)
        packed = _numbers(self._file, points, row * per_row, per_row)
        return float(_unpacked(packed, bits)[block])


def _unpacked(data: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Whole numbers of 4 bits, the low half of a byte first, or 8."""
    whole = np.stack([data & 15, data >> 4], axis=-1).reshape(-1) if bits == 4 else data
    return whole.astype(np.float32)


def _numbers(file: GraphFile, tensor: Tensor, start: int, count: int) -> NDArray[Any]:
    """Some of a tensor's numbers.

    Raises:
        InputError: they are not stored as raw numbers, or outside of the tensor.
    """
    kind = NUMPY_TYPES.get(tensor.data_type)
    if (
        kind is None
        or (start + count) * np.dtype(kind).itemsize > tensor.num_bytes
        or not (tensor.external or tensor.span)
    ):
        raise InputError(f"{file.path}: {tensor.name} is damaged or of an unknown kind", hint="convert the model again")
    if tensor.external:
        path, offset = file.path.with_name(tensor.external["location"]), int(tensor.external.get("offset", 0))
    else:
        assert tensor.span is not None
        path, offset = file.path, tensor.span[0]
    return np.fromfile(path, kind, count, offset=offset + start * np.dtype(kind).itemsize)
