"""LoRA adapters of PEFT for the runtimes: a GGUF file that llama.cpp applies unmerged, and a Transformers folder with the adapter merged.

They are what a user would take in place of a patch. Source of the file's form: llama.cpp's convert_lora_to_gguf.py.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import rope
from edgepatch.converters.dequantization import dequantize
from edgepatch.converters.gguf.writer import CONVERTED, convert_folder
from edgepatch.converters.hf import folders
from edgepatch.converters.peft.adapters import CONFIG_FILE, TENSOR_FILE
from edgepatch.converters.peft.settings import MAX_CONFIG_BYTES
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.files.strict_json import read_json
from edgepatch.files.writing import new_folder, write_atomically

IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings that are read below, or say how an adapter was trained. Any other changes what it computes, unless it is empty."""

HARMLESS = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}
"""Setting -> values that change nothing; other starts ("pissa") change the base as well."""

TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Projection in GGUF whose rows llama.cpp may order otherwise -> setting with the number of its heads."""


@dataclass(frozen=True)
class LoRA:
    """What an adapter adds: ``scale * B @ A`` to the weight of each module.

    Attributes:
        rank: r.
        scale: of the product.
        factors: module of the base ("model.layers.0.mlp.up_proj") -> (A (r, in), B (out, r)), float32.
    """

    rank: int
    scale: float
    factors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def read_lora(folder: Path, base: Path) -> LoRA:
    """A LoRA adapter of PEFT, checked against its base.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: Transformers folder of the model that it was trained for.

    Raises:
        InputError: a file is missing or damaged, the adapter is more than a plain LoRA (DoRA, ranks by layer, biases), or the base has
            no such module, or one of another shape.
        MissingExtraError: torch or safetensors is not installed.
    """
    return require_lora_of(folder, {f"{module}.weight": shape for module, shape in _shapes(base).items()})


def require_lora_of(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> LoRA:
    """A LoRA adapter of PEFT, checked against the weights of its base.

    Args:
        folder: as for ``read_lora``.
        shapes: name of each weight of the base ("model.layers.0.mlp.up_proj.weight") -> its shape.

    Raises:
        InputError: as ``read_lora``.
    """
    settings = _read_settings(folder / CONFIG_FILE)
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    tensors = _read_tensors(folder / TENSOR_FILE)
    factors = {}
    for module in sorted({module for module, _ in tensors}):
        if {"A", "B"} - {part for name, part in tensors if name == module}:
            raise InputError(f"{folder}: {module} has one of lora_A and lora_B alone", hint="save the adapter again")
        factors[module] = tensors[module, "A"], tensors[module, "B"]
    lora = LoRA(rank, alpha / (sqrt(rank) if settings.get("use_rslora") else rank), factors)
    _require_fits(folder, lora, shapes)
    return lora


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path, MAX_CONFIG_BYTES, what="settings", hint="name a PEFT adapter folder")
        kind, rank, alpha = (settings[key] for key in ("peft_type", "r", "lora_alpha"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no settings of a LoRA adapter: {error}", hint="save the adapter with PEFT again"
        ) from None
    if kind != "LORA" or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(f"{path}: expected LORA with a rank and an alpha, found {kind}, {rank!r} and {alpha!r}")
    others = sorted(
        key for key, value in settings.items() if value and key not in IGNORED and value not in HARMLESS.get(key, ())
    )
    if others:
        raise InputError(
            f"{path}: expected a plain LoRA, found {others[0]} {settings[others[0]]!r}",
            hint="merge it into the base instead",
        )
    return dict(settings)


def _read_tensors(path: Path) -> dict[tuple[str, str], NDArray[np.float32]]:
    """(module, "A" or "B") -> matrix."""
    factors = {}
    for name, tensor in _opened(path):
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise InputError(
                f"{path}: expected lora_A and lora_B of linear layers, found {name}",
                hint="merge it into the base instead",
            )
        matrix = np.ascontiguousarray(tensor[:].float().numpy())
        if not np.isfinite(matrix).all():
            raise InputError(f"{path}: {name} holds NaN or infinity", hint="train the adapter again")
        factors[match[1], match[2]] = matrix
    if not factors:
        raise InputError(f"{path}: it holds no tensors", hint="save the adapter again")
    return factors


def _shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Module -> shape of its weight."""
    return {
        name.removesuffix(".weight"): tuple(tensor.get_shape())
        for shard in sorted(base.glob("*.safetensors"))
        for name, tensor in _opened(shard)
    }


def _opened(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, slice) of every tensor in a safetensors file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtraError("safetensors", "convert") from None
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                yield name, tensors.get_slice(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="save it with safetensors again") from None


def _require_fits(folder: Path, lora: LoRA, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for module, (down, up) in lora.factors.items():
        if f"{module}.weight" not in shapes:
            raise InputError(
                f"{folder}: the base has no weight of its own for {module}", hint="take the base that it was trained on"
            )
        rows, columns = shapes[f"{module}.weight"]
        expected, actual = ((lora.rank, columns), (rows, lora.rank)), (down.shape, up.shape)
        if actual != expected:
            raise InputError(
                f"{folder}: {module}: expected factors {expected}, found {actual}",
                hint="take the base that it was trained on",
            )


# llama.cpp.


def write_lora(folder: Path, base: Path, target: Path, type_name: str = "F32") -> LoRA:
    """Writes an adapter as the GGUF file that llama.cpp applies beside the weights of its base.

    Args:
        folder: of the adapter.
        base: Transformers folder of its base, of a kind that ``gguf.writer.convert_folder`` converts.
        target: the GGUF file; it appears complete or not at all.
        type_name: "F32" or "F16".

    Returns:
        What was written.

    Raises:
        InputError: the adapter or the base cannot be read or converted or do not fit each other, or the file cannot be written.
        MissingExtraError: gguf, torch or safetensors is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    dtypes = {"F32": np.float32, "F16": np.float16}
    if type_name not in dtypes:
        raise InputError(f"type: expected F32 or F16, found {type_name!r}")
    lora, config, spec = read_lora(folder, base), folders.read_config(base), folders.read_spec(base)
    if config["model_type"] not in CONVERTED:
        raise InputError(f"{base}: model_type: expected one of {', '.join(CONVERTED)}, found {config['model_type']}")
    with tempfile.TemporaryDirectory() as temporary:
        writer = gguf.GGUFWriter(Path(temporary) / "lora.gguf", spec.model_type)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scale * lora.rank)  # llama.cpp divides by the rank
            for name, tensor in _tensors(
                lora, {**config, "num_key_value_heads": spec.num_key_value_heads}, spec.model_type
            ):
                writer.add_tensor(name, tensor.astype(dtypes[type_name]))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        write_atomically(target, (Path(temporary) / "lora.gguf").read_bytes())
    return lora


def _tensors(lora: LoRA, config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Factors by their names in GGUF. B's rows are those of the weight, so they take its order."""
    import gguf

    kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    for module, (down, up) in lora.factors.items():
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise InputError(
                f"the adapter changes {module}, which has no name in GGUF", hint="train it on the linear layers"
            )
        heads = HEADS.get(name.split(".")[-2])
        yield f"{name}.lora_a", down
        yield f"{name}.lora_b", rope.projection_to_llamacpp(up, config[heads], architecture) if heads else up


# Merged.


def merge_for_runtime(base: Path, adapter: Path, folder: Path) -> Path:
    """A model with an adapter merged in full precision, in the form that the base's own runtime takes.

    Args:
        base: Transformers folder or GGUF file, whose weights are dequantized.
        adapter: PEFT folder of a LoRA for it.
        folder: gets what is made.

    Returns:
        A Transformers folder for a folder, a GGUF file in F16 for a GGUF file.

    Raises:
        InputError: as ``merge_lora``, or the base is of another kind.
        MissingExtraError: as ``merge_lora``.
    """
    merged = folder / "merged"
    if base.is_dir():
        if not (base / "config.json").is_file() or not list(base.glob("*.safetensors")):
            raise InputError(
                f"{base}: a LoRA adapter is merged into a Transformers folder or a GGUF file, found neither",
                hint="name the model that the adapter was trained on",
            )
        merge_lora(base, adapter, merged)
        return merged
    plain = folder / "plain"
    dequantize(base, plain)
    merge_lora(plain, adapter, merged)
    shutil.rmtree(plain)
    convert_folder(merged, folder / "merged-F16.gguf", "F16")
    shutil.rmtree(merged)
    return folder / "merged-F16.gguf"


def merge_lora(base: Path, folder: Path, target: Path) -> LoRA:
    """Writes the base with an adapter added to its weights, in float32.

    Args:
        base: Transformers folder.
        folder: of the adapter.
        target: a new Transformers folder; it appears complete or not at all.

    Returns:
        What was merged.

    Raises:
        InputError: the adapter or the base cannot be read or do not fit each other, or the folder exists or cannot be written.
        MissingExtraError: torch, transformers or safetensors is not installed.
    """
    lora, model = read_lora(folder, base), folders.load_model(base)
    import torch

    with torch.no_grad():
        for module, (down, up) in lora.factors.items():
            weight = model.get_submodule(module).weight
            weight += lora.scale * (torch.from_numpy(up) @ torch.from_numpy(down))
    with new_folder(target) as unfinished:
        for file in base.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, unfinished / file.name)
        model.save_pretrained(unfinished)
    return lora
