"""Of what kind a file or folder is, by its content; a name decides only where the content must not be read: pickles."""

from __future__ import annotations

import os
import re
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from edgepatch.converters.gguf.header import GGUFHeader, read_any_header
from edgepatch.converters.peft.adapters import CONFIG_FILE, PICKLES
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.files import strict_json
from edgepatch.patch.file import METADATA_KEY, PROMPT_TENSOR
from edgepatch.progress import START as LOG_START

START_BYTES = 4096
MAX_JSON_BYTES = 64 * 2**20
MAX_LINE_BYTES = 2**20
SHOWN_NAMES = 6
EXPECTED = "a patch, a model (GGUF file, Transformers folder, ONNX folder), or another file of edgepatch"


class Kind(Enum):
    """What ``show`` knows; the value is its name for people."""

    PATCH = "patch"
    GGUF_MODEL = "GGUF file"
    MODEL_FOLDER = "Transformers folder"
    ONNX_FOLDER = "ONNX folder"
    GGUF_PART = "part of a split GGUF model"
    GGUF_PATCH = "patch as a GGUF file, for registries"
    GGUF_LORA = "LoRA adapter of llama.cpp"
    GGUF_VECTOR = "control vector of llama.cpp"
    GGUF_VOCABULARY = "vocabulary of a GGUF model, without weights"
    GGUF_PROJECTOR = "projector of a multimodal GGUF model (mmproj)"
    GGUF_OTHER = "GGUF file without a language model"
    PEFT_FOLDER = "PEFT adapter folder"
    TENSORS = "safetensors file, no patch"
    ONNX_FILE = "ONNX graph"
    PRIVATE_KEY = "private signing key"
    PUBLIC_KEY = "public signing key"
    TRUST_ROOT = "trust root"
    BUNDLE = "bundle"
    PAIRS = "preference pairs"
    PROMPTS = "prompts"
    PROVENANCE = "provenance of preference pairs"
    RESULTS = "results of a measurement"
    STORE = "store"
    EXPORT = "export for another program"
    RUN = "run of a training"
    CONVERSATION = "conversation that chat saved"
    JOURNAL = "journal of pairs that are being made"
    LOG = "log of edgepatch's work"


@dataclass(frozen=True)
class Recognised:
    """A file or folder of a known kind.

    Attributes:
        kind: of it.
        header: of a GGUF file.
        content: of a JSON file, or of the first line of a JSON Lines file.
    """

    kind: Kind
    header: GGUFHeader | None = None
    content: Mapping[str, Any] = field(default_factory=dict)


def recognise(path: Path) -> Recognised:
    """Of what kind a file or folder is.

    Raises:
        InputError: it is missing, empty, no regular file, a pickle, damaged, or of no known kind.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return _folder(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: expected a file or folder, found a pipe or device", hint="name the file itself")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            start = file.read(START_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    return _file(path, start, status.st_size)


# Files.


def _file(path: Path, start: bytes, size: int) -> Recognised:
    if start[:4] == b"GGUF":
        return _gguf(path)
    if path.suffix == ".safetensors" or _is_safetensors(start, size):
        return _safetensors(path)
    if not size:
        raise InputError(f"{path} is empty: expected {EXPECTED}", hint="copy or download it again")
    if path.suffix in PICKLES or _is_pickle(start):
        raise InputError(
            f"{path} is a pickle, which can run code when it is read: expected safetensors",
            hint="take the model's safetensors or GGUF file; where you trust its origin, save it anew as safetensors",
        )
    if label := re.match(rb"-----BEGIN ([A-Z0-9 ]+)-----", start):
        return _pem(path, label[1].decode())
    if start[257:262] == b"ustar":
        return _tar(path, start)
    if LOG_START.match(start):
        return Recognised(Kind.LOG)
    if start.lstrip()[:1] in (b"{", b"["):
        return _json(path, size)
    if path.suffix == ".onnx":
        return Recognised(Kind.ONNX_FILE)
    raise _unknown(path, _looks_like(start))


def _unknown(path: Path, looks: str) -> InputError:
    return InputError(f"{path} looks like {looks}: expected {EXPECTED}", hint="check the path, or get the file again")


LOOKS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, whose file was not downloaded (git lfs pull)"),
    (b"<!doctype html", "a web page, saved instead of a file"),
    (b"<html", "a web page, saved instead of a file"),
    (b"lmgg", "a GGML file of 2023, which no llama.cpp reads any more"),
    (b"fmgg", "a GGML file of 2023, which no llama.cpp reads any more"),
    (b"tjgg", "a GGML file of 2023, which no llama.cpp reads any more"),
    (b"pk\x03\x04", "a zip archive or a wheel: unpack it"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\xfd7zxz", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it"),
    (b"\x93numpy", "a NumPy array"),
    (b"\x89hdf", "an HDF5 file"),
    (b"\x7felf", "a program or library"),
    (b"%pdf", "a PDF document"),
    (b"\x89png", "an image"),
)
"""How a file starts, in lower case -> what it looks like."""


def _looks_like(start: bytes) -> str:
    lowered = start.lstrip().lower()
    kind = next((what for beginning, what in LOOKS if lowered.startswith(beginning)), None)
    if kind:
        return kind
    try:
        text = start[: -3 if len(start) == START_BYTES else None].decode("utf-8")
    except UnicodeDecodeError:
        return f"binary data that starts with {start[:8].hex(' ')}"
    return f"a text that starts with {' '.join(text.split())[:40]!r}"


def _is_pickle(start: bytes) -> bool:
    """A pickle of protocol 2 or later, or PyTorch's archive of one."""
    is_archive = start[:4] == b"PK\x03\x04" and (b"/data.pkl" in start or b"data.pkl" in start[:64])
    return is_archive or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _is_safetensors(start: bytes, size: int) -> bool:
    return 8 + int.from_bytes(start[:8], "little") <= size and start[8:9] == b"{"


def _safetensors(path: Path) -> Recognised:
    """A patch, unless the file is plainly something else: what is half a patch is left to the patch's reader."""
    from edgepatch.converters.weight_tables import read_table

    try:
        table = read_table(path)
    except InputError:
        return Recognised(Kind.PATCH)
    is_of_ours = any(key.startswith("edgepatch") for key in table.metadata) or any(
        name == PROMPT_TENSOR or name.startswith("past_key_values.") for name in table.tensors
    )
    if METADATA_KEY in table.metadata or is_of_ours or not table.tensors:
        return Recognised(Kind.PATCH)
    return Recognised(Kind.TENSORS)


GGUF_TYPES = {"adapter": Kind.GGUF_LORA, "mmproj": Kind.GGUF_PROJECTOR, "imatrix": Kind.GGUF_OTHER}
"""``general.type`` of files that are no models."""


def _gguf(path: Path) -> Recognised:
    header = read_any_header(path)
    stated = header.metadata.get("general.type")
    if header.num_parts > 1:
        kind = Kind.GGUF_PART
    elif str(header.metadata.get("adapter.type", "")).startswith("edgepatch."):
        kind = Kind.GGUF_PATCH
    elif isinstance(stated, str) and stated in GGUF_TYPES:
        kind = GGUF_TYPES[stated]
    elif header.architecture == "clip":
        kind = Kind.GGUF_PROJECTOR
    elif header.architecture == "controlvector":
        kind = Kind.GGUF_VECTOR
    elif "token_embd.weight" in header.tensors:
        kind = Kind.GGUF_MODEL
    elif not header.tensors and "tokenizer.ggml.tokens" in header.metadata:
        kind = Kind.GGUF_VOCABULARY
    else:
        kind = Kind.GGUF_OTHER
    return Recognised(kind, header)


def _pem(path: Path, label: str) -> Recognised:
    if label.endswith("PRIVATE KEY"):
        return Recognised(Kind.PRIVATE_KEY, content={"label": label})
    if label == "PUBLIC KEY":
        return Recognised(Kind.PUBLIC_KEY)
    raise _unknown(path, f"a {label.lower()} in PEM")


def _tar(path: Path, start: bytes) -> Recognised:
    try:
        first = tarfile.TarInfo.frombuf(start[:512], "ascii", "backslashreplace").name
    except tarfile.HeaderError:
        first = ""
    if first == "manifest.json":
        return Recognised(Kind.BUNDLE)
    raise _unknown(path, f"a tar archive that starts with {first[:80]!r}")


def _json(path: Path, size: int) -> Recognised:
    with path.open("rb") as file:
        first = file.readline(MAX_LINE_BYTES)
        whole = first + file.read(MAX_JSON_BYTES) if size <= MAX_JSON_BYTES else b""
    content = _parsed(whole)
    if isinstance(content, dict):
        return _document(path, content)
    row = _parsed(first)
    if isinstance(row, dict) and row.keys() == {"settings"}:
        return Recognised(Kind.JOURNAL, content=row)
    if isinstance(row, dict) and {"chosen", "rejected"} <= row.keys():
        return Recognised(Kind.PAIRS, content=row)
    if isinstance(row, dict) and row.keys() & {"messages", "prompt", "text"}:
        return Recognised(Kind.PROMPTS, content=row)
    raise _unknown(path, "JSON" if content is not None or row is not None else "damaged JSON")


def _parsed(data: bytes) -> Any:
    try:
        return strict_json.loads(data) if data else None
    except ValueError:
        return None


SETTINGS = ("config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def _document(path: Path, content: dict[str, Any]) -> Recognised:
    """A JSON file that is one object; a file of one line may be JSON Lines as well."""
    if content.keys() == {"signed", "signatures"}:
        return Recognised(Kind.TRUST_ROOT)
    if {"chosen", "rejected"} <= content.keys():
        return Recognised(Kind.PAIRS, content=content)
    if path.name in (*SETTINGS, "model.safetensors.index.json"):
        raise InputError(
            f"{path} holds the settings of a model, not the model: expected its folder", hint=f"name {path.parent}"
        )
    if path.name == CONFIG_FILE:
        raise InputError(f"{path} holds the settings of a PEFT adapter: expected its folder", f"name {path.parent}")
    if str(content.get("format", "")).startswith("edgepatch-pairs/"):
        return Recognised(Kind.PROVENANCE, content=content)
    is_measured = "command" in content and content.keys() & {"created", "environment", "platform"}
    if content.keys() & {"rows", "cells", "figures", "readers", "readings", "scores"} or is_measured:
        return Recognised(Kind.RESULTS, content=content)
    if content.keys() == {"settings"}:
        return Recognised(Kind.JOURNAL, content=content)
    if {"messages", "system_fingerprint"} <= content.keys():
        return Recognised(Kind.CONVERSATION, content=content)
    if content.keys() & {"messages", "prompt"}:
        return Recognised(Kind.PROMPTS, content=content)
    raise _unknown(path, f"a JSON object with {', '.join(sorted(content))[:80] or 'nothing'}")


# Folders.


def _folder(path: Path) -> Recognised:
    names = sorted(entry.name for entry in path.iterdir())
    if CONFIG_FILE in names:
        return Recognised(Kind.PEFT_FOLDER)
    if "state.json" in names and {"patches", "trust", "history.jsonl"} & set(names):
        return Recognised(Kind.STORE)
    for name, written, keys in DOCUMENTS:
        content = _document_of(path / name) if name in names else {}
        if keys <= content.keys():
            return Recognised(written, content=content)
    kind, models = _model_folder(path), [name for name in names if name.endswith(".gguf")]
    has_weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    if kind is Kind.ONNX_FOLDER or (kind and (has_weights or not models)):
        return Recognised(kind)
    if not names:
        raise InputError(f"{path} is an empty folder: expected {EXPECTED}", hint="check the path")
    if models:
        raise InputError(f"{path} is a folder with {len(models)} GGUF files: expected one", f"name {path / models[0]}")
    listed = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    raise _unknown(path, f"a folder with {listed}")


DOCUMENTS = (
    ("manifest.json", Kind.EXPORT, {"client", "patch", "files"}),
    ("results.json", Kind.RESULTS, {"command", "cells"}),
    ("run.json", Kind.RUN, {"config"}),
)
"""Of folders that edgepatch writes: the document in each, what it is then, and keys of it."""


def _document_of(path: Path) -> Mapping[str, Any]:
    try:
        return strict_json.read_json(path, MAX_JSON_BYTES)
    except InputError:
        return {}


def _model_folder(path: Path) -> Kind | None:
    from edgepatch.runtimes import runtime_name

    try:
        return Kind.ONNX_FOLDER if runtime_name(path) == "onnx" else Kind.MODEL_FOLDER
    except EdgepatchError:
        return None
