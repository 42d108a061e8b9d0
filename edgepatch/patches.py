"""Reads and writes the patch file: one safetensors file with the manifest as canonical JSON in its metadata.

This module alone knows the file. Reading is closed: unknown keys, tensors, dtypes and versions are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from edgepatch.errors import InputError, PatchFormatError
from edgepatch.tensors import Canary, KVSeed, ModelSpec, SoftPrompt

FORMAT_VERSION = 1
METADATA_KEY = "edgepatch.manifest"
MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024
MANIFEST_KEYS = frozenset({"format_version", "name", "version", "base", "tensors", "training", "evaluation", "canary"})
PROMPT_TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class Patch:
    """A safety policy patch.

    Attributes:
        name: what the vendor calls it ("lab-detox").
        version: SemVer.
        base: the model it was made for.
        soft_prompt: the trained virtual tokens, or ``None`` for a trained K/V prefix.
        kv_seed: their keys and values, computed by the full-precision model, or ``None`` when not yet converted.
        training: how it was trained (JSON values).
        evaluation: what was measured (JSON values).
        canary: proves in every runtime that the patch is active; ``None`` only where no full-precision model was at hand.
    """

    name: str
    version: str
    base: ModelSpec
    soft_prompt: SoftPrompt | None
    kv_seed: KVSeed | None = None
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    canary: Canary | None = None

    def __post_init__(self) -> None:
        if self.soft_prompt is None and self.kv_seed is None:
            raise PatchFormatError("patch: expected a soft prompt or a KV seed, found neither")
        if self.soft_prompt is not None:
            expected = (self.num_virtual_tokens, self.base.hidden_size)
            if self.soft_prompt.embeddings.shape != expected:
                raise PatchFormatError(f"{PROMPT_TENSOR}: expected {expected}, found {self.soft_prompt.embeddings.shape}")
        if self.kv_seed is not None:
            layers = len(self.kv_seed.keys)
            shape = (self.base.num_key_value_heads, self.num_virtual_tokens, self.base.head_dim)
            if layers != self.base.num_hidden_layers or self.kv_seed.keys[0].shape != shape:
                found = f"{layers} layers of {self.kv_seed.keys[0].shape}"
                raise PatchFormatError(f"KV seed: expected {self.base.num_hidden_layers} layers of {shape}, found {found}")
        for prompt in self.canary.prompts if self.canary else ():
            if not all(0 <= i < self.base.vocab_size for i in (*prompt.tokens, *prompt.token_ids)):
                raise PatchFormatError(f"canary: expected ids below the vocabulary's {self.base.vocab_size}")

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        source = self.kv_seed or self.soft_prompt
        assert source is not None  # __post_init__
        return source.num_virtual_tokens

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the patch file's bytes."""
        return hashlib.sha256(patch_bytes(self)).hexdigest()


def _tensors(patch: Patch) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    if patch.soft_prompt is not None:
        tensors[PROMPT_TENSOR] = patch.soft_prompt.embeddings
    if patch.kv_seed is not None:
        for layer, (key, value) in enumerate(zip(patch.kv_seed.keys, patch.kv_seed.values, strict=True)):
            tensors[f"past_key_values.{layer}.key"] = key
            tensors[f"past_key_values.{layer}.value"] = value
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def patch_bytes(patch: Patch) -> bytes:
    """The file's bytes: the same patch gives the same bytes on every machine."""
    tensors = _tensors(patch)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": patch.name,
        "version": patch.version,
        "base": patch.base.as_dict(),
        "tensors": {name: hashlib.sha256(t.tobytes()).hexdigest() for name, t in tensors.items()},
        "training": patch.training,
        "evaluation": patch.evaluation,
        "canary": patch.canary.as_dict() if patch.canary else None,
    }
    return safetensors.numpy.save(tensors, metadata={METADATA_KEY: _canonical_json(manifest)})


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it has the old or the new content, never a part.

    Raises:
        InputError: the folder cannot be written or the disk is full; the old file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", hint="free space or name another folder") from error


def write_patch(patch: Patch, path: Path | str) -> str:
    """Writes the patch file and returns its digest.

    Raises:
        InputError: the file cannot be written; nothing is left half-written.
    """
    data = patch_bytes(patch)
    write_atomically(Path(path), data)
    return hashlib.sha256(data).hexdigest()


def read_patch(path: Path | str) -> Patch:
    """Reads and checks a patch file.

    Raises:
        InputError: the file is missing or cannot be read.
        PatchFormatError: the file is not a patch, is damaged, or is of an unknown version.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise PatchFormatError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {size}")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read patch {path}: {error.strerror}", hint="check the path") from error
    try:
        return parse_patch(data)
    except PatchFormatError as error:
        raise PatchFormatError(f"{path}: {error}", error.hint or "get the file again from its vendor") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise PatchFormatError("manifest: a key appears twice")
    return dict(pairs)


def _manifest(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise PatchFormatError("not a safetensors file: its header is missing or truncated")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_no_duplicates)
        metadata = header["__metadata__"]
        if set(metadata) != {METADATA_KEY}:
            raise PatchFormatError(f"expected the metadata key {METADATA_KEY} alone, found {sorted(metadata)}")
        manifest = json.loads(metadata[METADATA_KEY], object_pairs_hook=_no_duplicates)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PatchFormatError("not an edgepatch file: it has no readable manifest") from None
    if version != FORMAT_VERSION:
        raise PatchFormatError(f"format version: expected {FORMAT_VERSION}, found {version!r}", "update edgepatch")
    if set(manifest) != MANIFEST_KEYS:
        raise PatchFormatError(f"manifest: expected the keys {sorted(MANIFEST_KEYS)}, found {sorted(manifest)}")
    for key, kind in (("name", str), ("version", str), ("tensors", dict), ("training", dict), ("evaluation", dict)):
        if not isinstance(manifest[key], kind):
            raise PatchFormatError(f"manifest: {key} must be {kind.__name__}, found {type(manifest[key]).__name__}")
    return dict(manifest)


def parse_patch(data: bytes) -> Patch:
    """A patch from the bytes of its file.

    Raises:
        PatchFormatError: the bytes break the format.
    """
    manifest = _manifest(data)
    try:
        tensors = safetensors.numpy.load(data)
    except Exception as error:  # the parser raises its own type and KeyError for unknown dtypes
        raise PatchFormatError(f"damaged or truncated: {error}") from None
    digests = {name: hashlib.sha256(np.ascontiguousarray(t).tobytes()).hexdigest() for name, t in tensors.items()}
    for name in sorted(digests.keys() | manifest["tensors"].keys()):
        if digests.get(name) != manifest["tensors"].get(name):
            raise PatchFormatError(f"tensor {name}: its SHA-256 is not the one in the manifest")
    base = ModelSpec.from_dict(manifest["base"])
    layers = sum(name.endswith(".key") for name in tensors)
    expected = {f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")}
    if tensors.keys() - {PROMPT_TENSOR} != expected:
        raise PatchFormatError(f"tensors: expected {PROMPT_TENSOR} and past_key_values.N.key/value, found {sorted(tensors)}")
    try:
        seed = KVSeed(
            tuple(tensors[f"past_key_values.{i}.key"] for i in range(layers)),
            tuple(tensors[f"past_key_values.{i}.value"] for i in range(layers)),
        ) if layers else None  # fmt: skip
        prompt = SoftPrompt(tensors[PROMPT_TENSOR]) if PROMPT_TENSOR in tensors else None
    except InputError as error:
        raise PatchFormatError(str(error)) from None
    canary = None if manifest["canary"] is None else Canary.from_dict(manifest["canary"])
    patch = Patch(
        manifest["name"], manifest["version"], base, prompt, seed, manifest["training"], manifest["evaluation"], canary
    )  # fmt: skip
    if patch_bytes(patch) != data:
        raise PatchFormatError("the bytes are not in canonical form")
    return patch
