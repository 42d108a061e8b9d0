"""Reads and writes the patch file: one safetensors file with the manifest and its signatures in the metadata.

This module alone knows the file; docs/reference/format.md specifies it. Reading is closed and bounded: sizes are checked before anything is
read, unknown keys, tensors, dtypes and versions are refused, and every digest is taken from the bytes that are used.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from edgepatch.patch.canonical import MAX_WHOLE, canonical_json, parse_json
from edgepatch.patch.sketches import Sketch
from edgepatch.tensors import Canary, KVSeed, ModelSpec, SoftPrompt
from edgepatch.trust.signatures import MANIFEST_TYPE, MAX_SIGNATURES, Signature

FORMAT_VERSION = 1
METADATA_KEY = "edgepatch.manifest"
SIGNATURES_KEY = "edgepatch.signatures"
PAYLOAD_TYPE = MANIFEST_TYPE
"""What a signature is over: the manifest's canonical bytes, as a document of this type."""

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_HEADER_BYTES = 1024 * 1024
LARGEST_VALUE = 65504.0  # of float16
PROMPT_TENSOR = "prompt_embeddings"
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER, _PRE, _BUILD = r"(?:0|[1-9][0-9]*)", r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)", r"[0-9A-Za-z-]+"
SEMVER = re.compile(
    rf"(?=.{{5,64}}\Z){_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_PRE}(?:\.{_PRE})*)?(?:\+{_BUILD}(?:\.{_BUILD})*)?"
)
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What no text for people may hold: controls but the newline, and signs that turn the direction of writing around."""
MAX_SEQUENCE = MAX_WHOLE


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
        weight_sketch: tells the base from its fine-tunes, at every quantization; ``None`` where its weights were not at hand.
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
    weight_sketch: Sketch | None = None
    chat_template: str = ""
    supersedes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    signatures: tuple[Signature, ...] = ()

    def __post_init__(self) -> None:
        if self.soft_prompt is None and self.kv_seed is None:
            raise PatchFormatError("patch: expected a soft prompt or a KV seed, found neither")
        _check_tensors(self)
        _check_bounds(_tensors(self))
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
    def tensor_digests(self) -> dict[str, str]:
        """SHA-256 of every tensor's bytes, by its name in the file."""
        return {name: hashlib.sha256(tensor.data).hexdigest() for name, tensor in _tensors(self).items()}

    @cached_property
    def manifest(self) -> bytes:
        """The canonical JSON that is signed; through the tensors' digests it covers the whole patch."""
        return canonical_json(_manifest_of(self))

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
    for key, pattern in {"name": NAME, "version": SEMVER, "channel": CHANNEL}.items():
        _require(_is_text(getattr(patch, key), pattern), patch, key, _EXPECTED[key])
    sequence = patch.sequence
    whole = isinstance(sequence, int) and not isinstance(sequence, bool)
    _require(whole and 1 <= sequence <= MAX_SEQUENCE, patch, "sequence", f"a whole number from 1 to {MAX_SEQUENCE}")
    for key in ("created", "expires"):
        _require(
            getattr(patch, key) == "" or is_timestamp(getattr(patch, key)),
            patch,
            key,
            "a time like 2026-11-21T10:00:00Z",
        )
    for key, most in (("license", 128), ("summary", 2000)):
        text = getattr(patch, key)
        readable = isinstance(text, str) and len(text) <= most and not UNPRINTABLE.search(text)
        _require(readable, patch, key, f"a printable text of at most {most} characters")
    for key in ("supersedes", "parts"):
        _require(all(_is_text(digest, DIGEST) for digest in getattr(patch, key)), patch, key, "SHA-256 digests")
    _require(
        patch.chat_template == "" or _is_text(patch.chat_template, DIGEST), patch, "chat_template", "a SHA-256 digest"
    )


def _is_text(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _require(holds: bool, patch: Patch, key: str, expected: str) -> None:
    if not holds:
        raise PatchFormatError(f"manifest: {key}: expected {expected}, found {getattr(patch, key)!r:.80}")


_EXPECTED = {
    "name": "1 to 64 letters, digits and ._-",
    "version": "a semantic version like 1.2.0",
    "channel": "1 to 32 lower-case letters, digits and -",
}


def is_timestamp(text: object) -> bool:
    """Whether a text is a time in UTC to the second: "2026-11-21T10:00:00Z"."""
    found = (
        re.fullmatch(r"(\d{4})-(\d{2})-(\d{2})T(\d{2}):(\d{2}):(\d{2})Z", text, re.ASCII)
        if isinstance(text, str)
        else None
    )
    if not found:
        return False
    year, month, day, hour, minute, second = map(int, found.groups())
    try:
        datetime(year, month, day, hour, minute, second)
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
    return {
        name: np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")) for name, tensor in tensors.items()
    }


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
        "weight_sketch": patch.weight_sketch.as_dict() if patch.weight_sketch else None,
        "chat_template": patch.chat_template,
        "num_virtual_tokens": patch.num_virtual_tokens,
        "tensors": patch.tensor_digests,
        "training": patch.training,
        "evaluation": patch.evaluation,
        "canary": patch.canary.as_dict() if patch.canary else None,
        "supersedes": list(patch.supersedes),
        "parts": list(patch.parts),
    }


MANIFEST_KINDS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "name": str,
    "version": str,
    "channel": str,
    "sequence": int,
    "created": str,
    "expires": str,
    "license": str,
    "summary": str,
    "base": dict,
    "weight_sketch": (dict, type(None)),
    "chat_template": str,
    "num_virtual_tokens": int,
    "tensors": dict,
    "training": dict,
    "evaluation": dict,
    "canary": (dict, type(None)),
    "supersedes": list,
    "parts": list,
}
"""The closed set of the manifest's keys, with what each holds."""


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
    found = {METADATA_KEY: patch.manifest.decode("utf-8")}
    if patch.signatures:
        ordered = sorted(patch.signatures, key=lambda s: (s.key_id, s.signature))
        found[SIGNATURES_KEY] = canonical_json([s.as_dict() for s in ordered]).decode("utf-8")
    return found


def patch_bytes(patch: Patch) -> bytes:
    """The file's bytes: the same patch gives the same bytes on every machine.

    Raises:
        PatchFormatError: a reader would refuse them; they are read here, so that nobody hands out what cannot be read.
    """
    tensors = _tensors(patch)
    header = _header(tensors, _metadata(patch))
    if len(header) > MAX_HEADER_BYTES:
        raise PatchFormatError(
            f"header: expected at most {MAX_HEADER_BYTES} bytes, found {len(header)}", "shorten the records"
        )
    data = b"".join([len(header).to_bytes(8, "little"), header, *(tensors[name].data for name in _order(tensors))])
    parse_patch(data)
    return data


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
    try:
        return parse_patch(_read_bounded(path))
    except PatchFormatError as error:
        raise PatchFormatError(f"{path}: {error}", error.hint or "get the file again from its vendor") from None


def _read_bounded(path: Path) -> bytes:
    """The whole file through one handle; its kind and size are known before anything is read, and no more is read than that."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"cannot read patch {path}: it is no regular file", hint="name the patch file itself")
            _check_size(status.st_size)
            with open(handle, "rb", closefd=False) as file:
                return file.read(status.st_size + 1)
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(f"cannot read patch {path}: {error.strerror}", hint="check the path") from error


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
    manifest = _parse_text(metadata[METADATA_KEY], "its manifest")
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise PatchFormatError("not an edgepatch file: it has no readable manifest")
    version = manifest["format_version"]
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise PatchFormatError(f"format version: expected {FORMAT_VERSION}, found {version!r:.40}", "update edgepatch")
    if set(manifest) != set(MANIFEST_KINDS):
        differing = sorted(set(manifest) ^ set(MANIFEST_KINDS))
        raise PatchFormatError(
            f"manifest: expected the keys {sorted(MANIFEST_KINDS)}; unknown or missing: {differing!r:.200}"
        )
    for key, kind in MANIFEST_KINDS.items():
        if not isinstance(manifest[key], kind) or isinstance(manifest[key], bool):
            raise PatchFormatError(f"manifest: {key}: a {type(manifest[key]).__name__} is out of place")
    return manifest


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
    digests = {name: hashlib.sha256(tensor.data).hexdigest() for name, tensor in tensors.items()}
    for name in sorted(digests.keys() | manifest["tensors"].keys()):
        if digests.get(name) != manifest["tensors"].get(name):
            raise PatchFormatError(f"tensor {name:.80}: its SHA-256 is not the one in the manifest")
    patch = _assemble(manifest, tensors, _read_signatures(header["__metadata__"]))
    vars(patch)["tensor_digests"] = digests  # of these very bytes; hashing them again would double the time of a check
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
    sketch, canary = manifest["weight_sketch"], manifest["canary"]
    plain = (
        "name",
        "version",
        "training",
        "evaluation",
        "channel",
        "sequence",
        "created",
        "expires",
        "license",
        "summary",
        "chat_template",
    )
    patch = Patch(
        base=ModelSpec.from_dict(manifest["base"]),
        soft_prompt=prompt,
        kv_seed=seed,
        canary=None if canary is None else Canary.from_dict(canary),
        weight_sketch=None if sketch is None else Sketch.from_dict(sketch),
        supersedes=tuple(manifest["supersedes"]),
        parts=tuple(manifest["parts"]),
        signatures=signatures,
        **{key: manifest[key] for key in plain},
    )
    if manifest["num_virtual_tokens"] != patch.num_virtual_tokens:
        raise PatchFormatError(
            f"num_virtual_tokens: expected {patch.num_virtual_tokens}, found {manifest['num_virtual_tokens']}"
        )
    return patch


def _check_bounds(tensors: dict[str, NDArray[Any]]) -> None:
    """Compares bit patterns: without their sign, floats grow with their bits, and NaN and infinity are the largest of all."""
    for name, tensor in tensors.items():
        bits = tensor.view(f"<u{tensor.itemsize}")
        largest = (
            (bits & np.array(2 ** (8 * tensor.itemsize - 1) - 1, bits.dtype))
            .max(keepdims=True)
            .view(tensor.dtype)
            .item()
        )
        if not largest <= LARGEST_VALUE:
            raise PatchFormatError(f"tensor {name}: expected values up to {LARGEST_VALUE:.0f}, found {largest}")


def signed(patch: Patch, signature: Signature) -> Patch:
    """The patch with one more signature; another by the same key takes its place."""
    others = tuple(s for s in patch.signatures if s.key_id != signature.key_id)
    return replace(patch, signatures=tuple(sorted((*others, signature), key=lambda s: s.key_id)))
