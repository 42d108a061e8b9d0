"""Reads and writes the patch file: one safetensors file with the manifest and its signatures in the metadata.

This module alone knows the file; docs/format.md specifies it. Reading is closed and bounded: sizes are checked before anything is
read, unknown keys, tensors, dtypes and versions are refused, and every digest is taken from the bytes that are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError, PatchFormatError, UntrustedError
from edgepatch.signing import Signature
from edgepatch.tensors import Canary, KVSeed, ModelSpec, SoftPrompt

FORMAT_VERSION = 1
METADATA_KEY = "edgepatch.manifest"
SIGNATURES_KEY = "edgepatch.signatures"
PAYLOAD_TYPE = "application/vnd.edgepatch.manifest+json"
"""What a signature is over: the manifest's canonical bytes, as a document of this type."""

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024
MAX_SIGNATURES = 16
MAX_DEPTH = 16
LARGEST_VALUE = 65504.0  # of float16
PROMPT_TENSOR = "prompt_embeddings"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
DIGEST = re.compile(r"[0-9a-f]{64}")
SEMVER = re.compile(
    r"(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})\.(0|[1-9]\d{0,9})(-[0-9A-Za-z.-]{1,64})?(\+[0-9A-Za-z.-]{1,64})?", re.ASCII
)
MAX_SEQUENCE = 2**53 - 1
"""The largest whole number that every JSON reader keeps."""


@dataclass(frozen=True)
class Patch:
    """A safety policy patch.

    Attributes:
        name: what the vendor calls it ("lab-detox"); letters, digits, ``._-``.
        version: SemVer, for people.
        base: the model it was made for.
        soft_prompt: the trained virtual tokens, or ``None`` for a trained K/V prefix.
        kv_seed: their keys and values, computed by the full-precision model, or ``None`` when not yet converted.
        training: how it was trained (JSON values): data digests, settings, software.
        evaluation: what was measured (JSON values), per quantization.
        canary: proves in every runtime that the patch is active; ``None`` only where no full-precision model was at hand.
        channel: line of releases for one base ("stable", "beta"); ``sequence`` grows within it.
        sequence: for machines: an older one is refused by a device that has seen a newer one.
        created: RFC 3339 in UTC ("2026-11-21T10:00:00Z"), or "" when not told.
        expires: the same; from then on a device warns. "" for never.
        license: SPDX expression, or "".
        summary: a sentence for people.
        chat_template: SHA-256 of the chat template that it was trained with, or "".
        supersedes: digests of the patches that it replaces.
        parts: digests of the patches that it was composed of, in order.
        signatures: over ``manifest``; not part of the digest.
    """

    name: str
    version: str
    base: ModelSpec
    soft_prompt: SoftPrompt | None
    kv_seed: KVSeed | None = None
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    canary: Canary | None = None
    channel: str = "stable"
    sequence: int = 1
    created: str = ""
    expires: str = ""
    license: str = ""
    summary: str = ""
    chat_template: str = ""
    supersedes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    signatures: tuple[Signature, ...] = ()

    def __post_init__(self) -> None:
        if self.soft_prompt is None and self.kv_seed is None:
            raise PatchFormatError("patch: expected a soft prompt or a KV seed, found neither")
        _check_tensors(self)
        _check_values(self)
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
    def manifest(self) -> bytes:
        """The canonical JSON that is signed; through the tensors' digests it covers the whole patch."""
        return _canonical_json(_manifest_of(self))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest: names the content, whoever signs it."""
        return hashlib.sha256(self.manifest).hexdigest()


def _check_tensors(patch: Patch) -> None:
    if patch.soft_prompt is not None:
        expected = (patch.num_virtual_tokens, patch.base.hidden_size)
        if patch.soft_prompt.embeddings.shape != expected:
            raise PatchFormatError(f"{PROMPT_TENSOR}: expected {expected}, found {patch.soft_prompt.embeddings.shape}")
    if patch.kv_seed is not None:
        layers = len(patch.kv_seed.keys)
        shape = (patch.base.num_key_value_heads, patch.num_virtual_tokens, patch.base.head_dim)
        if layers != patch.base.num_hidden_layers or patch.kv_seed.keys[0].shape != shape:
            found = f"{layers} layers of {patch.kv_seed.keys[0].shape}"
            raise PatchFormatError(f"KV seed: expected {patch.base.num_hidden_layers} layers of {shape}, found {found}")


def _check_values(patch: Patch) -> None:
    """Each field of the manifest that is no object of its own."""
    patterns = {"name": NAME, "version": SEMVER, "channel": CHANNEL}
    for key, pattern in patterns.items():
        if not isinstance(getattr(patch, key), str) or not pattern.fullmatch(getattr(patch, key)):
            raise PatchFormatError(f"manifest: {key}: expected {_EXPECTED[key]}, found {getattr(patch, key)!r}")
    if isinstance(patch.sequence, bool) or not isinstance(patch.sequence, int) or not 1 <= patch.sequence <= MAX_SEQUENCE:
        raise PatchFormatError(f"manifest: sequence: expected a whole number from 1, found {patch.sequence!r}")
    for key in ("created", "expires"):
        if getattr(patch, key) != "" and not is_timestamp(getattr(patch, key)):
            raise PatchFormatError(f"manifest: {key}: expected a time like 2026-11-21T10:00:00Z, found {getattr(patch, key)!r}")
    for key, most in (("license", 128), ("summary", 2000)):
        text = getattr(patch, key)
        if not isinstance(text, str) or len(text) > most or any(ord(c) < 32 and c != "\n" for c in text):
            raise PatchFormatError(f"manifest: {key}: expected a text of at most {most} characters, found {text!r:.80}")
    for key in ("supersedes", "parts"):
        if any(not isinstance(d, str) or not DIGEST.fullmatch(d) for d in getattr(patch, key)):
            raise PatchFormatError(f"manifest: {key}: expected SHA-256 digests, found {getattr(patch, key)!r:.80}")
    if patch.chat_template and not DIGEST.fullmatch(patch.chat_template):
        raise PatchFormatError(f"manifest: chat_template: expected a SHA-256 digest, found {patch.chat_template!r:.80}")


_EXPECTED = {
    "name": "1 to 64 letters, digits and ._-",
    "version": "a semantic version like 1.2.0",
    "channel": "1 to 32 lower-case letters, digits and -",
}


def is_timestamp(text: object) -> bool:
    """Whether a text is a time in UTC to the second: "2026-11-21T10:00:00Z"."""
    if not isinstance(text, str) or not re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", text, re.ASCII):
        return False
    try:
        datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return False
    return True


def _tensors(patch: Patch) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    if patch.soft_prompt is not None:
        tensors[PROMPT_TENSOR] = patch.soft_prompt.embeddings
    if patch.kv_seed is not None:
        for layer, (key, value) in enumerate(zip(patch.kv_seed.keys, patch.kv_seed.values, strict=True)):
            tensors[f"past_key_values.{layer}.key"] = key
            tensors[f"past_key_values.{layer}.value"] = value
    return {name: np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")) for name, tensor in tensors.items()}


def _canonical_json(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _manifest_of(patch: Patch) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "name": patch.name,
        "version": patch.version,
        "channel": patch.channel,
        "sequence": patch.sequence,
        "created": patch.created,
        "expires": patch.expires,
        "license": patch.license,
        "summary": patch.summary,
        "base": patch.base.as_dict(),
        "chat_template": patch.chat_template,
        "num_virtual_tokens": patch.num_virtual_tokens,
        "tensors": {name: hashlib.sha256(t).hexdigest() for name, t in _tensors(patch).items()},
        "training": patch.training,
        "evaluation": patch.evaluation,
        "canary": patch.canary.as_dict() if patch.canary else None,
        "supersedes": list(patch.supersedes),
        "parts": list(patch.parts),
    }


MANIFEST_KINDS: dict[str, type | tuple[type, ...]] = {
    "format_version": int, "name": str, "version": str, "channel": str, "sequence": int, "created": str, "expires": str,
    "license": str, "summary": str, "base": dict, "chat_template": str, "num_virtual_tokens": int, "tensors": dict,
    "training": dict, "evaluation": dict, "canary": (dict, type(None)), "supersedes": list, "parts": list,
}  # fmt: skip
"""The closed set of the manifest's keys, with what each holds."""


# Writing.


def _header(tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> bytes:
    """The safetensors header in the one form that counts as canonical: the library's own order, wider dtypes first, then by name."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in _order(tensors):
        tensor = tensors[name]
        kind = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.nbytes]}
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _order(tensors: dict[str, NDArray[Any]]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _metadata(patch: Patch) -> dict[str, str]:
    found = {METADATA_KEY: patch.manifest.decode("utf-8")}
    if patch.signatures:
        ordered = sorted(patch.signatures, key=lambda s: (s.key_id, s.signature))
        found[SIGNATURES_KEY] = _canonical_json([s.as_dict() for s in ordered]).decode("utf-8")
    return found


def patch_bytes(patch: Patch) -> bytes:
    """The file's bytes: the same patch gives the same bytes on every machine.

    Raises:
        PatchFormatError: the manifest is larger than a reader accepts.
    """
    tensors = _tensors(patch)
    header = _header(tensors, _metadata(patch))
    if len(header) > MAX_HEADER_BYTES:
        raise PatchFormatError(f"header: expected at most {MAX_HEADER_BYTES} bytes, found {len(header)}", "shorten the records")
    return b"".join([len(header).to_bytes(8, "little"), header, *(tensors[name].tobytes() for name in _order(tensors))])


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
    path = Path(path)
    data = _read_bounded(path)
    try:
        return parse_patch(data)
    except PatchFormatError as error:
        raise PatchFormatError(f"{path}: {error}", error.hint or "get the file again from its vendor") from None


def _read_bounded(path: Path) -> bytes:
    """The whole file through one handle; its size is known before anything is read."""
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"cannot read patch {path}: it is no regular file", hint="name the patch file itself")
            if status.st_size > MAX_FILE_BYTES:
                raise PatchFormatError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {status.st_size}")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read patch {path}: {error.strerror}", hint="check the path") from error
    if len(data) > MAX_FILE_BYTES:
        raise PatchFormatError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found more")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise PatchFormatError("a key appears twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise PatchFormatError(f"expected finite numbers, found {name}")


def _parse_json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except PatchFormatError as error:
        raise PatchFormatError(f"{what}: {error}") from None
    except (ValueError, RecursionError):
        raise PatchFormatError(f"not an edgepatch file: {what} is no readable JSON") from None


def _split(data: bytes) -> tuple[dict[str, Any], int]:
    """(header, where the tensors start)."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise PatchFormatError("not a safetensors file: its header is missing, too long or truncated")
    header = _parse_json(data[8 : 8 + length], "its header")
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise PatchFormatError("not an edgepatch file: it has no readable manifest")
    return header, 8 + length


def _read_manifest(metadata: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(map(str, metadata.keys() - {METADATA_KEY, SIGNATURES_KEY}))
    if unknown or not isinstance(metadata.get(METADATA_KEY), str):
        raise PatchFormatError(f"not an edgepatch file: expected the metadata key {METADATA_KEY}, found {unknown or 'none'}")
    manifest = _parse_json(metadata[METADATA_KEY], "its manifest")
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise PatchFormatError("not an edgepatch file: it has no readable manifest")
    version = manifest["format_version"]
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise PatchFormatError(f"format version: expected {FORMAT_VERSION}, found {version!r:.40}", "update edgepatch")
    if set(manifest) != set(MANIFEST_KINDS):
        differing = sorted(set(manifest) ^ set(MANIFEST_KINDS))
        raise PatchFormatError(f"manifest: expected the keys {sorted(MANIFEST_KINDS)}; unknown or missing: {differing!r:.200}")
    for key, kind in MANIFEST_KINDS.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise PatchFormatError(f"manifest: {key}: a {type(manifest[key]).__name__} is out of place")
    if _depth(manifest) > MAX_DEPTH:
        raise PatchFormatError(f"manifest: expected at most {MAX_DEPTH} levels of nesting")
    return manifest


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _read_signatures(metadata: dict[str, Any]) -> tuple[Signature, ...]:
    if SIGNATURES_KEY not in metadata:
        return ()
    text = metadata[SIGNATURES_KEY]
    values = _parse_json(text, "its signatures") if isinstance(text, str) else None
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_SIGNATURES:
        raise PatchFormatError(f"signatures: expected a list of 1 to {MAX_SIGNATURES}")
    try:
        return tuple(Signature.from_dict(value) for value in values)
    except UntrustedError as error:
        raise PatchFormatError(f"signatures: {error}") from None


def _read_tensors(data: bytes, header: dict[str, Any], start: int) -> dict[str, NDArray[Any]]:
    """Views of the file's own bytes, laid one behind the other with nothing between, before or after."""
    layers = sum(name.endswith(".key") for name in header)
    allowed = {f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")}
    names = header.keys() - {"__metadata__"}
    if names - {PROMPT_TENSOR} != allowed or not names:
        raise PatchFormatError(f"tensors: expected {PROMPT_TENSOR} and past_key_values.N.key/value, found {sorted(names)!r:.200}")
    tensors = {}
    for name in names:
        entry = header[name]
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in DTYPES:
            raise PatchFormatError(f"tensor {name}: expected dtype F32 or F16, a shape and two offsets, found {entry!r:.120}")
        tensors[name] = _view(data, name, start, DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"])
    return tensors


def _view(data: bytes, name: str, start: int, dtype: np.dtype[Any], shape: Any, offsets: Any) -> NDArray[Any]:
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MAX_FILE_BYTES for n in numbers) or len(offsets) != 2:
        raise PatchFormatError(f"tensor {name}: expected whole numbers as shape and offsets")
    count = 1
    for n in shape:
        count *= n
    begin, end = offsets
    if not 1 <= len(shape) <= 3 or count * dtype.itemsize != end - begin or start + end > len(data) or not count:
        raise PatchFormatError(f"tensor {name}: {shape} of {dtype} at {begin} to {end} does not lie in the file: damaged or truncated")
    if (start + begin) % dtype.itemsize:
        raise PatchFormatError(f"tensor {name}: its offset is not a multiple of {dtype.itemsize}")
    return np.frombuffer(data, dtype, count, start + begin).reshape(shape)


def parse_patch(data: bytes) -> Patch:
    """A patch from the bytes of its file.

    Raises:
        PatchFormatError: the bytes break the format.
    """
    header, start = _split(data)
    manifest = _read_manifest(header["__metadata__"])
    tensors = _read_tensors(data, header, start)
    digests = {name: hashlib.sha256(tensor).hexdigest() for name, tensor in tensors.items()}
    for name in sorted(digests.keys() | manifest["tensors"].keys()):
        if digests.get(name) != manifest["tensors"].get(name):
            raise PatchFormatError(f"tensor {name}: its SHA-256 is not the one in the manifest")
    patch = _assemble(manifest, tensors, _read_signatures(header["__metadata__"]))
    if patch.manifest.decode("utf-8") != header["__metadata__"][METADATA_KEY]:
        raise PatchFormatError("the manifest is not in canonical form")
    ordered = [tensors[name] for name in _order(tensors)]
    if _header(tensors, _metadata(patch)) != data[8:start] or start + sum(t.nbytes for t in ordered) != len(data):
        raise PatchFormatError("the bytes are not in canonical form")
    return patch


def _assemble(manifest: dict[str, Any], tensors: dict[str, NDArray[Any]], signatures: tuple[Signature, ...]) -> Patch:
    _check_bounds(tensors)
    layers = range(sum(name.endswith(".key") for name in tensors))
    try:
        seed = KVSeed(
            tuple(tensors[f"past_key_values.{i}.key"] for i in layers),
            tuple(tensors[f"past_key_values.{i}.value"] for i in layers),
        ) if layers else None  # fmt: skip
        prompt = SoftPrompt(tensors[PROMPT_TENSOR]) if PROMPT_TENSOR in tensors else None
    except InputError as error:
        raise PatchFormatError(str(error)) from None
    patch = Patch(
        manifest["name"], manifest["version"], ModelSpec.from_dict(manifest["base"]), prompt, seed, manifest["training"],
        manifest["evaluation"], None if manifest["canary"] is None else Canary.from_dict(manifest["canary"]),
        manifest["channel"], manifest["sequence"], manifest["created"], manifest["expires"], manifest["license"],
        manifest["summary"], manifest["chat_template"], tuple(manifest["supersedes"]), tuple(manifest["parts"]), signatures,
    )  # fmt: skip
    if manifest["num_virtual_tokens"] != patch.num_virtual_tokens:
        raise PatchFormatError(f"num_virtual_tokens: expected {patch.num_virtual_tokens}, found {manifest['num_virtual_tokens']}")
    return patch


def _check_bounds(tensors: dict[str, NDArray[Any]]) -> None:
    for name, tensor in tensors.items():
        largest = max(float(tensor.max()), -float(tensor.min()))
        if not largest <= LARGEST_VALUE:  # NaN and infinity fail too
            raise PatchFormatError(f"tensor {name}: expected values up to {LARGEST_VALUE:.0f}, found {largest}")


def signed(patch: Patch, signature: Signature) -> Patch:
    """The patch with one more signature; another by the same key takes its place."""
    others = tuple(s for s in patch.signatures if s.key_id != signature.key_id)
    return replace(patch, signatures=tuple(sorted((*others, signature), key=lambda s: s.key_id)))
