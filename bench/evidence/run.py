"""``make evidence``: do safety gains hold after quantization? Every arm on every runtime and quantization, with intervals.

Trains what is not trained yet, measures what is not measured yet, and writes the document, the page and the tables. A run that was
killed goes on where it stopped; a cell is measured again when its model, its patch, its settings or the code of its measure changed.
"""

from __future__ import annotations

import argparse
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

from edgepatch import interrupts
from edgepatch.bench.columns import columns, convert_columns
from edgepatch.bench.datasets import data_folder
from edgepatch.bench.demo import environment
from edgepatch.bench.evidence.cells import ARMS, CORE_COLUMNS, DOMAINS, CellKey, EvidenceConfig, groups, plan, read_cell
from edgepatch.bench.evidence.goals import judge_goals
from edgepatch.bench.evidence.measuring import Workplace, due
from edgepatch.bench.evidence.statistics import Matrix, Read
from edgepatch.bench.evidence.workers import measure_cells
from edgepatch.bench.report.evidence_page import render_page
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.patch.file import write_atomically
from edgepatch.progress import OF_STREAM, Lines, Progress, logged, silent

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"
NUM_EXAMPLES, TEXTS_OF_EXAMPLE = 6, 2
CURVE_POINTS = 100
KEPT = "what is trained and measured is kept; the same command goes on from there"

Document = dict[str, Any]


def examples(keys: Sequence[CellKey], read: Read, measure: str) -> list[dict[str, Any]]:
    """Generations of the bare and the patched model side by side: the first items, the first texts, none picked."""
    found = []
    for key in keys:
        if (key.measure, key.arm, key.rng_seed) != (measure, "patch", 1) or key.route == "decoded":
            continue
        patched, bare = read(key), read(replace(key, arm="bare", route="", rng_seed=0))
        if patched is None or bare is None or "failed" in patched or "failed" in bare:
            continue
        known = {row["item"]: row for row in bare["texts"]}
        pairs = [(known[row["item"]], row) for row in patched["texts"] if row["item"] in known]
        for one, other in pairs[:NUM_EXAMPLES]:
            found.append(
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
    return found


def assemble(keys: Sequence[CellKey], read: Read) -> Document:
    """The measured part of the document, from raw cells alone."""
    matrix = Matrix(keys, read)
    rows, compositions, sensitivities = matrix.rows(), matrix.compositions(), matrix.sensitivities()
    named = dict.fromkeys(key.column for key in keys if key.column in CORE_COLUMNS)
    contests = [matrix.contest("toxicity", column, "kv", "lora_r16") for column in named]
    return {
        "goals": judge_goals(rows, sensitivities, contests),
        "cells": rows,
        "contests": contests,
        "composition": compositions,
        "order_sensitivity": sensitivities,
        "examples": examples(keys, read, "examples"),
    }


def command_line(words: Sequence[str], data: Path | None) -> str:
    """The command that made a document; where the data lie is the user's own business."""
    shown = ["$EDGEPATCH_DATA" if data is not None and word == str(data) else shlex.quote(word) for word in words]
    return " ".join(["python", "-m", "edgepatch.bench.evidence", *shown])


def training_curves(out: Path) -> list[dict[str, Any]]:
    """The curves of the first training run of every arm, at most ``CURVE_POINTS`` values each."""
    found = []
    for path in sorted((out / "arms").glob("*/*-1/run/curves.json")):
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}", hint="delete it") from error
        curves = {name: _thinned(values) for name, values in known.items() if isinstance(values, list)}
        found.append({"domain": path.parts[-4], "arm": path.parts[-3].removesuffix("-1"), "curves": curves})
    return found


def _thinned(values: list[float]) -> list[float]:
    step = -(-len(values) // CURVE_POINTS)
    return [float(f"{value:.4g}") for value in values[::step]] if values else []


def write_document(document: Document, folder: Path, **page: Any) -> None:
    """Writes ``evidence.json`` and ``evidence.html``; ``page`` takes the place of fields of the document on the page alone."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "evidence.json", (text + "\n").encode())
    write_atomically(folder / "evidence.html", render_page({**document, **page}).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m edgepatch.bench.evidence", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the public data sets (default: $EDGEPATCH_DATA)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "evidence", help="folder for models, patches and raw cells"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--no-training", action="store_true", help="measure only what is trained already")
    parser.add_argument("--no-measuring", action="store_true", help="only assemble what is measured already")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=DOMAINS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument(
        "--columns", nargs="+", default=(), metavar="COLUMN", help="names of columns, as 'llamacpp Q4_K_M'"
    )
    parser.add_argument("--no-composition", action="store_true")
    parser.add_argument(
        "--prompts",
        nargs=3,
        type=int,
        metavar=("CORE", "COMPOSED", "REST"),
        help="of every domain, in each kind of cell",
    )
    parser.add_argument("--publish", action="store_true", help="write bench/results too")
    return parser


def _config(arguments: argparse.Namespace) -> EvidenceConfig:
    known = [column.name for column in columns()]
    if unknown := [name for name in arguments.columns if name not in known]:
        raise InputError(f"columns: there is no {unknown[0]!r}", hint=f"one of {', '.join(known)}")
    config = EvidenceConfig(
        domains=tuple(arguments.domains),
        arms=tuple(arguments.arms),
        columns=tuple(arguments.columns),
        composition=not arguments.no_composition,
    )
    return replace(config, items=dict.fromkeys(DOMAINS, tuple(arguments.prompts))) if arguments.prompts else config


def measure(
    place: Workplace, keys: Sequence[CellKey], config: EvidenceConfig, num_workers: int, progress: Progress
) -> None:
    """Measures every cell that is due, telling of each, and on stderr of each that fails."""
    wanted = due(place, keys, config)
    done = 0
    progress("cells", done, len(wanted))

    def report(key: CellKey, reason: str) -> None:
        nonlocal done
        done += 1
        if reason:
            print(f"FAILED {key}: {reason}", file=sys.stderr, flush=True)
        progress("cells", done, len(wanted))

    measure_cells(groups(wanted), place, config, num_workers, report)


def run(arguments: argparse.Namespace, progress: Progress = silent) -> int:
    """Trains, measures, assembles and writes; exit code 1 when a cell failed."""
    began = time.monotonic()
    place, config = Workplace(arguments.out, arguments.data or data_folder()), _config(arguments)
    keys = plan(config)
    if not arguments.no_measuring:
        convert_columns(place.out / "bases", progress=progress)
        if not arguments.no_training:
            from edgepatch.bench.evidence.training import train_missing

            train_missing(place.out, place.data, progress)
        measure(place, keys, config, arguments.workers, progress)
    read = partial(read_cell, place.cells)
    document = {
        "command": command_line(sys.argv[1:], arguments.data),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(sum((read(key) or {}).get("cpu_seconds", 0) for key in keys)),
        "environment": environment(),
        "settings": config.as_dict(),
        **assemble(keys, read),
        "curves": training_curves(place.out),
    }
    write_document(document, place.out, examples=examples(keys, read, "safety"))
    if arguments.publish:
        write_document(document, RESULTS)
    return _tell(document)


def _tell(document: Document) -> int:
    met = sum(goal["met"] for goal in document["goals"])
    failed = [reason for cell in [*document["cells"], *document["composition"]] for reason in cell["failed"]]
    print(f"{met} of {len(document['goals'])} goals are met; {len(failed)} measurements failed or are missing")
    for reason in failed[:20]:
        print(f"FAILED {reason}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Parses the command line and runs."""
    arguments = _parser().parse_args()
    tell = partial(print, file=sys.stderr, flush=True)
    try:
        with (
            interrupts.orderly(),
            logged(arguments.out / "evidence.log", tell, [Lines(tell, OF_STREAM)], lambda: KEPT) as told,
        ):
            return run(arguments, told)
    except EdgepatchError as error:
        print(f"error: {error}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    except interrupts.Stopped as stopped:
        return stopped.exit_code
