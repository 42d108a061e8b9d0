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


def write_provenance(out: Path, settings: Mapping[str, Any], counts: Mapping[str, int]) -> Path:
    """Describes a file of pairs that has been written.

    Args:
        out: the pairs.
        settings: everything that decides them, as the journal holds it.
        counts: prompts and pairs, kept and dropped, by reason.

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
        "versions": versions(),
    }
    path = provenance_path(out)
    write_atomically(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
    return path
