"""Rotary embeddings: how a head's dimensions are ordered in llama.cpp's files, and how Llama 3.1 stretches the frequencies.

The canonical order is Transformers' "rotate half": dimension ``j`` of a head is rotated together with ``j + H/2``. llama.cpp's
llama family rotates neighbours, ``2j`` with ``2j + 1``, so converters reorder the query and key projections and with them every
cached key. The NeoX family keeps Transformers' order. Our own converter must choose, so it knows the architectures below; what a
file that somebody else made does is measured (``llamacpp.layout``), never looked up here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError

ROTATES_NEIGHBOURS = {
    "command-r": False,
    "gemma": False,
    "gemma2": False,
    "gemma3": False,
    "granite": True,
    "lfm2": False,
    "llama": True,
    "olmo2": False,
    "phi3": False,
    "qwen2": False,
    "qwen3": False,
    "smollm3": True,
    "stablelm": False,
}
"""GGUF architecture -> whether converters reorder its heads. Mistral's architecture in GGUF is "llama"; Cohere's own code rotates
neighbours, so there is nothing to reorder."""


def rotates_neighbours(architecture: str) -> bool:
    """Whether llama.cpp rotates neighbouring dimensions in this architecture.

    Args:
        architecture: ``general.architecture`` of the GGUF file.

    Raises:
        InputError: the architecture's layout was not proven.
    """
    if architecture not in ROTATES_NEIGHBOURS:
        raise InputError(
            f"key layout: expected one of {sorted(ROTATES_NEIGHBOURS)}, found the architecture {architecture!r}",
            hint="convert it with llama.cpp's convert_hf_to_gguf.py; patches run on that file",
        )
    return ROTATES_NEIGHBOURS[architecture]


def interleave(keys: NDArray[Any]) -> NDArray[Any]:
    """(..., H) from rotate-half order to neighbours: dimension ``2i + j`` of the result is ``j * H/2 + i`` of the argument."""
    halves: NDArray[Any] = keys.reshape(*keys.shape[:-1], 2, keys.shape[-1] // 2)
    pairs: NDArray[Any] = halves.swapaxes(-1, -2)
    return pairs.reshape(keys.shape)


def deinterleave(keys: NDArray[Any]) -> NDArray[Any]:
    """The inverse of ``interleave``: (..., H) from neighbours to rotate-half order."""
    pairs: NDArray[Any] = keys.reshape(*keys.shape[:-1], keys.shape[-1] // 2, 2)
    halves: NDArray[Any] = pairs.swapaxes(-1, -2)
    return halves.reshape(keys.shape)


def projection_to_llamacpp(weight: NDArray[Any], num_heads: int, architecture: str) -> NDArray[Any]:
    """Reorders the rows of a query or key projection, so that it yields heads in llama.cpp's order.

    Args:
        weight: (num_heads * H, D), or the bias (num_heads * H,), rotate-half order.
        num_heads: query heads or K.
        architecture: ``general.architecture`` of the GGUF file.

    Returns:
        The same shape and dtype.

    Raises:
        InputError: the architecture's layout was not proven.
    """
    return _reordered(weight, num_heads, interleave) if rotates_neighbours(architecture) else weight


def projection_from_llamacpp(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """The inverse of ``projection_to_llamacpp``, of an architecture whose heads are reordered; whole heads are enough."""
    return _reordered(weight, num_heads, deinterleave)


def _reordered(weight: NDArray[Any], num_heads: int, order: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
    heads = np.moveaxis(weight.reshape(num_heads, -1, *weight.shape[1:]), 1, -1)  # (heads, ..., H)
    return np.ascontiguousarray(np.moveaxis(order(heads), -1, 1)).reshape(weight.shape)


LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What every Llama 3.1 and 3.2 has in common; GGUF keeps only the resulting divisors, so others could not be recognized."""


def llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> NDArray[np.float32]:
    """Divisors of the rotary frequencies under Llama 3.1's scaling.

    Args:
        theta: base of the rotary embedding.
        head_dim: H.
        scaling: ``factor``, ``low_freq_factor``, ``high_freq_factor`` and ``original_max_position_embeddings``.

    Returns:
        (H/2,) float32, 1 for the fast dimensions and ``factor`` for the slow ones: ``rope_freqs.weight`` in GGUF.
    """
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = float(scaling["original_max_position_embeddings"]) / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
