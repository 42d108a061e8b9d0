"""Random blocks of ggml's quantized types, and which type llama.cpp's quantizer gives a tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.bench.shapes import Shape

CHUNK_BLOCKS = 1 << 14
SAMPLE_BLOCKS = 4096

FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}
"""Kind of a file -> its number in ``general.file_type``."""

STEPS: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1.0),),
    "Q5_0": ((0, 1.0),),
    "Q8_0": ((0, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q6_K": ((208, 1.0),),
}
"""Type -> (byte, factor) of each float16 in its block. All other bytes may be any; 7.5, the mean of 0..15, centres Q4_K's weights."""

FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What takes the place of a type in blocks of 256 where a row is no multiple of them."""


def tensor_types(shape: Shape, kind: str) -> dict[str, str]:
    """Matrix -> its ggml type in a file of ``kind``.

    Source: ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` of llama.cpp's ``src/llama-quant.cpp``, for Q4_K_M.

    Raises:
        InputError: a row is no multiple of its type's blocks.
    """
    import gguf

    found = {}
    for name, dimensions in shape.tensors().items():
        if len(dimensions) == 1:
            continue
        chosen = _mixed(name, shape) if kind == "Q4_K_M" else kind
        if dimensions[-1] % _block_values(gguf, chosen):
            chosen = FALLBACKS.get(chosen, chosen)
        if dimensions[-1] % _block_values(gguf, chosen):
            raise InputError(
                f"{name}: rows of {dimensions[-1]} are no multiple of {chosen}'s blocks of {_block_values(gguf, chosen)}"
            )
        found[name] = chosen
    return found


def _block_values(gguf: Any, kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def _mixed(name: str, shape: Shape) -> str:
    """Q4_K_M's choice: more bits for the logits, and in the layers that need them for values and the way down."""
    if name == ("token_embd.weight" if shape.is_tied else "output.weight"):
        return "Q6_K"
    if name.startswith("blk.") and name.split(".")[2] in ("attn_v", "ffn_down"):
        return "Q6_K" if _uses_more_bits(int(name.split(".")[1]), shape.num_layers) else "Q4_K"
    return "Q4_K"


def _uses_more_bits(layer: int, num_layers: int) -> bool:
    return layer < num_layers // 8 or layer >= 7 * num_layers // 8 or (layer - num_layers // 8) % 3 == 2


def random_blocks(rng: np.random.Generator, count: int, kind: str, deviation: float) -> NDArray[Any]:
    """Blocks of random weights.

    Args:
        rng: where they come from.
        count: of blocks.
        kind: F16, or a type of ``STEPS``.
        deviation: standard deviation of the weights.

    Returns:
        (count, bytes of a block) uint8, or (count,) float16.
    """
    if kind == "F16":
        return (deviation * rng.standard_normal(count)).astype(np.float16)
    return _with_step(_any_bytes(rng, count, kind), kind, deviation / _unit_deviation(kind))


def _any_bytes(rng: np.random.Generator, count: int, kind: str) -> NDArray[np.uint8]:
    import gguf

    return rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), dtype=np.uint8)


def _with_step(blocks: NDArray[np.uint8], kind: str, step: float) -> NDArray[np.uint8]:
    for byte, factor in STEPS[kind]:
        blocks[:, byte : byte + 2] = np.array([step * factor], dtype="<f2").view(np.uint8)
    return blocks


@lru_cache
def _unit_deviation(kind: str) -> float:
    """Standard deviation of the weights in random blocks with the step 1, measured."""
    import gguf

    blocks = _with_step(_any_bytes(np.random.default_rng(0), SAMPLE_BLOCKS, kind), kind, 1.0)
    return float(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).std())
