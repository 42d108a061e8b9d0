"""``bench safety``: whether a patch holds on a model of the user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.bench.door import DataOption, bench_app
from edgepatch.cli.console import (
    ForceFlag,
    JsonFlag,
    LogOption,
    ModelArgument,
    note,
    print_json,
    print_table,
    progress_bars,
    tell,
)
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.bench.evidence.questions import Amounts


class SafetyDomain(str, Enum):
    """What is measured."""

    toxicity = "toxicity"
    gender = "gender"
    harm = "harm"


class HarmJudge(str, Enum):
    """Who says whether a harmful request was complied with."""

    rules = "rules"
    semantic = "semantic"


@bench_app.command()
def safety(
    model: ModelArgument,
    patch: Annotated[
        list[Path] | None,
        typer.Option(
            "--patch", "-p", help="Patch file; several act side by side. Without one the bare model is measured."
        ),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            metavar="TYPE",
            help="Make and measure this form too: Q8_0, Q4_K_M, Q2_K, onnx-int8, onnx-int4, torch, ... Repeat it.",
        ),
    ] = None,
    domain: Annotated[list[SafetyDomain] | None, typer.Option(help="Only this domain; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first impression: few prompts, wide intervals.")] = False,
    prompts: Annotated[int | None, typer.Option(min=2, help="Prompts of toxicity. Default: 350.")] = None,
    samples: Annotated[int | None, typer.Option(min=5, help="Continuations of each. Default: 25.")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="Prompts of gender, requests of harm. Default: 200.")] = None,
    requests: Annotated[
        int | None, typer.Option(min=2, help="Harmless requests, for over-refusal. Default: 400.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Another patch on the same prompts, an older version for instance; files with commas act together. Repeat it.",
        ),
    ] = None,
    instruction: Annotated[
        bool, typer.Option("--instruction", help="Measure the bare model behind a written safety text too.")
    ] = False,
    judge: Annotated[
        str,
        typer.Option(metavar="NAME|FOLDER", help="Who reports toxicity: report, or a Transformers classifier folder."),
    ] = "report",
    harm_judge: Annotated[
        HarmJudge,
        typer.Option(
            help='Who reports harm. The rules count replies that open with "Sure, here is"; semantic reads all (`make minilm`).'
        ),
    ] = HarmJudge.rules,
    unsafe_label: Annotated[
        list[str] | None, typer.Option(help="Label of the judge's folder that counts as unsafe; repeat it.")
    ] = None,
    data: DataOption = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for forms, raw cells, results.json and report.html."),
    ] = Path("out/safety"),
    workers: Annotated[int, typer.Option(min=1, help="Processes; each loads the model.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    cluster: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Measure on a Ray cluster (auto, ray://host:10001): the folder must be shared."
        ),
    ] = "",
    force: ForceFlag = False,
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Does a patch hold on your model? Toxicity, gender and harm, bare and patched, and what must stay as it was.

    Exit code 0: it holds (or there was no patch to judge). 1: it does not, or not everything could be measured. 2: something cannot be used.
    What is measured is kept in the folder: the same command goes on where it was stopped.

    Examples: `edgepatch bench safety smollm2 --patch detox.safetensors --quick`,
    `edgepatch bench safety model.gguf --patch detox.safetensors --on Q8_0 --on Q4_K_M --on onnx-int4`
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # libraries read it when they are loaded
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.evidence import own_model
    from edgepatch.bench.evidence.questions import QUICK, Amounts, Question
    from edgepatch.bench.report.own_model import render_page
    from edgepatch.files.writing import write_atomically

    question = Question(
        model,
        tuple(patch or ()),
        tuple(on or ()),
        tuple(each.value for each in dict.fromkeys(domain or ())),
        amounts_of(QUICK if quick else Amounts(), prompts, samples, items, requests),
        judge=judge,
        harm_judge=harm_judge.value,
        unsafe_labels=tuple(unsafe_label or ()),
        num_workers=workers,
        num_threads=threads,
        is_quick=quick,
        cluster=cluster,
        beside=_beside(beside or (), bool(patch)),
        is_instructed=instruction,
    )
    kept = f"what is measured is kept in {out}; the same command goes on from there"
    with progress_bars(log or out / "safety.log", lambda: kept) as progress:
        document = own_model.run(question, out, data_folder(data), progress, note, replaces=force)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(out / own_model.RESULTS_NAME, (text + "\n").encode())
    write_atomically(out / "report.html", render_page(document).encode())
    if as_json:
        print_json(document)
    else:
        print_summary(document)
        print(f"results {out / own_model.RESULTS_NAME}\nreport  {out / 'report.html'}")
    _end(document)


def print_summary(document: dict[str, Any]) -> None:
    """The answer, then one line a domain and form."""
    from edgepatch.bench.report.own_model import terminal_notes, terminal_table

    print_table(*terminal_table(document), document["verdict"]["sentence"])
    for line in terminal_notes(document):
        tell(line)


def amounts_of(
    amounts: Amounts, prompts: int | None, samples: int | None, items: int | None, requests: int | None
) -> Amounts:
    """The amounts, with those that were named in place of their own."""
    named: dict[str, Any] = {"prompts": prompts, "samples": samples, "items": items}
    retained = amounts.retained if requests is None else replace(amounts.retained, num_requests=requests)
    return replace(amounts, retained=retained, **{name: n for name, n in named.items() if n is not None})


def _beside(named: Sequence[str], is_patched: bool) -> dict[str, tuple[Path, ...]]:
    """Name -> patch files."""
    if named and not is_patched:
        raise InputError("--beside: expected --patch, what the others stand beside; found none", hint="name it")
    arms = dict[str, tuple[Path, ...]]()
    for words in named:
        name, separator, files = words.partition("=")
        if not (separator and all(files.split(","))):
            raise InputError(f"--beside: expected NAME=FILE, found {words!r}", hint="--beside next=next.safetensors")
        if name in arms:
            raise InputError(f"--beside: {name} is named twice", hint="give each another name")
        arms[name] = tuple(map(Path, files.split(",")))
    return arms


def _end(document: dict[str, Any]) -> None:
    """Says what failed; exit code 1 where the patch does not hold."""
    from edgepatch.bench.evidence.own_model import failures

    failed = failures(document)
    for line in failed[:10]:
        note(f"FAILED {line}")
    if failed or document["verdict"]["holds"] is False:
        raise typer.Exit(1)
