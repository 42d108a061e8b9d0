"""Transformers folders, and GGUF files in their place: what model one holds, and the seed that its own forward pass computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch import canary
from edgepatch.converters import architectures, gguf_models, gguf_specs, rope_parameters, weight_tables
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.patches import Patch
from edgepatch.tensors import Canary, KVSeed, ModelSpec, SoftPrompt, weight_fingerprint
from edgepatch.tokenizers import FolderTokenizer

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


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


def read_transformers_config(folder: Path) -> Any:
    """The config of a model folder as Transformers understands it, with every default filled in.

    Raises:
        InputError: it is missing, or of a kind that the installed Transformers does not know.
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise MissingExtraError("transformers", "train") from None
    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / 'config.json'}: {error}", hint="download the model again, or update transformers"
        ) from None


def read_spec(path: Path, weights: Mapping[str, NDArray[Any]] | None = None) -> ModelSpec:
    """The model in a Transformers folder or a GGUF file.

    Args:
        path: the folder or the file.
        weights: tensors by their name in the checkpoint, for a folder that holds them in another format than safetensors.

    Raises:
        InputError: a file is missing, truncated, or of a kind that cannot be read (safetensors only).
        MissingExtraError: transformers, safetensors or gguf is not installed.
    """
    if path.is_file():
        return gguf_specs.read_spec(path)
    config = text_config(read_transformers_config(path)).to_dict()
    architecture = architectures.gguf_name(config["model_type"])
    try:
        heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
        head_dim = int(config.get("head_dim") or hidden_size // heads)
        theta, scaling = rope_parameters.of_config(config, architecture, head_dim)
        return ModelSpec(
            model_type=architecture,
            hidden_size=hidden_size,
            num_hidden_layers=int(config["num_hidden_layers"]),
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            vocab_size=int(config["vocab_size"]),
            rope_theta=theta,
            rope_scaling=scaling,
            tokenizer_digest=FolderTokenizer(path).digest,
            weight_fingerprint=weight_fingerprint(
                _norms_of(path, weights, architecture, int(config["num_hidden_layers"]))
            ),
        )
    except KeyError as error:
        raise InputError(f"{path / 'config.json'} has no {error}") from None


def _norms_of(
    folder: Path, weights: Mapping[str, NDArray[Any]] | None, architecture: str, num_layers: int
) -> dict[str, NDArray[np.float32]]:
    if weights is None:
        return read_norms(folder, architecture, num_layers)
    names = architectures.norm_names(architecture, num_layers, weights)
    return {
        new: weights[old].astype(np.float32) + architectures.norm_shift(architecture, old) for old, new in names.items()
    }


def read_norms(folder: Path, architecture: str, num_layers: int) -> dict[str, NDArray[np.float32]]:
    """Norm vectors by their name in GGUF, as they are there.

    Raises:
        InputError: the weights are missing, truncated or damaged, or have no norms.
        MissingExtraError: the gguf package is not installed.
    """
    tensors = weight_tables.read_checkpoint(folder)
    names = architectures.norm_names(architecture, num_layers, tensors)
    norms = {
        target: tensors[source].vector() + np.float32(architectures.norm_shift(architecture, source))
        for source, target in names.items()
    }
    if not norms:
        raise InputError(f"the weights in {folder} have no norms", hint="download the model again")
    return norms


def load_model(path: Path, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """A causal LM on ``device``, in evaluation mode, its weights frozen.

    Args:
        path: a Transformers folder, or a GGUF file, whose weights are dequantized.
        device: "cpu" or "cuda".
        dtype: of the weights: "float32", "bfloat16", or "4bit" (NF4 of bitsandbytes, folders only).

    Raises:
        InputError: the folder does not hold a causal LM, or Transformers cannot load the GGUF file.
        MissingExtraError: torch, transformers or bitsandbytes is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train") from None
    logging.disable_progress_bar()  # a bar for a second's work between our own
    if path.is_file():
        if dtype == "4bit":
            raise InputError(
                f"{path}: 4bit quantizes a Transformers folder, found a GGUF file",
                hint="use bfloat16; its weights are dequantized",
            )
        model = gguf_models.load_model(path)
    else:
        read_config(path)
        options = _four_bit(device) if dtype == "4bit" else {"dtype": torch.float32}
        try:
            model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the model in {path}: {error}") from error
    if dtype != "4bit":
        model = cast(model.to(device), dtype)
    return model.eval().requires_grad_(False)


def cast(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The model in another type, in place: "float32" or "bfloat16".

    RoPE's frequencies stay in float32, as Transformers keeps them: rounded to bfloat16, they turn the key at position 100 by up to a
    fifth of a radian too far.
    """
    import torch

    kept = {
        (module, name): buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    }
    model = model.to(getattr(torch, dtype))
    for (module, name), buffer in kept.items():
        setattr(module, name, buffer)
    return model


def _four_bit(device: str) -> dict[str, Any]:
    """How Transformers quantizes on loading: NF4 with double quantization, computing in bfloat16 (QLoRA, arXiv 2305.14314)."""
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quantized-training")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": settings, "dtype": torch.bfloat16, "device_map": {"": device}}


@contextmanager
def tokenizer_folder(path: Path) -> Iterator[Path]:
    """A folder with the tokenizer of a Transformers folder (that folder itself) or of a GGUF file (a temporary one).

    Raises:
        InputError: the GGUF file is damaged, or Transformers tokenizes otherwise than llama.cpp.
        MissingExtraError: transformers, gguf or llama-cpp-python is not installed.
    """
    if path.is_file():
        with gguf_models.tokenizer_folder(path) as folder:
            yield folder
    else:
        yield path


ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def text_config(config: Any) -> Any:
    """The language model's part of a Transformers config."""
    return config.get_text_config(decoder=True)


def is_attention_only(model: PreTrainedModel) -> bool:
    """Whether every layer remembers by keys and values alone, so that a seed can hold all of its memory."""
    return set(getattr(text_config(model.config), "layer_types", None) or ()) <= ATTENTION_LAYERS


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer sees all that stands before a token: no sliding window, no recurrent layer."""
    config = text_config(model.config)
    layers = getattr(config, "layer_types", None)
    if layers:
        return set(layers) == {"full_attention"}
    return not getattr(config, "sliding_window", None)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that forgets nothing.

    Transformers' own choice for a model with sliding windows drops what lies behind the window, so that it could not be cut
    back; recurrent layers need the configured kind.
    """
    from transformers import DynamicCache

    return DynamicCache() if is_attention_only(model) else DynamicCache(config=model.config)


def prefill(model: PreTrainedModel, soft_prompt: SoftPrompt) -> DynamicCache:
    """The model's memory of the virtual tokens."""
    import torch

    cache = new_cache(model)
    embeddings = torch.tensor(soft_prompt.embeddings, device=model.device)[None]  # (1, P, D)
    with torch.inference_mode():
        model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return cache


def seeded_cache(model: PreTrainedModel, seed: KVSeed) -> DynamicCache:
    """A cache that holds a seed, in float32."""
    import torch

    cache = new_cache(model)
    for layer, (key, value) in enumerate(zip(seed.keys, seed.values, strict=True)):
        tensors = [torch.tensor(t.astype(np.float32), device=model.device)[None] for t in (key, value)]
        cache.update(*tensors, layer)  # (1, K, P, H)
    return cache


def compute_kv_seed(
    model: PreTrainedModel, soft_prompt: SoftPrompt, dtype: type[np.floating[Any]] = np.float32
) -> KVSeed:
    """Keys and values of the virtual tokens through the model's own forward pass.

    Args:
        model: the full-precision base.
        soft_prompt: (P, D) float32.
        dtype: float32, or float16 for shipping (adds a KL of 1e-7 to 4e-7).

    Returns:
        L keys and values (K, P, H) of ``dtype``; keys after RoPE at positions 0..P-1, rotate-half order.

    Raises:
        InputError: the model has recurrent layers, whose memory is not made of keys and values.
    """
    if not is_attention_only(model):
        raise InputError(
            f"{model.config.model_type} has recurrent layers: a KV seed cannot hold their memory",
            hint="its patches carry the soft prompt alone, which each device evaluates itself",
        )
    layers = [(layer.keys[0], layer.values[0]) for layer in prefill(model, soft_prompt).layers]
    keys, values = (tuple(t.float().cpu().numpy().astype(dtype) for t in kind) for kind in zip(*layers, strict=True))
    return KVSeed(keys, values)


def compute_canary(model: PreTrainedModel, soft_prompt: SoftPrompt | None, seed: KVSeed | None = None) -> Canary:
    """The full-precision model's answer to the canary's prompts, without and with the patch.

    Args:
        model: the full-precision base.
        soft_prompt: the patch's; where it has none, its seed is used.
        seed: a trained K/V prefix.
    """
    import torch

    if soft_prompt is not None:
        memory = prefill(model, soft_prompt)
    else:
        assert seed is not None  # a patch has one of them
        memory = seeded_cache(model, seed)

    def answer(tokens: Sequence[int], cache: DynamicCache) -> NDArray[np.float32]:
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([list(tokens)], device=model.device), past_key_values=cache)
        logits: NDArray[np.float32] = output.logits[0, -1].float().cpu().numpy()
        return logits

    vocab_size = int(text_config(model.config).vocab_size)
    return canary.make_canary(
        vocab_size,
        lambda tokens: answer(tokens, new_cache(model)),
        lambda tokens: answer(tokens, copy.deepcopy(memory)),
    )


def complete(patch: Patch, model: PreTrainedModel) -> Patch:
    """The patch with what its full-precision model can tell: a float16 seed of its soft prompt, and a canary."""
    seed = patch.kv_seed
    if patch.soft_prompt is not None and is_attention_only(model):
        seed = compute_kv_seed(model, patch.soft_prompt, np.float16)
    return replace(patch, kv_seed=seed, canary=compute_canary(model, patch.soft_prompt, seed))


def with_kv_seed(patch: Patch, folder: Path) -> Patch:
    """The patch with a float16 seed and a canary computed by the full-precision model in ``folder``.

    A patch that has a trained K/V prefix instead of a soft prompt gets the canary alone.

    Raises:
        InputError: the folder cannot be read.
        MismatchError: the patch was made for another model.
    """
    patch.base.require_same(read_spec(folder))
    return complete(patch, load_model(folder))
