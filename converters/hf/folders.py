"""Transformers folders, and GGUF files in their place: what model one holds, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import architectures, rope_parameters, weight_tables
from edgepatch.converters.gguf import configs, specs
from edgepatch.converters.gguf import models as gguf_models
from edgepatch.converters.gguf.header import read_header
from edgepatch.errors import InputError, MissingExtraError, no_gpu_error
from edgepatch.files import strict_json
from edgepatch.files.pretrained import load_pretrained, load_pretrained_model
from edgepatch.tensors import ModelSpec, weight_fingerprint
from edgepatch.text.tokenizers import FolderTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        InputError: it is missing or not JSON.
    """
    hint = "name a complete model folder, or download the model again"
    return strict_json.read_json(folder / "config.json", what="the config of a model folder,", hint=hint, infinite=True)


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
        return load_pretrained(AutoConfig, folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / 'config.json'}: {error}", hint="download the model again, or update transformers"
        ) from None


def read_text_config(path: Path, spec: ModelSpec) -> Any:
    """The language model's part of the Transformers config of a folder or a GGUF file; no weight is read.

    Args:
        path: the folder or the file.
        spec: what model it holds.

    Raises:
        InputError: it is missing, or there is no such config in the installed Transformers.
        MissingExtraError: transformers is not installed.
    """
    return text_config(configs.config_of(read_header(path), spec) if path.is_file() else read_transformers_config(path))


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
        return specs.read_spec(path)
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


def require_device(device: str) -> None:
    """Checks, before a model is loaded, that PyTorch can use a device.

    Raises:
        InputError: there is no such kind of device, or no such GPU.
    """
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: expected cpu or cuda, found {device[:40]!r}") from None
    if kind.type == "cuda" and not (kind.index or 0) < torch.cuda.device_count():
        raise no_gpu_error("PyTorch")


def load_model(path: Path, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """A causal LM on ``device``, in evaluation mode, its weights frozen.

    Args:
        path: a Transformers folder, or a GGUF file, whose weights are dequantized.
        device: "cpu" or "cuda".
        dtype: of the weights: "float32", "bfloat16", or "4bit" (NF4 of bitsandbytes, folders only).

    Raises:
        InputError: there is no such device, the folder does not hold a causal LM, or Transformers cannot load the GGUF file.
        MissingExtraError: torch, transformers or bitsandbytes is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train") from None
    require_device(device)
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
        weight_tables.weight_files(path)
        options = _four_bit(device) if dtype == "4bit" else {"dtype": torch.float32}
        try:
            model = load_pretrained_model(AutoModelForCausalLM, path, **options)
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


def text_config(config: Any) -> Any:
    """The language model's part of a Transformers config."""
    return config.get_text_config(decoder=True)
