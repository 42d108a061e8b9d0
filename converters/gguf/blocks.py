"""Random blocks of ggml's types: what fills models whose speed is measured, and models that show whether a library computes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLE_BLOCKS = 1024

STEPS: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1.0),),
    "Q4_1": ((0, 1.0), (2, -7.5)),
    "Q5_0": ((0, 1.0),),
    "Q5_1": ((0, 1.0), (2, -15.5)),
    "Q8_0": ((0, 1.0),),
    "Q2_K": ((80, 1.0), (82, 1.5)),
    "Q3_K": ((108, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
    "IQ1_S": ((0, 1.0),),
    "IQ2_XXS": ((0, 1.0),),
    "IQ2_XS": ((0, 1.0),),
    "IQ2_S": ((0, 1.0),),
    "IQ3_XXS": ((0, 1.0),),
    "IQ3_S": ((0, 1.0),),
    "IQ4_NL": ((0, 1.0),),
    "IQ4_XS": ((0, 1.0),),
    "TQ1_0": ((52, 1.0),),
    "TQ2_0": ((64, 1.0),),
}
"""Type -> (byte, factor) of each float16 in its block. All other bytes may be any; the means of 0..3, 0..15 and 0..31 centre the weights."""

PLAIN = ("F32", "F16", "BF16")
BLOCK_TYPES = (*STEPS, "IQ1_M", "MXFP4", "NVFP4")
"""The last three keep their step in other forms than a float16."""


def random_blocks(rng: np.random.Generator, count: int, kind: str, deviation: float) -> NDArray[Any]:
    """Blocks of random weights.

    Args:
        rng: where they come from.
        count: of blocks.
        kind: one of ``PLAIN`` or ``BLOCK_TYPES``.
        deviation: standard deviation of the weights; MXFP4 and NVFP4 come as near as powers of two do.

    Returns:
        (count, bytes of a block) uint8, or (count,) float16 or float32; (count, 2) uint8 for BF16.
    """
    if kind in PLAIN:
        weights = (deviation * rng.standard_normal(count)).astype(np.float16 if kind == "F16" else np.float32)
        return weights.view(np.uint8).reshape(count, 4)[:, 2:] if kind == "BF16" else weights
    return _with_step(_any_bytes(rng, count, kind), kind, deviation / _unit_deviation(kind))


def _any_bytes(rng: np.random.Generator, count: int, kind: str) -> NDArray[np.uint8]:
    import gguf

    return rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), dtype=np.uint8)


def _with_step(blocks: NDArray[np.uint8], kind: str, step: float) -> NDArray[np.uint8]:
    exponent = round(math.log2(step))
    if kind == "MXFP4":
        blocks[:, 0] = 127 + exponent
    elif kind == "NVFP4":  # four times 4 bits of exponent over 3 of mantissa
        blocks[:, :4] = max(7 + exponent, 1) << 3
    elif kind == "IQ1_M":  # the 16 bits stand above four words of 12, the lowest first
        bits = int(np.float16(step).view(np.uint16))
        tops = np.array([(bits >> shift & 15) << 12 for shift in (0, 4, 8, 12)], np.uint16)
        blocks[:, -8:] = (np.ascontiguousarray(blocks[:, -8:]).view("<u2") & 0x0FFF | tops).astype("<u2").view(np.uint8)
    for byte, factor in STEPS.get(kind, ()):
        # Codes of a type with nothing but a step run from -8 to 7, or from -1 to 2: signs in turn centre the weights.
        steps = np.full((len(blocks), 1), step * factor, "<f2")
        steps[1::2] *= -1 if len(STEPS[kind]) == 1 else 1
        blocks[:, byte : byte + 2] = steps.view(np.uint8)
    return blocks


@lru_cache
def _unit_deviation(kind: str) -> float:
    """Standard deviation of the weights in random blocks with the step 1, measured."""
    import gguf

    blocks = _with_step(_any_bytes(np.random.default_rng(0), SAMPLE_BLOCKS, kind), kind, 1.0)
    return float(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).std())
