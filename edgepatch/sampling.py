"""Sampling from logits, in numpy: one rule for every runtime, so that runs are paired on the same random numbers.

A token is drawn by inverting the cumulative distribution in order of falling probability with one uniform number a step: two
runtimes whose logits differ by little draw the same token from the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import EdgepatchError, InputError

CANDIDATES = 256
"""So many likeliest tokens are sorted first; the whole vocabulary only where they hold less than top-p."""


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: the most tokens to generate.
        temperature: 0 takes the most likely token.
        top_p: the smallest set of likeliest tokens that holds this probability is kept.
        top_k: only the k likeliest tokens are kept; 0 keeps all.
        rng_seed: makes the draw repeatable; ``None`` draws afresh.
        ignore_end_tokens: go on behind the model's end token, for timing a fixed number of tokens.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    rng_seed: int | None = None
    ignore_end_tokens: bool = False

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": 0 <= self.temperature <= 100,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
        }
        for name, holds in checks.items():
            if not holds:
                raise InputError(f"sampling: {name} = {getattr(self, name)} is out of range")


def draw_token(logits: NDArray[Any], sampling: Sampling, rng: np.random.Generator) -> int:
    """Draws one token id.

    Args:
        logits: (V,) float32.
        sampling: temperature, then top-k, then top-p.
        rng: advanced by one uniform number, also at temperature 0.

    Raises:
        EdgepatchError: the logits hold NaN: the model or the patch is damaged.
    """
    uniform = rng.random()
    best = int(logits.argmax())
    if np.isnan(logits[best]):
        raise EdgepatchError("the model gave NaN logits", hint="check the model file; a damaged file or patch does this")
    if sampling.temperature == 0:
        return best
    weights = np.exp((logits.astype(np.float64) - logits[best]) / sampling.temperature)
    order = _likeliest(weights, sampling)
    cumulative = np.cumsum(weights[order])
    mass = cumulative[-1] if sampling.top_k else weights.sum()
    kept = min(int(np.searchsorted(cumulative, sampling.top_p * mass)) + 1, len(order))
    return int(order[min(int(np.searchsorted(cumulative[:kept], uniform * cumulative[kept - 1], side="right")), kept - 1)])


def _likeliest(weights: NDArray[np.float64], sampling: Sampling) -> NDArray[np.int64]:
    """Token ids in order of falling weight, as many as top-k and top-p can keep (sorting all V costs more than the draw)."""
    counts = (sampling.top_k,) if sampling.top_k else (CANDIDATES, len(weights))
    for count in (min(c, len(weights)) for c in counts):
        ids = np.sort(np.argpartition(-weights, count - 1)[:count])
        ids = ids[np.argsort(-weights[ids], kind="stable")]
        if weights[ids].sum() >= sampling.top_p * weights.sum():
            break
    return ids
