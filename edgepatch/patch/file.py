"""Reads and writes the patch file: one safetensors file with the manifest and its signatures in the metadata.

This module alone knows the file; docs/reference/format.md specifies it. Reading is closed and bounded: sizes are checked before anything is
read, unknown keys, tensors, dtypes and versions are refused, and every digest is taken from the bytes that are used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError, PatchFormatError, UntrustedError
from edgepatch.files.canonical import canonical_json, parse_json
from edgepatch.files.reading import read_bounded
from edgepatch.files.writing import write_atomically
from edgepatch.patch.manifest import ENTRIES, require_manifest
from edgepatch.patch.patch import PROMPT_TENSOR as PROMPT_TENSOR
from edgepatch.patch.patch import Patch as Patch
from edgepatch.patch.patch import signed as signed
from edgepatch.tensors import KVSeed, SoftPrompt
from edgepatch.trust.signatures import MANIFEST_TYPE, MAX_SIGNATURES, Signature

METADATA_KEY = "edgepatch.manifest"
SIGNATURES_KEY = "edgepatch.signatures"
PAYLOAD_TYPE = MANIFEST_TYPE
"""What a signature is over: the manifest's canonical bytes, as a document of this type."""

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


# Writing.


def _header(tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """The safetensors header in the one form that counts as canonical: the library's own order, wider dtypes first, then by name."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in _order(tensors):
        tensor = tensors[name]
        kind = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
        entries[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _order(tensors: dict[str, NDArray[Any]]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _metadata(patch: Patch) -> dict[str, str]:
    texts = {METADATA_KEY: patch.manifest.decode("utf-8")}
    if patch.signatures:
        ordered = sorted(patch.signatures, key=lambda s: (s.key_id, s.signature))
        texts[SIGNATURES_KEY] = canonical_json([s.as_dict() for s in ordered]).decode("utf-8")
    return texts


def patch_bytes(patch: Patch) -> bytes:
    """The file's bytes: the same patch gives the same bytes on every machine.

    Raises:
        PatchFormatError: a reader would refuse them; they are read here, so that nobody hands out what cannot be read.
    """
    tensors = patch.tensors
    header = _header(tensors, _metadata(patch))
    if len(header) > MAX_HEADER_BYTES:
        raise PatchFormatError(
            f"header: expected at most {MAX_HEADER_BYTES} bytes, found {len(header)}", "shorten the records"
        )
    data = b"".join([len(header).to_bytes(8, "little"), header, *(tensors[name].data for name in _order(tensors))])
    parse_patch(data)
    return data


def write_patch(patch: Patch, path: Path | str) -> str:
    """Writes the patch file and returns the patch's digest.

    Raises:
        InputError: the file cannot be written; nothing is left half-written.
    """
    write_atomically(Path(path), patch_bytes(patch))
    return patch.digest


# Reading.


def read_patch(path: Path | str) -> Patch:
    """Reads and checks a patch file; says nothing about who made it.

    Raises:
        InputError: the file is missing, no regular file, or cannot be read.
        PatchFormatError: the file is not a patch, is damaged, or is of an unknown version.
    """
    return parse_patch_file(Path(path), read_patch_bytes(Path(path)))


def read_patch_bytes(path: Path) -> bytes:
    """The bytes of what should be a patch file.

    Raises:
        InputError: the file is missing, no regular file, or cannot be read.
        PatchFormatError: it is too large.
    """
    return read_bounded(path, MAX_FILE_BYTES, "patch", oversize=PatchFormatError)


def parse_patch_file(path: Path, data: bytes) -> Patch:
    """As ``parse_patch``; errors name the file.

    Raises:
        PatchFormatError: the bytes break the format.
    """
    try:
        return parse_patch(data)
    except PatchFormatError as error:
        raise PatchFormatError(f"{path}: {error}", error.hint or "get the file again from its vendor") from None


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise PatchFormatError(f"expected at most {MAX_FILE_BYTES} bytes, found {size}")


def _split(data: bytes) -> tuple[dict[str, Any], int]:
    """(header, where the tensors start)."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise PatchFormatError("not a safetensors file: its header is missing, too long or truncated")
    header = parse_json(data[8 : 8 + length], "its header")
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise PatchFormatError("not an edgepatch file: it has no readable manifest")
    return header, 8 + length


def _parse_text(text: str, what: str) -> Any:
    """JSON that stands in the header as a text."""
    return parse_json(text.encode("utf-8", "surrogatepass"), what)  # half a pair is no UTF-8, which is then refused


def _read_manifest(metadata: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(map(str, metadata.keys() - {METADATA_KEY, SIGNATURES_KEY}))
    if unknown or not isinstance(metadata.get(METADATA_KEY), str):
        raise PatchFormatError(
            f"not an edgepatch file: expected the metadata key {METADATA_KEY}, found {unknown or 'none'}"
        )
    return require_manifest(_parse_text(metadata[METADATA_KEY], "its manifest"))


def _read_signatures(metadata: dict[str, Any]) -> tuple[Signature, ...]:
    if SIGNATURES_KEY not in metadata:
        return ()
    text = metadata[SIGNATURES_KEY]
    values = _parse_text(text, "its signatures") if isinstance(text, str) else None
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_SIGNATURES:
        raise PatchFormatError(f"signatures: expected a list of 1 to {MAX_SIGNATURES}")
    try:
        signatures = tuple(Signature.from_dict(value) for value in values)
    except UntrustedError as error:
        raise PatchFormatError(f"signatures: {error}") from None
    if len({signature.key_id for signature in signatures}) != len(signatures):
        raise PatchFormatError("signatures: expected one a key, found two")
    return signatures


def _read_tensors(data: bytes, header: dict[str, Any], start: int) -> dict[str, NDArray[Any]]:
    """Views of the file's own bytes, laid one behind the other with nothing between, before or after."""
    layers = sum(name.endswith(".key") for name in header)
    allowed = {f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")}
    names = header.keys() - {"__metadata__"}
    if names - {PROMPT_TENSOR} != allowed or not names:
        raise PatchFormatError(
            f"tensors: expected {PROMPT_TENSOR} and past_key_values.N.key/value, found {sorted(names)!r:.200}"
        )
    tensors = {}
    for name in names:
        entry = header[name]
        if (
            not isinstance(entry, dict)
            or set(entry) != {"dtype", "shape", "data_offsets"}
            or str(entry["dtype"]) not in DTYPES
        ):
            raise PatchFormatError(
                f"tensor {name}: expected dtype F32 or F16, a shape and two offsets, found {entry!r:.120}"
            )
        tensors[name] = _view(data, name, start, DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"])
    return tensors


def _view(data: bytes, name: str, start: int, dtype: np.dtype[Any], shape: Any, offsets: Any) -> NDArray[Any]:
    lists = isinstance(shape, list) and isinstance(offsets, list) and 1 <= len(shape) <= 3 and len(offsets) == 2
    numbers = [*shape, *offsets] if lists else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MAX_FILE_BYTES for n in numbers):
        raise PatchFormatError(f"tensor {name}: expected one to three whole numbers as shape, and two as offsets")
    count, (begin, end) = math.prod(shape), offsets
    if count * dtype.itemsize != end - begin or start + end > len(data) or not count:
        raise PatchFormatError(
            f"tensor {name}: {shape} of {dtype} at {begin} to {end} does not lie in the file: damaged or truncated"
        )
    tensor: NDArray[Any] = np.frombuffer(data, dtype, count, start + begin).reshape(shape)
    return tensor


def parse_patch(data: bytes) -> Patch:
    """A patch from the bytes of its file.

    Raises:
        PatchFormatError: the bytes break the format.
    """
    _check_size(len(data))
    header, start = _split(data)
    manifest = _read_manifest(header["__metadata__"])
    tensors = _read_tensors(data, header, start)
    patch = _assemble(manifest, tensors, _read_signatures(header["__metadata__"]))
    for name in sorted(patch.tensor_digests.keys() | manifest["tensors"].keys()):
        if patch.tensor_digests.get(name) != manifest["tensors"].get(name):
            raise PatchFormatError(f"tensor {name:.80}: its SHA-256 is not the one in the manifest")
    if patch.manifest.decode("utf-8") != header["__metadata__"][METADATA_KEY]:
        raise PatchFormatError("the manifest is not in canonical form")
    if _header(tensors, _metadata(patch)) != data[8:start] or start + sum(t.nbytes for t in tensors.values()) != len(
        data
    ):
        raise PatchFormatError("the bytes are not in canonical form")
    return patch


def _assemble(manifest: dict[str, Any], tensors: dict[str, NDArray[Any]], signatures: tuple[Signature, ...]) -> Patch:
    tensors = {name: tensor.astype(tensor.dtype.newbyteorder("="), copy=False) for name, tensor in tensors.items()}
    layers = range(sum(name.endswith(".key") for name in tensors))
    try:
        seed = (
            KVSeed(
                tuple(tensors[f"past_key_values.{i}.key"] for i in layers),
                tuple(tensors[f"past_key_values.{i}.value"] for i in layers),
            )
            if layers
            else None
        )
        prompt = SoftPrompt(tensors[PROMPT_TENSOR]) if PROMPT_TENSOR in tensors else None
    except InputError as error:
        raise PatchFormatError(str(error)) from None
    fields = {key: entry.read(manifest[key]) for key, entry in ENTRIES.items() if key in manifest}
    patch = Patch(soft_prompt=prompt, kv_seed=seed, signatures=signatures, **fields)
    if manifest["num_virtual_tokens"] != patch.num_virtual_tokens:
        raise PatchFormatError(
            f"num_virtual_tokens: expected {patch.num_virtual_tokens}, found {manifest['num_virtual_tokens']}"
        )
    return patch
