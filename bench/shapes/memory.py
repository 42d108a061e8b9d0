"""What a model takes in memory, before it is loaded."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from edgepatch.bench.shapes.blocks import FILE_TYPES, tensor_types
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.bench.shapes.shape import Shape
    from edgepatch.tensors import ModelSpec

ONNX_KINDS = {"int8": 8, "int4": 4}
PREFILL = 512
"""Tokens of llama.cpp's batch: it keeps room for the logits of them all."""

ONNX_PREFILL = 256
LIBRARY_BYTES = 300 << 20
"""Python with the runtime's libraries, and their smaller buffers."""

CGROUP = Path("/sys/fs/cgroup")


def estimate_bytes(shape: Shape, quantization: str, context: int, num_sequences: int = 1) -> int:
    """Upper estimate of what a loaded model takes: weights, cache, room for logits, libraries.

    Args:
        shape: the model's.
        quantization: a kind of ``write_gguf`` or ``write_onnx``.
        context: positions of a sequence.
        num_sequences: conversations held at once.

    Raises:
        InputError: an unknown quantization.
    """
    cells = 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim * context * num_sequences
    if quantization in ONNX_KINDS:
        # onnxruntime packs the weights anew while the file's are still mapped; embeddings of int8 graphs are float32.
        weights = 2 * onnx_weight_bytes(shape, quantization)
        return weights + 4 * cells + 4 * shape.vocab_size * ONNX_PREFILL + LIBRARY_BYTES
    return gguf_weight_bytes(shape, quantization) + 2 * cells + 4 * shape.vocab_size * PREFILL + LIBRARY_BYTES


def gguf_weight_bytes(shape: Shape, quantization: str) -> int:
    """Of the tensors in a GGUF file.

    Raises:
        InputError: an unknown quantization.
    """
    import gguf

    if quantization not in FILE_TYPES:
        raise InputError(f"quantization: expected one of {', '.join([*FILE_TYPES, *ONNX_KINDS])}, found {quantization}")
    types, total = tensor_types(shape, quantization), 0
    for name, dimensions in shape.tensors().items():
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[types.get(name, "F32")]]
        total += prod(dimensions) // values * size
    return total


def onnx_weight_bytes(shape: Shape, quantization: str) -> int:
    """Of an ONNX model, roughly: a byte or half of one for a weight, a float32 and a zero point for each 32."""
    vocabulary = shape.vocab_size * shape.hidden_size
    inner = sum(prod(d) for name, d in shape.tensors().items() if name.startswith("blk."))
    bits = 8 if quantization == "int8" else 6  # a third of int4's layers keep 8
    separate = 4 * vocabulary if quantization == "int8" or not shape.is_tied else 0
    return inner * bits // 8 + vocabulary + (inner + vocabulary) * 5 // 32 + separate


def estimate_of_file(path: Path, spec: ModelSpec, context: int, num_sequences: int = 1) -> int:
    """As ``estimate_bytes``, for a model whose file or folder is there."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    weights = sum(file.stat().st_size for file in files)
    cells = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * context * num_sequences
    if path.is_file():
        return weights + 2 * cells + 4 * spec.vocab_size * PREFILL + LIBRARY_BYTES
    return 2 * weights + 4 * cells + 4 * spec.vocab_size * ONNX_PREFILL + LIBRARY_BYTES


def available_bytes() -> int:
    """Memory that can be taken now: the machine's, or what the control group leaves."""
    limits = [_machine_bytes()]
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no control groups
    return min(limits)


def _machine_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(name: str, estimate: int, available: int | None = None) -> None:
    """Refuses a model that does not fit, before anything of it is loaded.

    Args:
        name: of the model, for the message.
        estimate: bytes that it takes.
        available: bytes there are; by default those of this machine now.

    Raises:
        InputError: it does not fit.
    """
    there = available_bytes() if available is None else available
    if estimate > there:
        raise InputError(
            f"{name}: expected {estimate / 2**30:.1f} GiB of free memory by the estimate, found {there / 2**30:.1f} GiB",
            hint="take a smaller shape or quantization, a shorter context, or fewer sequences",
        )
