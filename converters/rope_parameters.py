"""A model's rotary embedding in one spelling, from a Transformers config or from a GGUF header.

``ModelSpec.rope_theta`` is the base of the layers with full attention. ``ModelSpec.rope_scaling`` holds only what departs from
plain rotation:

- ``rope_type`` with its numbers: linear, yarn, longrope (Phi-3; both lists of factors), llama3 (GGUF keeps only the divisors
  that it leads to, so they are recognized), or ``divisors`` for divisors of another origin;
- ``partial_rotary_factor`` where only a part of each head rotates;
- ``local_rope_theta`` where layers with sliding attention have a base of their own.

The sections of Qwen's three-axis rotation are left out: all axes of a text have the same position, so they change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose, log
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import rope

if TYPE_CHECKING:
    from edgepatch.converters.gguf.header import GGUFHeader

GEMMA3_LOCAL_THETA = 10000.0
"""What llama.cpp takes for Gemma 3's sliding layers; older files do not say it."""

YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3_CONTEXTS = (8192, *(2**n for n in range(5, 21)))
"""``original_max_position_embeddings`` that are tried, the one of every published model first."""

GGUF_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
"""Name in Transformers -> key under ``rope.scaling`` in GGUF; an ``attention_factor`` of its own llama.cpp does not apply."""


def decimal(value: float) -> float:
    """A number that went through float32 as the shortest decimal, as people write it: 1e-05, 500000.0."""
    return float(str(np.float32(value)))


def of_config(config: Mapping[str, Any], architecture: str, head_dim: int) -> tuple[float, dict[str, Any]]:
    """(theta, scaling) of a Transformers config.

    Args:
        config: the language model's settings with defaults filled in, rotary ones under ``rope_parameters``.
        architecture: GGUF's name.
        head_dim: H.
    """
    parameters = config.get("rope_parameters") or {}
    settings = dict(parameters.get("full_attention", parameters))
    theta = decimal(settings.get("rope_theta") or 10000.0)
    fraction = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    local = parameters.get("sliding_attention", {}).get("rope_theta")
    scaling = _extras(architecture, theta, int(head_dim * fraction) / head_dim, local)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "llama3":
        divisors = rope.llama3_divisors(theta, head_dim, settings)
        return theta, scaling | of_divisors(theta, head_dim, divisors)
    if kind in ("longrope", "su"):
        factors = {name: [decimal(f) for f in settings[name]] for name in ("short_factor", "long_factor")}
        context = settings.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        return theta, scaling | {"rope_type": "longrope", "original_max_position_embeddings": int(context), **factors}
    return theta, scaling | _plain(kind, settings)


def of_header(header: GGUFHeader, head_dim: int) -> tuple[float, dict[str, Any]]:
    """(theta, scaling) of a GGUF file.

    Args:
        header: of the file.
        head_dim: H.

    Raises:
        InputError: a number is missing or not positive.
    """
    theta = decimal(header.setting("rope.freq_base", 10000.0))
    local = header.find("rope.freq_base_swa")
    fraction = int(header.setting("rope.dimension_count", head_dim)) / head_dim
    scaling = _extras(header.architecture, theta, fraction, local)
    if "rope_freqs.weight" in header.tensors:
        return theta, scaling | of_divisors(theta, head_dim, header.vector("rope_freqs.weight"))
    context = header.find("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in header.tensors:
        names = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
        factors = {name: [decimal(f) for f in header.vector(tensor)] for name, tensor in names.items()}
        return theta, scaling | {
            "rope_type": "longrope",
            "original_max_position_embeddings": int(context or 0),
            **factors,
        }
    settings = {name: header.find(f"rope.scaling.{key}") for name, key in GGUF_SCALING.items()}
    return theta, scaling | _plain(str(header.find("rope.scaling.type") or "none"), settings)


def _extras(architecture: str, theta: float, fraction: float, local_theta: float | None) -> dict[str, Any]:
    """What is beside the scaling proper, where it departs from the usual."""
    extras: dict[str, Any] = {}
    usual_local = GEMMA3_LOCAL_THETA if architecture == "gemma3" else theta
    if local_theta is not None and decimal(local_theta) != usual_local:
        extras["local_rope_theta"] = decimal(local_theta)
    if fraction != 1:
        extras["partial_rotary_factor"] = fraction
    return extras


def _plain(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling that a few numbers describe; empty for none."""
    if kind in ("default", "none"):
        return {}
    scaling: dict[str, Any] = {"rope_type": kind}
    if settings.get("factor") is not None:
        scaling["factor"] = decimal(settings["factor"])
    if kind == "yarn":
        context = settings.get("original_max_position_embeddings")
        scaling |= {} if context is None else {"original_max_position_embeddings": int(context)}
        values = {name: settings.get(name) for name in YARN_DEFAULTS}
        scaling |= {n: decimal(v) for n, v in values.items() if v is not None and decimal(v) != YARN_DEFAULTS[n]}
        usual, attention = 1 + 0.1 * log(scaling.get("factor", 1.0)), settings.get("attention_factor")
        scaling |= (
            {"attention_factor": attention}
            if attention is not None and not isclose(attention, usual, rel_tol=1e-5)
            else {}
        )
    return scaling


def of_divisors(theta: float, head_dim: int, divisors: NDArray[np.float32]) -> dict[str, Any]:
    """Recognizes Llama 3.1's scaling from the divisors of the frequencies: the inverse of ``rope.llama3_divisors``.

    Args:
        theta: base of the rotary embedding.
        head_dim: H.
        divisors: (H/2,) float32, ``rope_freqs.weight`` in GGUF.

    Returns:
        ``rope_type`` llama3 and its numbers, or ``rope_type`` divisors and the divisors themselves.
    """
    for context in LLAMA3_CONTEXTS:
        scaling = {**rope.LLAMA3, "factor": decimal(divisors[-1]), "original_max_position_embeddings": context}
        expected = rope.llama3_divisors(theta, head_dim, scaling)
        if expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-4, atol=0):
            return scaling
    return {"rope_type": "divisors", "divisors": [float(f"{d:.4g}") for d in divisors]}
