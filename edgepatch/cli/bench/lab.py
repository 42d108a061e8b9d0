"""``bench lab``, ``judges``, ``judge-card``: what the measurements of this project stand on, built anew from public data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import DataOption, bench_app, print_table, require_data

JudgesOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder of the judges and their card; default: where they ship."),
]


@bench_app.command()
def lab(
    data: DataOption = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Scratch folder; a stage that is done is skipped.")
    ] = Path("out/lab"),
    publish: Annotated[bool, typer.Option("--publish", help="Copy the result to bench/lab/model.")] = False,
) -> None:
    """Train the lab models M and M' from public data and measure them.

    Example: `edgepatch bench lab --data data --out out/lab`
    """
    folder = require_data(data)
    from edgepatch.bench.lab import build

    floors = build.run(folder, out, publish)["floors"]
    rows = [(row["floor"], row["wanted"], row["reached"], "yes" if row["met"] else "NO") for row in floors]
    print_table(("floor", "wanted", "reached", "met"), rows)
    if not all(row["met"] for row in floors):
        raise typer.Exit(1)


@bench_app.command()
def judges(data: DataOption = None, out: JudgesOption = None) -> None:
    """Train the two toxicity judges from public data and measure them; half a minute, with scikit-learn.

    Example: `edgepatch bench judges --data data`
    """
    folder = require_data(data)
    from edgepatch.bench.lab.judges import training
    from edgepatch.bench.lab.judges.card import FOLDER

    print(training.run(folder, out or FOLDER))


@bench_app.command()
def judge_card(data: DataOption = None, out: JudgesOption = None) -> None:
    """Measure calibration and AUC of the judge that reports, on text that it was not trained on.

    Example: `edgepatch bench judge-card --data data`
    """
    folder = require_data(data)
    from edgepatch.bench.lab.judges.card import FOLDER, section, write_card

    print(section(write_card(folder, out or FOLDER)))
