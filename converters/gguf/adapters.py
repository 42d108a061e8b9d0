"""A patch as a GGUF file with ``general.type = adapter``, for registries and hubs that index GGUF by its metadata.

It is the patch file in another container: the same tensors, manifest and signatures, so that reading it back gives the patch whose
digest it names. No runtime loads it: llama.cpp refuses it as a LoRA, by its ``adapter.type``.
"""

from __future__ import annotations

import json
import struct
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from edgepatch.converters import architectures
from edgepatch.errors import InputError, MissingExtraError, PatchFormatError, UntrustedError
from edgepatch.files.canonical import canonical_json, parse_json
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import MAX_FILE_BYTES, METADATA_KEY, SIGNATURES_KEY, Patch, parse_patch, patch_bytes
from edgepatch.trust.signatures import Signature

SOFT_PROMPT, KV_SEED = "edgepatch.soft_prompt", "edgepatch.kv_seed"
"""``adapter.type``: what the patch was trained as."""

DIGEST_KEY, BASE_KEY, TOKENS_KEY = "edgepatch.patch_digest", "edgepatch.base", "edgepatch.num_virtual_tokens"
BASE_NAME_KEY = "general.base_model.0.name"
UINT32, STRING = 4, 8  # value types of GGUF
DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # by ggml type
ALIGNMENT = 32
MAX_ENTRIES = 8192


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
        MissingExtraError: the gguf package is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    entries = metadata(patch, base_model_name or patch.base.model_type)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.gguf"
        writer = GGUFWriter(file, str(entries.pop("general.architecture")))  # which writes that key first
        try:
            for key, value in entries.items():
                writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
            for name, tensor in sorted(_contents(patch)[1].items()):
                writer.add_tensor(name, np.ascontiguousarray(tensor))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        write_atomically(target, file.read_bytes())


def read_gguf(path: Path) -> Patch:
    """The patch in a GGUF adapter file, bit for bit the one that was written.

    Every key but the base model's name is compared with what the patch gives, its digest among them.

    Raises:
        InputError: the file is missing or cannot be read.
        PatchFormatError: the file is damaged, holds no patch, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="name a GGUF file") from error
    try:
        if len(data) > MAX_FILE_BYTES:
            raise PatchFormatError(f"expected at most {MAX_FILE_BYTES} bytes, found more")
        return _parse(data)
    except PatchFormatError as error:
        raise PatchFormatError(f"{path}: {error}", error.hint or "get the file again from its vendor") from None
    except (ValueError, struct.error) as error:
        raise PatchFormatError(f"{path}: damaged, or no GGUF adapter file of edgepatch: {error}") from None


def _parse(data: bytes) -> Patch:
    entries, tensors = _Reader(data).file()
    kind = entries.get("adapter.type")
    if kind not in (SOFT_PROMPT, KV_SEED):
        raise PatchFormatError(
            f"adapter.type: expected {SOFT_PROMPT} or {KV_SEED}, found {kind!r}", hint="it is no patch"
        )
    patch_file = safetensors.numpy.save(tensors, metadata={METADATA_KEY: str(entries.get(METADATA_KEY))})
    patch = _with_signatures(parse_patch(patch_file), entries.get(SIGNATURES_KEY))
    expected = metadata(patch, str(entries.get(BASE_NAME_KEY)))
    wrong = sorted(key for key in expected.keys() | entries.keys() if expected.get(key) != entries.get(key))
    if wrong:
        raise PatchFormatError(
            f"{wrong[0]}: the patch gives {expected.get(wrong[0])!r}, found {entries.get(wrong[0])!r}"
        )
    return patch


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


class _Reader:
    """The part of GGUF that ``write_gguf`` uses: texts, counts, and float tensors that follow one another.

    Raises:
        ValueError: a length, type or position that no such file has; nothing is allocated by what the file declares.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def file(self) -> tuple[dict[str, str | int], dict[str, NDArray[Any]]]:
        """(metadata, tensors)."""
        magic, version, num_tensors, num_entries = self._numbers("4sIQQ")
        if magic != b"GGUF" or version != 3 or max(num_tensors, num_entries) > MAX_ENTRIES:
            raise ValueError(f"it starts with {magic!r}, version {version}, {num_tensors} tensors, {num_entries} keys")
        entries = [(self._string(), self._value()) for _ in range(num_entries)]
        table = [self._tensor_info() for _ in range(num_tensors)]
        self._align()
        start = self.position
        tensors = {name: self._tensor(shape, dtype, start + offset) for name, shape, dtype, offset in table}
        if len(dict(entries)) != num_entries or len(tensors) != num_tensors or self.position != len(self.data):
            raise ValueError("a name appears twice, or bytes follow the last tensor")
        return dict(entries), tensors

    def _take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} bytes expected at {self.position}, the file ends at {len(self.data)}")
        self.position += count
        return self.data[self.position - count : self.position]

    def _numbers(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack("<" + codes, self._take(struct.calcsize("<" + codes)))

    def _string(self) -> str:
        return self._take(self._numbers("Q")[0]).decode("utf-8")

    def _value(self) -> str | int:
        (kind,) = self._numbers("I")
        if kind not in (UINT32, STRING):
            raise ValueError(f"a value of type {kind}")
        return self._string() if kind == STRING else int(self._numbers("I")[0])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], np.dtype[Any], int]:
        name, (dimensions,) = self._string(), self._numbers("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = self._numbers("Q" * dimensions)[::-1]
        kind, offset = self._numbers("IQ")
        if kind not in DTYPES:
            raise ValueError(f"tensor {name!r} has the type {kind}")
        return name, shape, DTYPES[kind], offset

    def _tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any], position: int) -> NDArray[Any]:
        if position != self.position:
            raise ValueError(f"a tensor starts at {position}, expected at {self.position}")
        tensor = np.frombuffer(self._take(prod(shape) * dtype.itemsize), dtype).reshape(shape)
        self._align()
        return tensor

    def _align(self) -> None:
        if any(self._take(-self.position % ALIGNMENT)):
            raise ValueError(f"the padding before {self.position} is not empty")
