"""The group that every measurement registers with, and the options that measurements share."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.application import Application, app
from edgepatch.errors import InputError

RESULTS = Path("bench") / "results"
SHAPES = Path("out") / "shapes"

bench_app = Application(
    help="Measure: a model of yours, bare and patched, and everything that this project claims.\n\n"
    "Example: `edgepatch bench harness model.gguf --tasks own_choice`",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")

ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Repeats that count.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of the public data sets; else EDGEPATCH_DATA.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="JSON file of the results.")]
ResultsFolderOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the results.")]


def use_one_thread() -> None:
    """The models are so small that threads only wait for each other. Libraries read this when they are loaded."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def require_data(folder: Path | None) -> Path:
    """The data folder that is named, else that of the environment.

    Raises:
        InputError: no folder is named, or it does not exist.
    """
    from edgepatch.bench.datasets import DATA_VARIABLE, data_folder

    data = data_folder(folder)
    if data is None:
        raise InputError(
            "no data folder was named",
            hint=f"set {DATA_VARIABLE} or pass --data; bench/data.md lists the files",
        )
    return data


def end_with(failures: Sequence[str]) -> None:
    """Says on stderr what failed, a line each; exit code 1 where there is any."""
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
