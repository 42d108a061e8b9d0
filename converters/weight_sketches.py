"""Weight sketches of models: of Transformers folders and GGUF files here, of ONNX folders in ``onnx.weights``.

Only the sampled weights and their blocks are read, whatever the size of the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import architectures
from edgepatch.converters.gguf.header import BLOCK_SIZES, GGUFHeader, read_header
from edgepatch.errors import InputError, MismatchError
from edgepatch.patch.sketches import (
    ALLOWED,
    ALLOWED_REFITTED,
    EMBEDDINGS,
    NUM_CELLS,
    NUM_WEIGHTS,
    ROLES,
    Position,
    Sketch,
)

Cells = tuple[NDArray[np.float32], NDArray[np.float32]]

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.([\w.]+)\.weight$")
ROLES_IN_FOLDERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.out_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
"""Matrices that converters copy row by row. What they take apart, merge or reorder (experts, linear attention) is not sampled."""

HALF_WIDTHS = {"F32": 0.0, "F16": 0.0, "BF16": 2.0**-8}
"""Types without blocks -> how far rounding moves a weight, as a share of it, beyond what float16 does."""

SUB_BLOCKS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16, "NVFP4": 16}
"""Values that share a scale, where they are not 32."""

REFITTED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1"})
"""Types whose scale llama.cpp fits anew after rounding, where it has an importance matrix."""

CODEBOOKS = ("IQ1", "IQ2", "IQ3")
"""Types that round groups of weights together, so that a single weight may go further than to its nearest value."""

CODEBOOK_WIDTH = 2.5
"""Half the width of such a type's cell, in root mean squares of its block."""

STEP_SLACK, WEIGHT_SLACK = 0.01, 2.0**-9
"""What is added to half a step: a share of the step, for scales that are rounded after the weights, and a share of the weight,
for weights that went through bfloat16 on their way."""

MAX_PARTS = 8


def sketch_of(source: Path, like: Sketch | None = None) -> Sketch:
    """The sketch of a Transformers folder or a GGUF file; arguments and errors as for each."""
    return sketch_of_folder(source, like) if source.is_dir() else sketch_of_gguf(source, like)


def sketch_of_folder(folder: Path, like: Sketch | None = None) -> Sketch:
    """The sketch of a Transformers folder with safetensors weights.

    Args:
        folder: the model's.
        like: another model's sketch, whose positions are read.

    Raises:
        InputError: the weights are missing, damaged, or hold no matrix of a known name.
        MismatchError: a matrix of ``like`` is missing or of another shape.
        MissingExtraError: transformers is not installed.
    """
    from safetensors import SafetensorError, safe_open

    from edgepatch.converters.hf import folders

    config = folders.text_config(folders.read_transformers_config(folder)).to_dict()
    try:
        with ExitStack() as stack:
            shards = [
                stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))
            ]
            sources = [(shard, source) for shard in shards for source in list(shard.keys())]
            slices = {name: shard.get_slice(source) for shard, source in sources if (name := name_in_gguf(source))}
            if config.get("tie_word_embeddings"):
                slices.pop("output", None)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
            plan = _plan(folder, shapes, head_dim, like)
            values = [slices[p.tensor][p.row : p.row + 1][0, p.column].float().item() for p in plan.positions]
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"weights in {folder} are damaged or truncated: {error}", hint="download the model again"
        ) from None
    weights = _rounded(np.array(values))
    return replace(plan, low=weights, high=weights)


def name_in_gguf(source: str) -> str | None:
    """GGUF's name, without ".weight", of a matrix in a checkpoint; ``None`` for what is not sampled."""
    if re.search(architectures.NO_TEXT, source):
        return None
    if source.endswith("embed_tokens.weight"):
        return "token_embd"
    if source.endswith("lm_head.weight"):
        return "output"
    match = LAYER.search(source)
    role = ROLES_IN_FOLDERS.get(match[2]) if match else None
    return f"blk.{match[1]}.{role}" if match and role else None


def _rounded(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _plan(source: Path, shapes: Mapping[str, tuple[int, ...]], head_dim: int, like: Sketch | None) -> Sketch:
    """A sketch that only says which weights to read.

    Raises:
        InputError: there is no matrix of a known name.
        MismatchError: one of ``like`` is missing or of another shape.
    """
    if like is not None:
        differences: dict[str, tuple[object, object]] = {
            name: (shape, shapes.get(name, "none")) for name, shape in like.tensors.items() if shapes.get(name) != shape
        }
        if differences:
            raise MismatchError(differences)
        return like
    tensors = {name: (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}
    if not tensors:
        raise InputError(
            f"{source}: none of its matrices has a name that is known here",
            hint="patches for it cannot tell it from a fine-tune",
        )
    unknown = np.zeros(NUM_WEIGHTS, np.float32)
    return Sketch(head_dim, tensors, unknown, unknown)


def sketch_of_gguf(source: Path | GGUFHeader, like: Sketch | None = None) -> Sketch:
    """The sketch of a GGUF file: the cells of its weights, or the weights where it is not quantized.

    Args:
        source: the file, or its header.
        like: another model's sketch, whose positions are read.

    Raises:
        InputError: the file is missing, truncated or damaged, holds no matrix of a known name, or one of an unknown type.
        MismatchError: a matrix of ``like`` is missing or of another shape.
        MissingExtraError: the gguf package is not installed.
    """
    header = read_header(source) if isinstance(source, Path) else source
    names = {
        name.removesuffix(".weight"): info.shape for name, info in header.tensors.items() if name.endswith(".weight")
    }
    shapes = {
        name: shape for name, shape in names.items() if len(shape) == 2 and name.split(".")[-1] in (*ROLES, *EMBEDDINGS)
    }
    heads = int(header.per_layer("attention.head_count", int(header.setting("block_count")))[0])
    head_dim = int(header.setting("attention.key_length", int(header.setting("embedding_length")) // max(heads, 1)))
    plan = _plan(header.path, shapes, head_dim, like)
    low, high = _read_cells(header, plan.positions)
    count = NUM_CELLS if like is None and not np.array_equal(low, high) else len(low)
    return replace(plan, low=low[:count], high=high[:count], allowed=_allowed(header, plan.positions))


def _allowed(header: GGUFHeader, where: Sequence[Position]) -> float:
    """What each weight's own type allows, on average: a file can hold several."""
    import gguf

    refitted = {int(kind) for kind in gguf.GGMLQuantizationType if kind.name in REFITTED}
    share = float(np.mean([header.tensors[p.tensor + ".weight"].ggml_type in refitted for p in where]))
    return ALLOWED + share * (ALLOWED_REFITTED - ALLOWED)


def _read_cells(header: GGUFHeader, where: Sequence[Position]) -> Cells:
    low, high = np.empty(len(where), np.float32), np.empty(len(where), np.float32)
    kinds: dict[int, list[int]] = defaultdict(list)
    for i, position in enumerate(where):
        kinds[header.tensors[position.tensor + ".weight"].ggml_type].append(i)
    with header.path.open("rb", buffering=0) as file:
        for kind, indices in kinds.items():
            low[indices], high[indices] = _cells_of_type(header, file, kind, [where[i] for i in indices])
    return low, high


def _cells_of_type(header: GGUFHeader, file: FileIO, kind: int, where: Sequence[Position]) -> Cells:
    """Cells of weights in tensors of one type."""
    import gguf

    if kind not in BLOCK_SIZES:
        raise InputError(f"{header.path}: {where[0].tensor}: unknown type {kind}", hint="update the gguf package")
    per_block, num_bytes = BLOCK_SIZES[kind]
    kind_name = gguf.GGMLQuantizationType(kind).name
    blocks = bytearray()
    for tensor, row, column in where:
        info = header.tensors[tensor + ".weight"]
        start = info.offset + (row * info.shape[1] + column) // per_block * num_bytes
        file.seek(start)
        blocks += file.read(num_bytes)
    raw = np.frombuffer(blocks, np.uint8).reshape(len(where), num_bytes)
    try:
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind)).astype(np.float32)
    except NotImplementedError:
        raise InputError(
            f"{header.path}: {where[0].tensor}: {kind_name} cannot be read", hint="update the gguf package"
        ) from None
    columns = np.array([position.column % per_block for position in where])
    return cells(values.reshape(len(where), per_block), columns, kind_name)


def cells(blocks: NDArray[np.float32], columns: NDArray[np.int64], kind: str) -> Cells:
    """What may have been rounded to the weights of a file.

    Args:
        blocks: (N, block) as the file says.
        columns: (N,) which weight of each block.
        kind: type by ggml's name.

    Returns:
        Lower and upper ends, (N,) float32 each; infinite for the lowest and highest weight of a block, where rounding clips.
    """
    weights = blocks[np.arange(len(blocks)), columns]
    if kind in HALF_WIDTHS:
        slack = np.abs(weights) * np.float32(HALF_WIDTHS[kind])
        return weights - slack, weights + slack
    size = min(SUB_BLOCKS.get(kind, 32), blocks.shape[1])
    parts = [block[c // size * size :][:size] for block, c in zip(blocks, columns, strict=True)]
    if kind.startswith(CODEBOOKS):
        width = CODEBOOK_WIDTH * np.array([np.sqrt(np.mean(part**2)) for part in parts])
        return (weights - width).astype(np.float32), (weights + width).astype(np.float32)
    ends = np.array(
        [cell(part, weight, kind.startswith("Q")) for part, weight in zip(parts, weights, strict=True)], np.float32
    )
    return ends[:, 0], ends[:, 1]


def cell(block: NDArray[np.float32], weight: float, even: bool) -> tuple[float, float]:
    """The interval that rounds to ``weight``, from the values that its block holds.

    Args:
        block: weights that share a scale.
        weight: one of them.
        even: whether the type's values are evenly spaced, so that their distance tells of those that the block lacks.
    """
    ordered = np.sort(block)  # not `np.unique`, which imports numpy.ma: as long as to read all cells
    levels = ordered[np.append(True, ordered[1:] != ordered[:-1])].astype(np.float64)
    at = int(np.searchsorted(levels, weight))
    gaps = np.diff(levels)
    step = grid_step(gaps) if even and len(gaps) else np.inf
    below = min(step, gaps[at - 1]) if at > 0 else np.inf
    above = min(step, gaps[at]) if at < len(gaps) else np.inf
    slack = WEIGHT_SLACK * abs(weight)
    half = 0.5 + STEP_SLACK
    return weight - half * below - slack, weight + half * above + slack


def grid_step(gaps: NDArray[np.float64]) -> float:
    """The largest number that all gaps between evenly spaced values are multiples of; infinite where there is none."""
    for parts in range(1, MAX_PARTS + 1):
        step = float(gaps.min()) / parts
        if np.abs(gaps / step - np.rint(gaps / step)).max() < 0.02:
            return step
    return float("inf")
