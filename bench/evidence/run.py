"""``edgepatch bench evidence``: do safety gains hold after quantization? Every arm on every runtime and quantization, with intervals.

Trains what is not trained yet, measures what is not measured yet, and writes the document, the page and the tables. A run that was
killed goes on where it stopped; a cell is measured again when its model, its patch, its settings or the code of its measure changed.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from edgepatch.bench.checkout import ROOT
from edgepatch.bench.columns import convert_columns
from edgepatch.bench.environment import environment
from edgepatch.bench.evidence.cells import CORE_COLUMNS, CellKey, EvidenceConfig, groups, plan, read_cell
from edgepatch.bench.evidence.goals import judge_goals
from edgepatch.bench.evidence.measuring import Workplace, due
from edgepatch.bench.evidence.statistics import Matrix, Read
from edgepatch.bench.evidence.workers import measure_cells
from edgepatch.bench.report.evidence_page import render_page
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.progress import Progress, silent

RESULTS = ROOT / "bench" / "results"
NUM_EXAMPLES, TEXTS_OF_EXAMPLE = 6, 2
CURVE_POINTS = 100

Document = dict[str, Any]


def examples(keys: Sequence[CellKey], read: Read, measure: str) -> list[dict[str, Any]]:
    """Generations of the bare and the patched model side by side: the first items, the first texts, none picked."""
    rows = []
    for key in keys:
        if (key.measure, key.arm, key.rng_seed) != (measure, "patch", 1) or key.route == "decoded":
            continue
        patched, bare = read(key), read(replace(key, arm="bare", route="", rng_seed=0))
        if patched is None or bare is None or "failed" in patched or "failed" in bare:
            continue
        bare_rows = {row["item"]: row for row in bare["texts"]}
        pairs = [(bare_rows[row["item"]], row) for row in patched["texts"] if row["item"] in bare_rows]
        for one, other in pairs[:NUM_EXAMPLES]:
            rows.append(
                {
                    "domain": key.domain,
                    "column": key.column,
                    "item": one["item"],
                    "bare": one["texts"][:TEXTS_OF_EXAMPLE],
                    "bare_value": one["value"],
                    "patched": other["texts"][:TEXTS_OF_EXAMPLE],
                    "patched_value": other["value"],
                }
            )
    return rows


def assemble(keys: Sequence[CellKey], read: Read) -> Document:
    """The measured part of the document, from raw cells alone."""
    matrix = Matrix(keys, read)
    rows, compositions = matrix.rows(), matrix.compositions()
    named = dict.fromkeys(key.column for key in keys if key.column in CORE_COLUMNS)
    contests = [matrix.contest("toxicity", column, "kv", "lora_r16") for column in named]
    return {
        "goals": judge_goals(rows, contests),
        "cells": rows,
        "contests": contests,
        "composition": compositions,
        "examples": examples(keys, read, "examples"),
    }


def command_of(words: Sequence[str], data: Path | None) -> str:
    """The command that made a document; where the data lie is the user's own business."""
    public = ["$EDGEPATCH_DATA" if data is not None and word == str(data) else shlex.quote(word) for word in words]
    return " ".join(["edgepatch", *public])


def training_curves(out: Path) -> list[dict[str, Any]]:
    """The curves of the first training run of every arm, at most ``CURVE_POINTS`` values each."""
    runs = []
    for path in sorted((out / "arms").glob("*/*-1/run/curves.json")):
        try:
            history = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}", hint="delete it") from error
        curves = {name: _thinned(values) for name, values in history.items() if isinstance(values, list)}
        runs.append({"domain": path.parts[-4], "arm": path.parts[-3].removesuffix("-1"), "curves": curves})
    return runs


def _thinned(values: list[float]) -> list[float]:
    step = -(-len(values) // CURVE_POINTS)
    return [float(f"{value:.4g}") for value in values[::step]] if values else []


def write_document(document: Document, folder: Path, **page: Any) -> None:
    """Writes ``evidence.json`` and ``evidence.html``; ``page`` takes the place of fields of the document on the page alone."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "evidence.json", (text + "\n").encode())
    write_atomically(folder / "evidence.html", render_page({**document, **page}).encode())


def measure(
    place: Workplace, keys: Sequence[CellKey], config: EvidenceConfig, num_workers: int, progress: Progress
) -> None:
    """Measures every cell that is due, telling of each, and of how many failed."""
    waiting = due(place, keys, config)
    done = failed = 0
    progress("cells", done, len(waiting))

    def report(key: CellKey, reason: str) -> None:
        nonlocal done, failed
        done += 1
        failed += bool(reason)
        progress("cells", done, len(waiting), **({"failed": failed} if failed else {}))

    measure_cells(groups(waiting), place, config, num_workers, report)


def run(
    out: Path,
    data: Path | None = None,
    config: EvidenceConfig | None = None,
    *,
    num_workers: int = 2,
    is_trained: bool = True,
    is_measured: bool = True,
    is_published: bool = False,
    progress: Progress = silent,
) -> Document:
    """Trains, measures, assembles and writes.

    Args:
        out: folder for models, patches, raw cells and the document.
        data: folder of the public data sets; ``None`` takes the prompts that ship with edgepatch.
        config: what is measured.
        num_workers: processes, one thread each.
        is_trained: whether arms that are missing are trained; else what is trained already is measured.
        is_measured: whether cells that are due are measured; else what is measured already is assembled.
        is_published: whether bench/results and docs/results/safety.md are written too.
        progress: told of every step and cell.

    Returns:
        The document.
    """
    began, config = time.monotonic(), config or EvidenceConfig()
    place, keys = Workplace(out, data), plan(config)
    if is_measured:
        convert_columns(place.bases, progress=progress)
        if is_trained:
            from edgepatch.bench.evidence.training import train_missing

            train_missing(place.out, place.data, progress)
        measure(place, keys, config, num_workers, progress)
    read = partial(read_cell, place.cells)
    document = {
        "command": command_of(sys.argv[1:], data),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(sum((read(key) or {}).get("cpu_seconds", 0) for key in keys)),
        "environment": environment(),
        "settings": config.as_dict(),
        **assemble(keys, read),
        "curves": training_curves(place.out),
    }
    write_document(document, place.out, examples=examples(keys, read, "safety"))
    if is_published:
        write_document(document, RESULTS)
    return document


def failures(document: Document) -> list[str]:
    """Why cells failed or are missing."""
    return [reason for cell in [*document["cells"], *document["composition"]] for reason in cell["failed"]]
