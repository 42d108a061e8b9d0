"""The Transformers config that a GGUF header describes.

Transformers reads headers too, of other architectures than those below, but drops what its own tables do not list: Llama 3.1's
rotary scaling, Gemma's attention scale, biases, sizes of heads. So every config is completed here, whoever began it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepatch.converters.gguf.header import GGUFHeader
from edgepatch.converters.rope_parameters import GEMMA3_LOCAL_THETA, decimal
from edgepatch.errors import InputError
from edgepatch.files.pretrained import load_pretrained
from edgepatch.tensors import ModelSpec

HINT = "take the Transformers folder that the file was made from"

MODEL_TYPES = {
    "command-r": "cohere",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "granite": "granite",
    "lfm2": "lfm2",
    "llama": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
}
"""GGUF's architecture -> ``model_type`` of those whose weights have the same shapes in both and are read tensor by tensor."""

SIZES = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
}
COPIED = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "use_parallel_residual": "use_parallel_residual",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "conv_L_cache": "shortconv.l_cache",
}
"""Setting of a config -> key in GGUF, for every config that has the setting."""

FOUND = {
    "attention_bias": ".attn_q.bias",
    "mlp_bias": ".ffn_up.bias",
    "use_qkv_bias": ".attn_q.bias",
    "qk_layernorm": ".attn_q_norm.weight",
    "use_qk_norm": ".attn_q_norm.weight",
}
"""Setting of a config -> end of the tensors whose presence it tells."""

LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Gemma's largest models divide attention by the root of D / heads instead of H; llama.cpp knows them by their depth."""

TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Name of a special token in Transformers -> in GGUF."""


def is_plain(header: GGUFHeader) -> bool:
    """Whether the weights can be read tensor by tensor: a known architecture without experts."""
    return header.architecture in MODEL_TYPES and not header.find("expert_count")


def config_of(header: GGUFHeader, spec: ModelSpec) -> Any:
    """The Transformers config of a file.

    Args:
        header: of the file.
        spec: what model it holds.

    Raises:
        InputError: no Transformers config says what the header says, or a value is missing.
        MissingExtraError: transformers is not installed.
    """
    config = _begin(header, spec) if is_plain(header) else _read_by_transformers(header)
    _complete(config, header, spec)
    return config


def _begin(header: GGUFHeader, spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    settings: dict[str, Any] = {name: int(header.setting(key)) for name, key in SIZES.items()}
    settings["num_attention_heads"] = max(header.per_layer("attention.head_count", spec.num_hidden_layers))
    settings["num_key_value_heads"] = spec.num_key_value_heads
    settings["tie_word_embeddings"] = "output.weight" not in header.tensors
    settings |= {f"{name}_token_id": token for name, token in special_tokens(header).items() if name != "unk"}
    if header.architecture == "lfm2":
        kv_heads = header.per_layer("attention.head_count_kv", spec.num_hidden_layers)
        settings["layer_types"] = ["full_attention" if count else "conv" for count in kv_heads]
        settings["block_auto_adjust_ff_dim"] = False  # the file says the adjusted size
    return AutoConfig.for_model(MODEL_TYPES[header.architecture], **settings)


def special_tokens(header: GGUFHeader) -> dict[str, int | None]:
    """Ids of "bos", "eos", "unk" and "pad"; ``None`` where the file names none."""
    size = len(header.metadata.get("tokenizer.ggml.tokens", ()))
    ids = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKENS.items()}
    return {name: token if isinstance(token, int) and 0 <= token < size else None for name, token in ids.items()}


def _read_by_transformers(header: GGUFHeader) -> Any:
    from transformers import AutoConfig

    path = header.path
    try:
        config = load_pretrained(AutoConfig, path.parent.resolve(), gguf_file=path.name)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"Transformers cannot load {path} ({header.architecture}): {reason}", hint=HINT) from None
    return config


def _rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    """The spec's rotary embedding as Transformers' ``rope_parameters``."""
    scaling = {"rope_type": "default", **spec.rope_scaling}
    local_theta = scaling.pop("local_rope_theta", None)
    if scaling["rope_type"] == "divisors":
        raise InputError("this model's rotary frequencies have divisors that no Transformers scaling gives", hint=HINT)
    settings = {"rope_theta": spec.rope_theta, **scaling}
    if spec.model_type != "gemma3":
        return settings
    local = {"rope_type": "default", "rope_theta": local_theta or GEMMA3_LOCAL_THETA}
    return {"full_attention": settings, "sliding_attention": local}


def _layer_types(pattern: Any, num_layers: int) -> list[str]:
    """Kind of attention in every layer; the pattern says how many layers there are for one with full attention, or lists them."""
    slides = (
        [(i + 1) % pattern != 0 for i in range(num_layers)] if isinstance(pattern, int) else list(pattern)[:num_layers]
    )
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _complete(config: Any, header: GGUFHeader, spec: ModelSpec) -> None:
    """Sets what the config does not yet say of the header."""
    old = getattr(config, "rope_parameters", None) or {}
    config.rope_parameters = {
        **{k: old[k] for k in ("mrope_section", "mrope_interleaved") if k in old},
        **_rope_parameters(spec),
    }
    config.vocab_size, config.head_dim = spec.vocab_size, spec.head_dim
    if "original_max_position_embeddings" in spec.rope_scaling:
        config.original_max_position_embeddings = spec.rope_scaling["original_max_position_embeddings"]
    _copy(config, header)
    for name, suffix in FOUND.items():
        if hasattr(config, name):
            setattr(config, name, any(tensor.endswith(suffix) for tensor in header.tensors))
    if (pattern := header.find("attention.sliding_window_pattern")) is not None and hasattr(config, "layer_types"):
        config.layer_types = _layer_types(pattern, spec.num_hidden_layers)
    if hasattr(config, "query_pre_attn_scalar"):
        deep = spec.num_hidden_layers == LAYERS_OF_27B.get(spec.model_type)
        config.query_pre_attn_scalar = spec.hidden_size // config.num_attention_heads if deep else spec.head_dim
    if config.model_type == "granite" and not header.find("attention.scale"):
        config.attention_multiplier = spec.head_dim**-0.5  # what llama.cpp takes then


def _copy(config: Any, header: GGUFHeader) -> None:
    for name, key in COPIED.items():
        if not hasattr(config, name):
            continue
        value = header.find(key)
        if value or name == "sliding_window":  # llama.cpp has no window where the file names none
            setattr(config, name, decimal(value) if isinstance(value, float) else value or None)


def as_saved(config: Any, dtype: str) -> dict[str, Any]:
    """``config.json`` of a folder with the config's model: in ``dtype``, and with nothing of the GGUF file's quantization."""
    settings: Mapping[str, Any] = config.to_diff_dict()
    kept = {k: v for k, v in settings.items() if k not in ("quantization_config", "_name_or_path", "dtype")}
    return kept | {"dtype": dtype}
