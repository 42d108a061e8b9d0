"""PEFT adapter folders: soft prompts and trained K/V prefixes in, patches out again.

Only ``adapter_config.json`` and ``adapter_model.safetensors`` are read, no pickle ever, and of the settings only those that say
what the one tensor means. A prefix needs no model weights: PEFT saves it projected, as the keys and values themselves, which it
injects without RoPE and behind which text starts at position P. A ``KVSeed`` is injected in the same way.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from edgepatch.converters.peft.settings import (
    CARTRIDGE,
    PEFT_TYPES,
    PEFT_VERSION,
    PREFIX_TUNING,
    PROMPT_TUNING,
    READ_TYPES,
    SOFT_PROMPTS,
    AdapterConfig,
    read_config,
)
from edgepatch.errors import InputError, MismatchError
from edgepatch.files.reading import read_bounded
from edgepatch.files.writing import new_folder
from edgepatch.patch.file import MAX_FILE_BYTES, PROMPT_TENSOR, Patch
from edgepatch.tensors import KVSeed, ModelSpec, SoftPrompt

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


# Reading.


def read_adapter(folder: Path, spec: ModelSpec, name: str = "", version: str = "0.1.0") -> Patch:
    """A patch from a PEFT folder of type PROMPT_TUNING, P_TUNING, PREFIX_TUNING or CARTRIDGE.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        spec: the model that the adapter was trained for (``hf.read_spec``).
        name: of the patch; the folder's name when empty.
        version: of the patch (SemVer).

    Returns:
        A patch with a soft prompt, or with a K/V seed in the adapter's dtype (bfloat16 becomes float32, which is exact). Its
        training record names the source.

    Raises:
        InputError: a file is missing, damaged, too large, a pickle, or of a type that is no patch.
        MismatchError: the adapter was trained for a model of another shape.
    """
    _require_folder(folder)
    config = read_config(folder / CONFIG_FILE)
    data = read_bounded(folder / TENSOR_FILE, MAX_FILE_BYTES, "tensors", hint="name a PEFT adapter folder")
    _require_shape_of(config, spec)
    embeddings = _read_tensor(folder / TENSOR_FILE, data, (config.num_virtual_tokens, _width(config.peft_type, spec)))
    record = {
        "source": {
            "format": "peft",
            "peft_type": config.peft_type,
            "peft_version": config.peft_version,
            "base_model_name_or_path": config.base_model_name_or_path,
            "num_attention_heads": config.num_attention_heads,
            "adapter_sha256": hashlib.sha256(data).hexdigest(),
        }
    }
    name = name or folder.resolve().name
    if config.peft_type in SOFT_PROMPTS:
        return Patch(name, version, spec, SoftPrompt(embeddings.astype(np.float32)), training=record)
    return Patch(name, version, spec, None, split_prefix(embeddings, spec), training=record)


def split_prefix(embeddings: NDArray[Any], spec: ModelSpec) -> KVSeed:
    """Keys and values from PEFT's flat prefix.

    Args:
        embeddings: (P, L * 2 * K * H), float16 or float32; keys as they are injected, no RoPE applied afterwards.
        spec: gives L, K and H.

    Returns:
        L keys and values (K, P, H) of the same dtype.

    Source: ``PeftModel.get_prompt`` and ``tuners/cartridge/utils.py`` of PEFT 0.21.2.
    """
    shape = (len(embeddings), spec.num_hidden_layers, 2, spec.num_key_value_heads, spec.head_dim)
    layers = embeddings.reshape(shape).transpose(1, 2, 3, 0, 4)  # (L, 2, K, P, H)
    return KVSeed(
        tuple(np.ascontiguousarray(layer[0]) for layer in layers),
        tuple(np.ascontiguousarray(layer[1]) for layer in layers),
    )


def flatten_prefix(seed: KVSeed) -> NDArray[Any]:
    """The inverse of ``split_prefix``: (P, L * 2 * K * H) of the seed's dtype."""
    layers = np.stack([np.stack(pair) for pair in zip(seed.keys, seed.values, strict=True)])  # (L, 2, K, P, H)
    return np.ascontiguousarray(layers.transpose(3, 0, 1, 2, 4)).reshape(seed.num_virtual_tokens, -1)


def _require_folder(folder: Path) -> None:
    """Refuses pickles by name, before anything is opened."""
    if folder.is_file():
        hint = (
            "pickles are never read; save the adapter as safetensors" if folder.suffix in PICKLES else "name its folder"
        )
        raise InputError(f"{folder}: expected a PEFT folder, found a file", hint)
    if (folder / TENSOR_FILE).is_file() or not folder.is_dir():
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise InputError(
            f"{folder}: expected {TENSOR_FILE}, found the pickle {pickles[0]}, which can run code when it is read",
            hint="save the adapter as safetensors with PEFT, where you trust its origin",
        )


def _width(peft_type: str, spec: ModelSpec) -> int:
    if peft_type in SOFT_PROMPTS:
        return spec.hidden_size
    return spec.num_hidden_layers * 2 * spec.num_key_value_heads * spec.head_dim


def _model_settings(peft_type: str, spec: ModelSpec) -> dict[str, int]:
    """What PEFT writes of the model: for a prefix, heads are key/value heads."""
    if peft_type in SOFT_PROMPTS:
        return {"num_layers": spec.num_hidden_layers, "token_dim": spec.hidden_size}
    heads = spec.num_key_value_heads
    return {"num_layers": spec.num_hidden_layers, "token_dim": heads * spec.head_dim, "num_attention_heads": heads}


def _require_shape_of(config: AdapterConfig, spec: ModelSpec) -> None:
    settings = {key: (getattr(config, key), have) for key, have in _model_settings(config.peft_type, spec).items()}
    differences: dict[str, tuple[object, object]] = {
        k: v for k, v in settings.items() if v[0] is not None and v[0] != v[1]
    }
    if differences:
        raise MismatchError(differences)


def _read_tensor(path: Path, data: bytes, shape: tuple[int, int]) -> NDArray[Any]:
    """The one tensor; the parser checks that header and file agree before anything is made of either."""
    try:
        tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is damaged or truncated: {error}", hint="get the adapter again") from None
    if [name for name, _ in tensors] != [PROMPT_TENSOR]:
        names = ", ".join(sorted(name for name, _ in tensors)[:4]) or "none"
        raise InputError(
            f"{path}: expected the tensor {PROMPT_TENSOR} alone, found {names}", hint="get the adapter again"
        )
    tensor = tensors[0][1]
    if (found_shape := tuple(tensor["shape"])) != shape:
        raise InputError(
            f"{path}: {PROMPT_TENSOR}: expected {shape}, found {found_shape}", hint="get the adapter again"
        )
    if tensor["dtype"] not in ("F32", "F16", "BF16"):
        raise InputError(f"{path}: {PROMPT_TENSOR}: expected F32, F16 or BF16, found {tensor['dtype']}")
    if tensor["dtype"] == "BF16":  # the upper half of a float32
        values = (np.frombuffer(tensor["data"], "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(tensor["data"], "<f4" if tensor["dtype"] == "F32" else "<f2")
    if not np.isfinite(values).all():
        raise InputError(f"{path}: {PROMPT_TENSOR} holds NaN or infinity", hint="train the adapter again")
    return values.reshape(shape)


# Writing.


def write_adapter(patch: Patch, folder: Path, base_model_name: str | None = None, peft_type: str | None = None) -> str:
    """Writes a patch as a PEFT folder that ``PeftModel.from_pretrained`` loads; the same patch gives the same bytes.

    Args:
        patch: its soft prompt becomes PROMPT_TUNING; a trained prefix becomes what it came as, else PREFIX_TUNING.
        folder: a new or empty folder; it appears complete or not at all.
        base_model_name: ``base_model_name_or_path``; ``None`` for the name that an imported patch came with.
        peft_type: one of ``PEFT_TYPES``, to choose between a patch's soft prompt and its K/V seed.

    Returns:
        The type written.

    Raises:
        InputError: the patch lacks what the type holds, or the folder cannot be written.
    """
    source = _source(patch)
    peft_type = peft_type or (PROMPT_TUNING if patch.soft_prompt else source.get("peft_type", PREFIX_TUNING))
    tensor = _flat_tensor(patch, peft_type)
    settings = _settings(patch, peft_type, base_model_name or source.get("base_model_name_or_path"))
    files = {
        CONFIG_FILE: json.dumps(settings, indent=2, sort_keys=True).encode("ascii"),
        TENSOR_FILE: safetensors.numpy.save({PROMPT_TENSOR: tensor}, metadata={"format": "pt"}),
    }
    with new_folder(folder) as unfinished:
        for name, data in files.items():
            (unfinished / name).write_bytes(data)
    return peft_type


def _source(patch: Patch) -> dict[str, Any]:
    """The record that ``read_adapter`` left, or nothing."""
    source = patch.training.get("source")
    is_peft = isinstance(source, dict) and source.get("format") == "peft" and source.get("peft_type") in READ_TYPES
    return dict(source) if is_peft and isinstance(source, dict) else {}


def _flat_tensor(patch: Patch, peft_type: str) -> NDArray[Any]:
    if peft_type not in PEFT_TYPES:
        raise InputError(f"peft_type: expected {', '.join(PEFT_TYPES)}, found {peft_type!r}")
    if peft_type == PROMPT_TUNING:
        if patch.soft_prompt is None:
            raise InputError(
                f"patch {patch.name} {patch.version} has no soft prompt", hint=f"write it as {PREFIX_TUNING}"
            )
        return np.ascontiguousarray(patch.soft_prompt.embeddings)
    if patch.kv_seed is None:
        raise InputError(
            f"patch {patch.name} {patch.version} has no KV seed", hint="edgepatch convert seed computes it"
        )
    return flatten_prefix(patch.kv_seed)


def _settings(patch: Patch, peft_type: str, base_model_name: str | None) -> dict[str, Any]:
    """``adapter_config.json``; query heads that no patch knows stay open, and PEFT fills them in when it loads."""
    own: dict[str, dict[str, Any]] = {
        PROMPT_TUNING: {
            "num_attention_heads": _source(patch).get("num_attention_heads"),
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": None,
        },
        PREFIX_TUNING: {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False},
        CARTRIDGE: {"num_frozen_tokens": 1},
    }
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "modules_to_save": None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": patch.num_virtual_tokens,
        "peft_type": peft_type,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": "CAUSAL_LM",
        **own[peft_type],
        **_model_settings(peft_type, patch.base),
    }
