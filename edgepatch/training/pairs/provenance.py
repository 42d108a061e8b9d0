"""Where a file of pairs came from, in a file of its own beside it, so that the pairs stay what TRL and ``datasets`` read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import edgepatch
from edgepatch.errors import InputError
from edgepatch.files.canonical import canonical_json
from edgepatch.files.strict_json import read_json
from edgepatch.files.writing import write_atomically

FORMAT = "edgepatch-pairs/1"
DISTRIBUTIONS = ("httpx", "llama-cpp-python", "numpy", "onnxruntime", "peft", "torch", "transformers")
"""What may decide which texts are sampled and how a patch is trained on them."""


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder, hidden ones left out.

    Raises:
        InputError: something cannot be read.
    """
    try:
        if not path.is_dir():
            return _file_digest(path)
        files = sorted(
            p
            for p in path.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
        lines = [f"{_file_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_json(value: object) -> str:
    """SHA-256 of a value as canonical JSON: names what a patch was trained on without shipping it."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def versions() -> dict[str, str]:
    """Python, edgepatch and the installed libraries that sample and train."""
    installed = {"python": platform.python_version(), "edgepatch": edgepatch.__version__}
    for name in DISTRIBUTIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def provenance_path(out: Path) -> Path:
    """``pairs.provenance.json`` of ``pairs.jsonl``."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.provenance.json")


def write_provenance(out: Path, settings: Mapping[str, Any], counts: Mapping[str, int], **measured: Any) -> Path:
    """Describes a file of pairs that has been written.

    Args:
        out: the pairs.
        settings: everything that decides them, as the journal holds it.
        counts: prompts and pairs, kept and dropped, by reason.
        **measured: what was measured on the way, by name.

    Raises:
        InputError: the file cannot be written.
    """
    document = {
        "format": FORMAT,
        "file": out.name,
        "sha256": digest_of(out),
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "counts": dict(counts),
        "settings": dict(settings),
        **measured,
        "versions": versions(),
    }
    path = provenance_path(out)
    write_atomically(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    return path


def safety_texts_of(pairs: Path) -> tuple[str, ...]:
    """The safety texts behind which a file's chosen answers were sampled, from its provenance.

    Raises:
        InputError: there is no provenance, the pairs were changed since (texts of several domains, say), or no text was there.
    """
    path = provenance_path(pairs)
    hint = "name the teacher's safety text with --teacher-text"
    if not path.is_file():
        raise InputError(f"{pairs}: which safety text made the pairs is not known: {path.name} is missing", hint=hint)
    document = read_json(path, what="the provenance of pairs", hint=hint)
    if document.get("sha256") != digest_of(pairs):
        raise InputError(
            f"{pairs} is not the file that {path.name} describes: it was changed, or joined with pairs of another domain or teacher",
            hint=f"make it again with `edgepatch pairs`, one domain a file; or {hint}",
        )
    teacher = document.get("settings", {}).get("teacher", {})
    texts = teacher.get("texts") if isinstance(teacher, Mapping) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{pairs} was made without a safety text", hint=hint)
    return tuple(texts)
