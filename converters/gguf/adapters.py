"""A patch as a GGUF file with ``general.type = adapter``, for registries and hubs that index GGUF by its metadata.

It is the patch file in another container: the same tensors, manifest and signatures, so that reading it back gives the patch whose
digest it names. No runtime loads it: llama.cpp refuses it as a LoRA, by its ``adapter.type``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from edgepatch.converters import architectures
from edgepatch.converters.gguf import encoding
from edgepatch.converters.gguf.encoding import TensorEntry
from edgepatch.converters.gguf.header import TensorInfo, parse_header
from edgepatch.errors import PatchFormatError, UntrustedError
from edgepatch.files.canonical import canonical_json, parse_json
from edgepatch.files.reading import read_bounded
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import MAX_FILE_BYTES, METADATA_KEY, SIGNATURES_KEY, Patch, parse_patch, patch_bytes
from edgepatch.trust.signatures import Signature

SOFT_PROMPT, KV_SEED = "edgepatch.soft_prompt", "edgepatch.kv_seed"
"""``adapter.type``: what the patch was trained as."""

DIGEST_KEY, BASE_KEY, TOKENS_KEY = "edgepatch.patch_digest", "edgepatch.base", "edgepatch.num_virtual_tokens"
BASE_NAME_KEY = "general.base_model.0.name"
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # by ggml type
ALIGNMENT = 32


def metadata(patch: Patch, base_model_name: str) -> dict[str, str | int]:
    """Every key of the file, in its order.

    Args:
        patch: the patch.
        base_model_name: ``general.base_model.0.name``.
    """
    texts, _ = _contents(patch)
    return {
        "general.architecture": architectures.gguf_name(patch.base.model_type),
        "general.type": "adapter",
        "general.name": patch.name,
        "general.version": patch.version,
        "general.base_model.count": 1,
        BASE_NAME_KEY: base_model_name,
        "adapter.type": SOFT_PROMPT if patch.soft_prompt else KV_SEED,
        DIGEST_KEY: patch.digest,
        BASE_KEY: canonical_json(patch.base.as_dict()).decode(),
        TOKENS_KEY: patch.num_virtual_tokens,
        **texts,
    }


def _contents(patch: Patch) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """(manifest and signatures by their keys, tensors) of the patch file."""
    data = patch_bytes(patch)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {str(key): str(text) for key, text in header["__metadata__"].items()}, safetensors.numpy.load(data)


def write_gguf(patch: Patch, target: Path, base_model_name: str | None = None) -> None:
    """Writes the patch as a GGUF adapter file; the same patch gives the same bytes.

    Args:
        patch: the patch.
        target: the GGUF file; it appears complete or not at all.
        base_model_name: what a hub calls the base; ``None`` for its ``model_type``.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(target, _file_bytes(patch, base_model_name or patch.base.model_type))


def _file_bytes(patch: Patch, base_model_name: str) -> bytes:
    entries = [encoding.entry(key, value) for key, value in metadata(patch, base_model_name).items()]
    tensors = dict(sorted(_contents(patch)[1].items()))
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    table = {name: TensorEntry(t.shape, kinds[t.dtype], t.nbytes) for name, t in tensors.items()}
    values = [t.tobytes() + encoding.padding(t.nbytes, ALIGNMENT) for t in tensors.values()]
    return encoding.file_start(entries, table, ALIGNMENT) + b"".join(values)


def read_gguf(path: Path) -> Patch:
    """The patch in a GGUF adapter file, bit for bit the one that was written.

    Whatever the file says beside the base model's name must be what the patch gives, down to the last byte.

    Raises:
        InputError: the file is missing or cannot be read.
        PatchFormatError: the file is damaged, holds no patch, or contradicts itself.
    """
    data = read_bounded(path, MAX_FILE_BYTES, "GGUF adapter", oversize=PatchFormatError, hint="name a GGUF file")
    try:
        return _parse(path, data)
    except PatchFormatError as error:
        raise PatchFormatError(f"{path}: {error}", error.hint or "get the file again from its vendor") from None
    except (ValueError, TypeError) as error:
        raise PatchFormatError(f"{path}: damaged, or no GGUF adapter file of edgepatch: {error}") from None


def _parse(path: Path, data: bytes) -> Patch:
    header = parse_header(path, data)
    entries = header.metadata
    kind = entries.get("adapter.type")
    if kind not in (SOFT_PROMPT, KV_SEED):
        raise PatchFormatError(
            f"no GGUF adapter file of edgepatch: adapter.type: expected {SOFT_PROMPT} or {KV_SEED}, found {kind!r:.80}",
            hint="it is no patch",
        )
    tensors = {name: _tensor(data, name, info) for name, info in header.tensors.items()}
    patch_file = safetensors.numpy.save(tensors, metadata={METADATA_KEY: str(entries.get(METADATA_KEY))})
    patch = _with_signatures(parse_patch(patch_file), entries.get(SIGNATURES_KEY))
    base_model_name = str(entries.get(BASE_NAME_KEY))
    for key, value in metadata(patch, base_model_name).items():
        if type(entries.get(key)) is not type(value) or entries[key] != value:
            raise PatchFormatError(f"{key}: the patch gives {value!r:.200}, found {entries.get(key)!r:.200}")
    if _file_bytes(patch, base_model_name) != data:
        raise PatchFormatError("the bytes are not those that the patch gives")
    return patch


def _tensor(data: bytes, name: str, info: TensorInfo) -> NDArray[Any]:
    if info.ggml_type not in DTYPES:
        raise ValueError(f"tensor {name!r} has the type {info.ggml_type}")
    return np.frombuffer(data, DTYPES[info.ggml_type], prod(info.shape), info.offset).reshape(info.shape)


def _with_signatures(patch: Patch, text: object) -> Patch:
    """The patch with what the file holds under ``SIGNATURES_KEY``, if anything."""
    if text is None:
        return patch
    values = parse_json(str(text).encode(), "signatures")
    if not isinstance(values, list):
        raise PatchFormatError(f"signatures: expected a list, found {type(values).__name__}")
    try:
        return replace(patch, signatures=tuple(Signature.from_dict(value) for value in values))
    except UntrustedError as error:
        raise PatchFormatError(f"signatures: {error}") from None
