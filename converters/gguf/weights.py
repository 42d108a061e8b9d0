"""The weights of a GGUF file as a Transformers checkpoint names and orders them, dequantized a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import architectures, rope
from edgepatch.converters.gguf.configs import HINT
from edgepatch.converters.gguf.header import BLOCK_SIZES, GGUFHeader, TensorInfo
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.tensors import ModelSpec

BESIDE_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that became settings."""

PIECE_VALUES = 1 << 24
"""Values that are dequantized at a time."""


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint.

    Attributes:
        source: its name in the GGUF file.
        shape: in the checkpoint; a convolution has a dimension more than in the file.
        num_heads: heads whose rows llama.cpp has reordered; 0 where it has not.
        shift: what GGUF has added to it.
    """

    source: str
    shape: tuple[int, ...]
    num_heads: int = 0
    shift: float = 0.0


def require_readable(header: GGUFHeader) -> None:
    """Checks that every tensor is of a type that can be dequantized.

    Raises:
        InputError: one is not.
        MissingExtraError: the gguf package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    names = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    for kind in sorted({info.ggml_type for info in header.tensors.values()}):
        name = next(name for name, info in header.tensors.items() if info.ggml_type == kind)
        try:
            block = np.zeros((1, BLOCK_SIZES[kind][1]), np.uint8)
            gguf.quants.dequantize(block, gguf.GGMLQuantizationType(kind))
        except (KeyError, ValueError, NotImplementedError):
            raise InputError(
                f"{header.path}: {name} is of type {names.get(kind, f'number {kind}')}, which the gguf package cannot dequantize",
                hint="update the gguf package, or take another quantization of the model",
            ) from None


def pieces(header: GGUFHeader, name: str, multiple: int = 1) -> Iterator[NDArray[np.float32]]:
    """A tensor's values in float32, as gguf-py dequantizes them: whole rows, (rows, columns) each.

    Args:
        header: of the file, whose types ``require_readable`` knows.
        name: of the tensor.
        multiple: of the number of rows in every piece, if that is less than all.
    """
    import gguf

    info = header.tensors[name]
    per_block, num_bytes = BLOCK_SIZES[info.ggml_type]
    columns, rows = info.shape[-1], prod(info.shape[:-1])
    row_bytes = columns // per_block * num_bytes
    step = max(PIECE_VALUES // columns // multiple, 1) * multiple
    with header.path.open("rb") as file:
        file.seek(info.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = np.frombuffer(file.read(count * row_bytes), np.uint8).reshape(count, row_bytes)
            kind = gguf.GGMLQuantizationType(info.ggml_type)
            yield gguf.quants.dequantize(data, kind).astype(np.float32, copy=False)


def plan(header: GGUFHeader, spec: ModelSpec, config: Any) -> dict[str, Weight]:
    """What a checkpoint of the file's model holds.

    Args:
        header: of the file.
        spec: what model it holds.
        config: its Transformers config.

    Returns:
        Name in the checkpoint -> where its values come from; a head that is the embedding is left out.

    Raises:
        InputError: a tensor of the model is not in the file, or one of the file not in the model.
    """
    weights = {
        name: _weight(header, spec, config, name, shape)
        for name, shape in _parameters(config).items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    left = set(header.tensors) - BESIDE_WEIGHTS - {weight.source for weight in weights.values()}
    if left:
        raise InputError(
            f"{header.path}: {config.model_type} of Transformers has no place for {_listed(left)}", hint=HINT
        )
    return weights


def model_class(config: Any) -> Any:
    """The class of the causal LM that a config describes."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _parameters(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, without its weights."""
    import torch

    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _weight(header: GGUFHeader, spec: ModelSpec, config: Any, name: str, shape: tuple[int, ...]) -> Weight:
    source = architectures.gguf_tensor(spec.model_type, spec.num_hidden_layers, name)
    if source not in header.tensors:
        raise InputError(f"{header.path}: {config.model_type} of Transformers finds no weights for {name}", hint=HINT)
    info = header.tensors[source]
    if _squeezed(info.shape) != _squeezed(shape):
        raise InputError(f"{header.path}: {source}: expected {shape}, found {info.shape}", hint=HINT)
    role = source.split(".")[-2]
    heads = {"attn_q": config.num_attention_heads, "attn_k": spec.num_key_value_heads}.get(role, 0)
    reordered = heads if rope.rotates_neighbours(spec.model_type) else 0
    shift = architectures.norm_shift(spec.model_type, name) if "norm" in role else 0.0
    return Weight(source, shape, reordered, shift)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def checkpoint_pieces(header: GGUFHeader, weight: Weight) -> Iterator[NDArray[np.float32]]:
    """A checkpoint's tensor in pieces that follow one another in memory."""
    info: TensorInfo = header.tensors[weight.source]
    rows_per_head = info.shape[0] // weight.num_heads if weight.num_heads else 1
    for piece in pieces(header, weight.source, rows_per_head):
        if weight.num_heads:
            values = piece.reshape(-1) if len(info.shape) == 1 else piece  # a bias is one row
            piece = rope.projection_from_llamacpp(values, values.shape[0] // rows_per_head)
        yield np.ascontiguousarray(piece - np.float32(weight.shift) if weight.shift else piece)


def state_dict(header: GGUFHeader, weights: Mapping[str, Weight]) -> dict[str, Any]:
    """All tensors of a checkpoint as PyTorch has them, float32."""
    import torch

    tensors = {}
    for name, weight in weights.items():
        values = np.concatenate([piece.reshape(-1) for piece in checkpoint_pieces(header, weight)])
        tensors[name] = torch.from_numpy(values.reshape(weight.shape))
    return tensors
