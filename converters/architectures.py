"""Architectures by the one name that every format can tell: GGUF's.

GGUF knows less than Transformers does (a Mistral is a "llama" to it), so a model's type in a ``ModelSpec`` is GGUF's name, and
a patch for a Mistral folder runs on every GGUF file of it, whoever converted that file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from edgepatch.errors import InputError, MissingExtraError

GGUF_NAMES = {
    "bamba": "granitehybrid",
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe",
    "falcon_h1": "falcon-h1",
    "falcon_mamba": "mamba",
    "gemma4_unified": "gemma4",
    "glm": "chatglm",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "gpt-sw3": "gpt2",
    "gpt_bigcode": "starcoder",
    "gpt_oss": "gpt-oss",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "kimi_linear": "kimi-linear",
    "mimo_v2_flash": "mimo2",
    "minimax_m2": "minimax-m2",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "solar_open": "glm4moe",
    "youtu": "deepseek2",
}
"""``model_type`` in Transformers -> ``general.architecture`` where neither is the other without its underscores."""

KEEPS_UNDERSCORE = frozenset({"ernie4_5", "granite_swa", "hy_v3", "hy_v4", "nemotron_h", "seed_oss"})

ADDS_ONE_TO_NORMS = frozenset({"gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe", "qwen3next"})
"""These models compute with 1 + weight; GGUF holds the sum."""

KEEPS_NORM = r"linear_attn\.norm\.weight$"
"""Norm of Qwen's linear attention, which has no 1 added."""

NO_TEXT = r"(?:^|\.)(?:vision\w*|visual|audio\w*|multi_modal_projector|mtp)\."
"""Tensors of encoders and draft heads, which are no part of the language model."""


def gguf_name(model_type: str) -> str:
    """GGUF's name of a Transformers architecture; "llama" for "mistral", "qwen35" for "qwen3_5_text".

    Args:
        model_type: of ``config.json``, or of its ``text_config``.
    """
    short = model_type.removesuffix("_text")
    return short if short in KEEPS_UNDERSCORE else GGUF_NAMES.get(short, short.replace("_", ""))


def norm_names(architecture: str, num_layers: int, tensors: Iterable[str]) -> dict[str, str]:
    """Norm tensors: name in the checkpoint -> name in GGUF.

    Args:
        architecture: GGUF's name.
        num_layers: L.
        tensors: all names in the checkpoint.

    Raises:
        InputError: a norm has no name in GGUF, or there is none.
        MissingExtraError: the gguf package is not installed.
    """
    names = _names(architecture, num_layers)
    norms = [n for n in tensors if re.search(r"norm\w*\.weight$", n) and not re.search(NO_TEXT, n)]
    mapped = {n: names.get_name(n.replace("language_model.", ""), try_suffixes=(".weight",)) for n in norms}
    unknown = [n for n, target in mapped.items() if target is None]
    if unknown:
        raise InputError(f"norm tensors of {architecture}: no GGUF name for {unknown}", hint="update the gguf package")
    return {n: target for n, target in mapped.items() if target is not None}


@cache
def _names(architecture: str, num_layers: int) -> Any:
    """The gguf package's table of names; of an architecture that it does not know, the one of llama."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    kind = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), gguf.MODEL_ARCH.LLAMA)
    return gguf.get_tensor_name_map(kind, num_layers)


def gguf_tensor(architecture: str, num_layers: int, name: str) -> str | None:
    """A checkpoint's tensor by its name in GGUF; ``None`` where it has none.

    Raises:
        MissingExtraError: the gguf package is not installed.
    """
    tensor: str | None = _names(architecture, num_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    return tensor


def norm_shift(architecture: str, tensor: str) -> float:
    """What GGUF adds to a norm tensor of the checkpoint."""
    return 1.0 if architecture in ADDS_ONE_TO_NORMS and not re.search(KEEPS_NORM, tensor) else 0.0
