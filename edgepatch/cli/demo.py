"""``demo``: the main job on the lab model, in one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import JsonFlag, print_json, progress_bars, stdout


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for models, patch, results.json and report.html.")
    ] = Path("out/demo"),
    data: Annotated[
        Path | None, typer.Option(help="Data folder (default: EDGEPATCH_DATA); without it our own prompts are used.")
    ] = None,
    lab: Annotated[Path | None, typer.Option(help="Folder with the lab models base/ and reference/.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts behind the table.")] = 48,
    samples: Annotated[int, typer.Option(min=1, help="Continuations a prompt.")] = 25,
    rng_seed: Annotated[int, typer.Option(help="Random seed of training.")] = 1,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="Log of the progress, added to; default: demo.log in the folder."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a patch for the lab model and measure it on PyTorch, GGUF and ONNX, bare and patched. It stays at the start of the text.

    Example: `edgepatch demo --out out/demo`
    """
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.demo import run as main_job
    from edgepatch.bench.lab import LAB_FOLDER
    from edgepatch.bench.report.matrix_page import print_table
    from edgepatch.bench.safety.continuations import SampleConfig

    config = main_job.DemoConfig(
        num_prompts=prompts,
        samples=SampleConfig(samples),
        train=replace(main_job.TRAIN, rng_seed=rng_seed),
    )
    kept = f"complete files stay in {out}, the measurements do not; the same command starts again"
    with progress_bars(log or out / "demo.log", lambda: kept) as bars:
        document, page = main_job.run_demo(out, data_folder(data), lab or LAB_FOLDER, config, bars)
    if as_json:
        print_json(document)
        return
    print_table(document, stdout())
    print(f"results {page.parent / 'results.json'}\nreport  {page}")
