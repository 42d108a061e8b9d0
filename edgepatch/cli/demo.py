"""``demo``: the main job on a real model, or with ``--lab`` on the lab model, in one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import JsonFlag, model_path, note, print_json, print_table, progress_bars, tell, warn
from edgepatch.errors import InputError


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for models, results.json and report.html.")] = Path(
        "out/demo"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="MODEL", parser=model_path, help="GGUF file of SmolLM2-135M-Instruct; default: smollm2."
        ),
    ] = None,
    patch: Annotated[
        list[Path] | None,
        typer.Option("--patch", "-p", help="Its patch; several act side by side. Default: those that ship."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data folder (default: EDGEPATCH_DATA); without it our own prompts are used.")
    ] = None,
    lab: Annotated[
        bool, typer.Option("--lab", help="Take the lab model, which needs no download, and train a patch live.")
    ] = False,
    lab_models: Annotated[Path | None, typer.Option(help="--lab: folder with base/ and reference/.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="--lab: prompts behind the table.")] = 48,
    samples: Annotated[int, typer.Option(min=1, help="--lab: continuations a prompt.")] = 25,
    rng_seed: Annotated[int, typer.Option(help="--lab: random seed of training.")] = 1,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="Log of the progress, added to; default: demo.log in the folder."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure shipped patches on a real model and forms of it, bare and patched, and let both answer the same prompts.

    With --lab: train a patch for the lab model and measure it on PyTorch, GGUF and ONNX.

    Examples: `edgepatch demo`, `edgepatch demo --lab`
    """
    if lab and (model or patch):
        raise InputError("--lab: expected without --model and --patch, which are for the real model")
    if lab:
        _lab_demo(out, data, lab_models, prompts, samples, rng_seed, log, as_json)
    else:
        _real_demo(out, model or model_path("smollm2"), patch, data, log, as_json)


def _real_demo(
    out: Path, model: Path, patches: list[Path] | None, data: Path | None, log: Path | None, as_json: bool
) -> None:
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.demo.real import run_real_demo, shipped_patches
    from edgepatch.bench.evidence.own_model import why_missing
    from edgepatch.cli.bench.safety import print_summary

    if not patches:
        patches = shipped_patches()
        names = ", ".join(path.name for path in patches)
        note(f"shipped patches: {names}; to train them takes longer than a demo: patches/README.md has the commands")
    kept = f"what is measured is kept in {out}; the same command goes on from there"
    with progress_bars(log or out / "demo.log", lambda: kept) as progress:
        document, answers = run_real_demo(model, patches, out, data_folder(data), progress, note)
    if as_json:
        print_json(document)
        return
    print_summary(document)
    for line in why_missing(document):
        warn(line)
    for answer in answers:
        print_table(("bare", "patched"), [(answer.bare, answer.patched)], answer.prompt)
    print(f"results {out / 'results.json'}\nreport  {out / 'report.html'}")


def _lab_demo(
    out: Path,
    data: Path | None,
    lab_models: Path | None,
    prompts: int,
    samples: int,
    rng_seed: int,
    log: Path | None,
    as_json: bool,
) -> None:
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.demo import run as main_job
    from edgepatch.bench.lab import LAB_FOLDER
    from edgepatch.bench.report.matrix_page import TABLE_COLUMNS, terminal_table
    from edgepatch.bench.safety.continuations import SampleConfig

    config = main_job.DemoConfig(
        num_prompts=prompts,
        samples=SampleConfig(samples),
        train=replace(main_job.TRAIN, rng_seed=rng_seed),
    )
    kept = f"complete files stay in {out}, the measurements do not; the same command starts again"
    with progress_bars(log or out / "demo.log", lambda: kept) as bars:
        document, page = main_job.run_demo(out, data_folder(data), lab_models or LAB_FOLDER, config, bars)
    if as_json:
        print_json(document)
        return
    sentence, rows, notes = terminal_table(document)
    print_table(TABLE_COLUMNS, rows, sentence)
    for line in notes:
        tell(line)
    print(f"results {page.parent / 'results.json'}\nreport  {page}")
