"""``edgepatch bench safety``: does a patch hold on a model of the user's own? Bare against patched, on every form that is asked for.

The cells, the processes that measure them and the statistics are those of the evidence matrix. What is measured is kept: a run that was
stopped goes on, and one with a further quantization measures that alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from edgepatch.bench.environment import environment
from edgepatch.bench.evidence.cells import UNTRAINED_ARMS, CellKey, EvidenceConfig, groups, read_cell
from edgepatch.bench.evidence.cluster import measure_on_cluster, require_ray
from edgepatch.bench.evidence.forms import given_column, made_columns, make_forms
from edgepatch.bench.evidence.measuring import Workplace, due
from edgepatch.bench.evidence.probing import Probe, Speed, probe_model
from edgepatch.bench.evidence.questions import Question, config_of, fronts_of, plan_model, require_domains
from edgepatch.bench.evidence.statistics import Matrix
from edgepatch.bench.evidence.verdict import judge
from edgepatch.bench.evidence.workers import measure_cells
from edgepatch.errors import InputError
from edgepatch.files.writing import require_writable
from edgepatch.patch.file import Patch, read_patch
from edgepatch.progress import Progress, duration, published_command, silent

Document = dict[str, Any]

RESULTS_NAME = "results.json"
QUESTION_FIELDS = ("model", "patches", "settings")
"""What makes two documents answers to one question."""

_ELSEWHERE = "name another folder with --out, or --force to replace them; raw measurements stay"

NUM_EXAMPLES = 4
LONG_S = 600.0


# Running.


def run(
    question: Question,
    out: Path,
    data: Path | None = None,
    progress: Progress = silent,
    tell: Any = print,
    replaces: bool = True,
) -> Document:
    """Makes the forms, measures them and judges.

    Args:
        question: what is asked.
        out: folder for forms and raw cells.
        data: folder of the public data sets; ``None`` takes the prompts that ship with edgepatch.
        progress: told of forms and cells.
        tell: gets what the user must know before the work: what is skipped, and how long it takes.
        replaces: whether the results of another question that lie in the folder may be replaced.

    Returns:
        The document.

    Raises:
        InputError: something cannot be used, or nothing can be written.
    """
    began = time.monotonic()
    question.require_names()
    require_writable(out)
    patches = [read_patch(path) for path in question.patches]
    beside = {name: [read_patch(path) for path in files] for name, files in question.beside.items()}
    _require_judge(question)
    if question.cluster:
        require_ray()
    made = made_columns(question.model, question.types)
    probe = probe_model(question.model, patches, question.num_threads, progress)
    for patch in (patch for arm in beside.values() for patch in arm):
        patch.base.require_same(probe.spec)
    subject = _subject(question, probe, patches, beside) | {"settings": _settings(question, data)}
    if not replaces:
        _require_same_question(out / RESULTS_NAME, subject)
    given = given_column(question.model, probe.runtime, probe.quantization)
    skipped = require_domains(question, probe)
    columns = [given, *(column for column in made if column.name != given.name)]
    seeds = [sum(patch.num_virtual_tokens for patch in arm) for arm in (patches, *beside.values())]
    num_virtual_tokens = max(seeds)
    config = config_of(question, columns, probe, num_virtual_tokens)
    is_toxicity = "toxicity" in config.domains
    has_fronts = is_toxicity and question.amounts.fronted > 0
    fronts, short = fronts_of(question.amounts, probe, num_virtual_tokens) if has_fronts else ([], [])
    place = Workplace(out, data, question.arms)
    keys = plan_model(config, list(question.arms), fronts, question.scopes)
    _require_data(config, data)
    for line in (*skipped, *short):
        tell(f"skipped: {line}")
    speed = Speed(probe, config)
    tell(_forecast(question, speed, keys))
    files = make_forms(question.model, columns, out, progress)
    own = tuple(replace(column, file=str(column.path(files).absolute())) for column in columns)
    config = replace(config, known_columns=own)
    measure(place, keys, config, speed, question, progress)
    document = {
        "command": published_command(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began),
        "environment": environment(),
        **subject,
        "skipped": [*skipped, *short],
    }
    return document | assemble(keys, partial(read_cell, place.cells), config, question.domains)


def _settings(question: Question, data: Path | None) -> Document:
    judges = {"judge": question.judge, "harm_judge": question.harm_judge}
    return {"data": "public" if data else "own prompts", **judges, **asdict(question.amounts)}


def _require_same_question(results: Path, subject: Mapping[str, Any]) -> None:
    """A measurement goes on in its own folder, with further forms and arms; another one would take its results away.

    Raises:
        InputError: the file holds the results of another model, other patches or other amounts, or no results.
    """
    if not results.exists():
        return
    try:
        earlier = json.loads(results.read_bytes())
        kept = {name: earlier[name] for name in QUESTION_FIELDS}
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{results}: expected results of this measurement, found another file", hint=_ELSEWHERE
        ) from None
    asked = json.loads(json.dumps({name: subject[name] for name in QUESTION_FIELDS}))
    if other := next((name for name in QUESTION_FIELDS if kept[name] != asked[name]), None):
        raise InputError(
            f"{results}: expected results of this measurement, found those of another one: "
            f"{other} there {_brief(kept[other], asked[other])}, here {_brief(asked[other], kept[other])}",
            hint=_ELSEWHERE,
        )


def _brief(value: Any, other: Any) -> str:
    """A field of the question in a few words: of several values those that the other one has not."""
    if isinstance(value, dict) and isinstance(other, dict):
        return ", ".join(f"{name} {field}" for name, field in value.items() if other.get(name) != field) or "less"
    try:
        return ", ".join(f"{patch['name']} {patch['version']} ({patch['digest'][:12]})" for patch in value) or "none"
    except (TypeError, KeyError):
        return "something else"


def _require_judge(question: Question) -> None:
    from edgepatch.judges.classifiers import load_judge
    from edgepatch.judges.semantic import load_answer_judge

    load_judge(question.judge, question.unsafe_labels)
    load_answer_judge(question.harm_judge, "report")


def _require_data(config: EvidenceConfig, data: Path | None) -> None:
    """Reads every data set once: a file that is missing shows before the work."""
    from edgepatch.bench.safety import gender_prompts, harm, retained
    from edgepatch.bench.safety.toxicity import ToxicityDomain

    if "toxicity" in config.domains:
        ToxicityDomain(data).evaluation_prompts()
    if "gender" in config.domains:
        gender_prompts.evaluation_prompts(data)
    if "harm" in config.domains:
        harm.evaluation_requests(data)
    retained.require_data(data, bool(config.retained[0].num_requests))


def _forecast(question: Question, speed: Speed, keys: Sequence[CellKey]) -> str:
    """What there is to do, how long it takes, and what to do where that is long."""
    seconds, count = speed.of_run(keys, question.num_workers), question.num_workers
    words = f"{len(keys)} measurements, about {duration(seconds)} on {count} process{'es' * (count > 1)}"
    if seconds < LONG_S:
        return words
    less = "fewer --prompts or a smaller model take less" if question.is_quick else "--quick says less, much sooner"
    return f"{words}; {less}; what is measured is kept, so the run may be stopped"


def measure(
    place: Workplace,
    keys: Sequence[CellKey],
    config: EvidenceConfig,
    speed: Speed,
    question: Question,
    progress: Progress,
) -> None:
    """Measures what is due; margins last, because their pairs are the bare model's continuations."""
    done = dict.fromkeys(keys, 0.0)
    weights = {key: speed.seconds(key) for key in keys}
    total = max(1, round(sum(weights.values())))
    failed = 0

    def show() -> None:
        spent = sum(weights[key] * share for key, share in done.items())
        progress("measure", min(total, round(spent)), total, **({"failed": failed} if failed else {}))

    def moved(key: CellKey, share: float) -> None:
        done[key] = share
        show()

    def report(key: CellKey, reason: str) -> None:
        nonlocal failed
        failed += bool(reason)
        moved(key, 1.0)

    first, last = ([key for key in keys if (key.measure == "margins") is is_last] for is_last in (False, True))
    for part in (first, last):
        waiting = due(place, part, config)
        for key in part:
            done[key] = 0.0 if key in waiting else 1.0
        show()
        try:
            if question.cluster:
                measure_on_cluster(groups(waiting), place, config, question.cluster, report)
            else:
                measure_cells(groups(waiting), place, config, question.num_workers, report, moved)
        except InputError as error:  # the disk is full, or the folder is gone
            kept = "what is measured is kept; the same command goes on"
            raise InputError(str(error), hint="; ".join(part for part in (error.hint, kept) if part)) from error


def _describe(patches: Sequence[Patch]) -> list[dict[str, str]]:
    return [{"name": patch.name, "version": patch.version, "digest": patch.digest} for patch in patches]


def _subject(
    question: Question, probe: Probe, patches: Sequence[Patch], beside: Mapping[str, Sequence[Patch]]
) -> Document:
    described = _describe(patches)
    return {
        "model": {"name": question.model.name, "runtime": probe.runtime, "quantization": probe.quantization},
        "base": probe.spec.as_dict(),
        "patches": described,
        "patch": described[0] if len(described) == 1 else None,
        "beside": {name: _describe(arm) for name, arm in beside.items()},
    }


# The document.


def assemble(keys: Sequence[CellKey], read: Any, config: EvidenceConfig, asked: Sequence[str]) -> Document:
    """The measured part of the document, from raw cells alone."""
    matrix = Matrix(keys, read, config.known_columns, config.reference)
    rows = [{**row, "patched": row["arm"] not in UNTRAINED_ARMS} for row in matrix.rows()]
    fronted = matrix.fronted()
    fields = ("domain", "arm", "runtime", "quantization", "retention", "margin_retention")
    ends = [f"{field}_{end}" for field in fields[4:] for end in ("low", "high")]
    kept = [{name: row.get(name) for name in (*fields, *ends)} for row in rows if row["patched"]]
    return {
        "reference": config.reference,
        "cells": rows,
        "fronted": fronted,
        "retention": kept,
        "verdict": judge(rows, fronted, config.reference, asked),
        "examples": list(examples(keys, read)),
    }


def examples(keys: Sequence[CellKey], read: Any) -> Iterator[dict[str, Any]]:
    """What bare and patched said on the first column: items at even distances, none picked."""
    for key in keys:
        if (key.measure, key.arm, key.front, key.column) != ("safety", "patch", "", keys[0].column):
            continue
        patched, bare = read(key), read(replace(key, arm="bare"))
        if any(raw is None or "failed" in raw for raw in (patched, bare)):
            continue
        pairs = list(zip(bare["texts"], patched["texts"], strict=True))
        for one, other in pairs[:: max(1, len(pairs) // NUM_EXAMPLES)][:NUM_EXAMPLES]:
            yield {
                "domain": key.domain,
                "column": key.column,
                "item": one["item"],
                "bare": _worst(one),
                "bare_value": one["value"],
                "patched": _worst(other),
                "patched_value": other["value"],
            }


def _worst(row: dict[str, Any]) -> str:
    """The text with the highest score, where texts are scored; else the first."""
    scores = row.get("scores")
    texts = row["texts"] or [""]
    return str(texts[scores.index(max(scores))] if scores else texts[0])


def why_missing(document: Document) -> list[str]:
    """Each form with what kept it from being measured, once; what was measured there does not matter."""
    lines = dict[str, None]()
    for row in (*document["cells"], *document["fronted"]):
        for reason in row["failed"]:
            words = reason.partition(f" {row['column']}: ")[2] or reason
            lines[f"not measured on {row['column']}: {words}"] = None
    return list(lines)


def failures(document: Document) -> list[str]:
    """Why measurements failed."""
    return list(dict.fromkeys(reason for row in [*document["cells"], *document["fronted"]] for reason in row["failed"]))
