"""Exports the patches for every target, asks the real clients, and writes the table; a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepatch.bench.devices.clients import node_folder, python_of
from edgepatch.bench.devices.forms import Form, forms
from edgepatch.bench.environment import environment
from edgepatch.errors import InactivePatchError
from edgepatch.exports.checking import Row, check_export
from edgepatch.exports.targets import TARGETS
from edgepatch.files.writing import write_atomically
from edgepatch.llama_server.export import ExportOptions
from edgepatch.patch.file import read_patch
from edgepatch.progress import Progress, silent

COMMAND = "edgepatch bench devices --smollm2 smollm2"


def run(out: Path, work: Path, smollm2: Path | None = None, progress: Progress = silent) -> list[Row]:
    """The rows of every form and target.

    Args:
        out: the JSON file.
        work: for clients and models; rows that it holds already are kept.
        smollm2: GGUF file of SmolLM2-135M-Instruct.
        progress: told after each export.

    Raises:
        InputError: a tool is missing.
        EdgepatchError: a client cannot be installed, or fails.
    """
    (work / "models").mkdir(parents=True, exist_ok=True)
    jobs = [(form, target) for form in forms(smollm2) for target in form.targets]
    rows, refused = list[Row](), list[dict[str, str]]()
    for done, (form, target) in enumerate(jobs):
        progress("devices", done, len(jobs))
        try:
            rows += _rows_of(form, target, work)
        except (
            InactivePatchError
        ) as error:  # our own runtime does not run the patch on this form, so nothing is compared
            refused.append({"target": target, "model": form.file, "reason": str(error)})
        write_atomically(out, _document(rows, refused))
    progress("devices", len(jobs), len(jobs))
    return rows


def _rows_of(form: Form, target: str, work: Path) -> list[Row]:
    """Those that are kept, else measured now."""
    kept = work / "rows" / f"{form.file}-{target}.json"
    if kept.is_file():
        with contextlib.suppress(TypeError):  # rows of an earlier version, with other fields, are measured anew
            return [Row(**row) for row in json.loads(kept.read_text("utf-8"))]
    patch, model = read_patch(form.patch), form.make(work / "models").resolve()
    home = _home(target, work)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        folder = Path(scratch) / "export"
        TARGETS[target].write(patch, model, folder, ExportOptions(home=home))
        rows = check_export(folder, patch, model, home)
    kept.parent.mkdir(exist_ok=True)
    write_atomically(kept, json.dumps([row.as_dict() for row in rows]).encode())
    return rows


def _home(target: str, work: Path) -> Path | None:
    if target == "llama-session":
        return None  # it is in this environment
    return python_of(work) if target == "mlx" else node_folder(work)


def _document(rows: list[Row], refused: list[dict[str, str]]) -> bytes:
    document: dict[str, Any] = {"command": COMMAND, "environment": environment()}
    document |= {"rows": [row.as_dict() for row in rows], "refused": refused}
    return (json.dumps(document, indent=1) + "\n").encode()


def failures(rows: list[Row]) -> Iterator[str]:
    """A line for each client that does not answer with the patch."""
    for row in rows:
        if not row.holds:
            yield f"{row.client} {row.version} on {row.model}: {row.verdict}"
