"""Transformers folders: what model one holds, and the seed of a soft prompt computed by its own forward pass."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepatch.errors import InputError, MissingExtraError
from edgepatch.patches import Patch
from edgepatch.tensors import KVSeed, ModelSpec, SoftPrompt, weight_fingerprint
from edgepatch.tokenizers import FolderTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROPE_DEFAULTS = {"rope_type": "default", "type": "default"}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        InputError: it is missing or not JSON.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{folder} is not a model folder: config.json: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'} is not JSON: {error}", hint="download the model again") from None


def rope_parameters(config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """(theta, scaling without defaults) from a config written by Transformers 4 or 5."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
    return theta, {k: v for k, v in rope.items() if ROPE_DEFAULTS.get(k) != v}


def gguf_norm_names(config: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Norm tensors: name in the checkpoint -> name in GGUF.

    Raises:
        InputError: the architecture is unknown to the gguf package.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    architecture = next((a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == config["model_type"]), gguf.MODEL_ARCH.LLAMA)
    tensor_names = gguf.get_tensor_name_map(architecture, int(config["num_hidden_layers"]))
    norms = [n for n in names if re.search(r"norm\w*\.weight$", n)]
    mapped = {n: tensor_names.get_name(n, try_suffixes=(".weight",)) for n in norms}
    unknown = [n for n, target in mapped.items() if target is None]
    if unknown or not mapped:
        raise InputError(f"norm tensors of {config['model_type']}: no GGUF name for {unknown or 'any tensor'}")
    return {n: target for n, target in mapped.items() if target is not None}


def read_spec(folder: Path) -> ModelSpec:
    """The model in a Transformers folder.

    Raises:
        InputError: a file is missing, truncated, or of a kind that cannot be read (safetensors only).
    """
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise InputError(f"no safetensors weights in {folder}", hint="save the model with safetensors")
    norms = {}
    try:
        for shard in shards:
            with safe_open(shard, framework="pt") as tensors:
                for source, target in gguf_norm_names(config, list(tensors.keys())).items():
                    norms[target] = tensors.get_tensor(source).float().numpy()
        heads = int(config["num_attention_heads"])
        theta, scaling = rope_parameters(config)
        return ModelSpec(
            model_type=config["model_type"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            tokenizer_digest=FolderTokenizer(folder).digest,
            weight_fingerprint=weight_fingerprint(norms),
        )
    except SafetensorError as error:
        raise InputError(f"weights in {folder} are damaged or truncated: {error}", hint="download the model again") from None
    except KeyError as error:
        raise InputError(f"{folder / 'config.json'} has no {error}") from None


def load_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """A causal LM in float32 on ``device``, in evaluation mode, its weights frozen.

    Raises:
        InputError: the folder does not hold a causal LM.
        MissingExtraError: torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train") from None
    read_config(folder)
    logging.disable_progress_bar()  # a bar for a second's work between our own
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the model in {folder}: {error}") from error
    return model.to(device).eval().requires_grad_(False)


def compute_kv_seed(model: PreTrainedModel, soft_prompt: SoftPrompt, dtype: type[np.floating[Any]] = np.float32) -> KVSeed:
    """Keys and values of the virtual tokens through the model's own forward pass.

    Args:
        model: the full-precision base.
        soft_prompt: (P, D) float32.
        dtype: float32, or float16 for shipping (adds a KL of 1e-7 to 4e-7).

    Returns:
        L keys and values (K, P, H) of ``dtype``; keys after RoPE at positions 0..P-1, rotate-half order.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    embeddings = torch.from_numpy(soft_prompt.embeddings).to(model.device)[None]  # (1, P, D)
    with torch.inference_mode():
        model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    keys, values = (tuple(t.float().cpu().numpy().astype(dtype) for t in kind) for kind in zip(*layers, strict=True))
    return KVSeed(keys, values)


def with_kv_seed(patch: Patch, folder: Path) -> Patch:
    """The patch with a float16 seed computed by the full-precision model in ``folder``.

    Raises:
        InputError: the patch has no soft prompt, or the folder cannot be read.
        MismatchError: the patch was made for another model.
    """
    if patch.soft_prompt is None:
        raise InputError(
            f"patch {patch.name} {patch.version} has no soft prompt to compute a KV seed from",
            hint="its trained KV seed is already in the file",
        )
    patch.base.require_same(read_spec(folder))
    return replace(patch, kv_seed=compute_kv_seed(load_model(folder), patch.soft_prompt, np.float16))
