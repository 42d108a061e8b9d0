"""The folder of an export: its manifest names every file with its digest, and its README says how to use it and what is lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError, PatchFormatError
from edgepatch.files.reading import read_bounded
from edgepatch.files.strict_json import read_json
from edgepatch.files.writing import replacing_folder
from edgepatch.llama_server.export import MANIFEST_FILE, digests_of, require_replaceable
from edgepatch.patch.file import Patch
from edgepatch.seeds.anchoring import FADES

README_FILE, PATCH_FILE, MODULE_FILE = "README.md", "patch.safetensors", "edgepatch.mjs"
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_FILE_BYTES = 2**34


@contextmanager
def export_folder(target: Path) -> Iterator[Path]:
    """A folder to write an export to; it appears complete or not at all, and replaces only an earlier export.

    Raises:
        InputError: something else is there, or it cannot be written.
    """
    require_replaceable(target)
    with replacing_folder(target) as folder:
        yield folder


def finish(folder: Path, manifest: dict[str, Any], readme: Sequence[str]) -> dict[str, Any]:
    """Writes the README and, last, the manifest with the digests of all files; returns it."""
    patch = manifest["patch"]
    head = f"# {patch['name']} {patch['version']} for {manifest['client']}"
    (folder / README_FILE).write_text("\n\n".join([head, *readme]) + "\n", encoding="utf-8")
    whole = manifest | {"files": digests_of(folder)}
    (folder / MANIFEST_FILE).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole


def describe(client: str, patch: Patch, model: Path, quantization: str, place: str) -> dict[str, Any]:
    """What the manifests of all targets say."""
    return {
        "client": client,
        "patch": {"name": patch.name, "version": patch.version, "digest": patch.digest},
        "num_virtual_tokens": patch.num_virtual_tokens,
        "model": {"file": model.name, "quantization": quantization, "spec": patch.base.as_dict()},
        "place": place,
    }


def loss_at_length(patch: Patch) -> str:
    """What a client loses that cannot move a seed, in a sentence."""
    made = f"The patch was made to move ({patch.anchoring}). Here it cannot: it" if patch.anchoring else "The patch"
    return f"{made} stays at the start of the text, and {FADES}. `edgepatch serve` moves a seed that can."


def write_client_file(name: str, target: Path) -> None:
    """Copies a file that clients run from this package."""
    target.write_bytes(files("edgepatch.exports").joinpath(f"clients/{name}").read_bytes())


def read_export(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, all of whose files are as they were written.

    Raises:
        InputError: it is no export.
        PatchFormatError: a file is missing, damaged, or none of the export's.
    """
    manifest = read_json(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES, what="manifest of an export", hint="export again")
    try:
        client, expected = str(manifest["client"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST_FILE} is no manifest of an export: {error}", "export again") from None
    for name, digest in expected.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PatchFormatError(f"{folder}: expected files of its own, found {name!r}", hint="export again")
        data = read_bounded(path, MAX_FILE_BYTES, f"file of the export for {client}", hint="export again")
        actual = hashlib.sha256(data).hexdigest()
        if actual != digest:
            raise PatchFormatError(
                f"{path}: expected SHA-256 {digest}, found {actual} of {len(data)} bytes", hint="export again"
            )
    manifest["client"] = client
    return dict(manifest)
