"""``bench lab``, ``judges``, ``judge-card``, ``compare-judges``: what the measurements of this project stand on, built anew from public data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import (
    RESULTS,
    DataOption,
    OutOption,
    bench_app,
    require_data,
    use_one_thread,
)
from edgepatch.cli.console import counted, model_path, print_table, progress_bars

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
    num_met = sum(row["met"] for row in floors)
    print_table(
        ("floor", "wanted", "reached", "met"), rows, f"{num_met} of {counted(len(floors), 'floor')} are reached"
    )
    if not all(row["met"] for row in floors):
        raise typer.Exit(1)


@bench_app.command()
def judges(
    data: DataOption = None,
    out: JudgesOption = None,
    semantic: Annotated[
        bool, typer.Option("--semantic", help="Train the semantic judges instead: ten minutes, with torch and minilm.")
    ] = False,
) -> None:
    """Train the two toxicity judges from public data and measure them; half a minute, with scikit-learn.

    Examples: `edgepatch bench judges --data data`, `edgepatch bench judges --semantic --data data`
    """
    folder = require_data(data)
    from edgepatch.bench.lab.judges.card import FOLDER

    if semantic:
        use_one_thread()
        from edgepatch.bench.lab.judges import semantic_training

        with progress_bars() as progress:
            files = semantic_training.run(folder, out or FOLDER, progress)
        for file in files:
            print(file)
        return
    from edgepatch.bench.lab.judges import training

    print(training.run(folder, out or FOLDER))


@bench_app.command()
def judge_card(data: DataOption = None, out: JudgesOption = None) -> None:
    """Measure calibration and AUC of the judge that reports, on text that it was not trained on.

    Example: `edgepatch bench judge-card --data data`
    """
    folder = require_data(data)
    from edgepatch.bench.lab.judges.card import FOLDER, section, write_card

    print(section(write_card(folder, out or FOLDER)))


@bench_app.command()
def compare_judges(
    data: DataOption = None,
    model: Annotated[
        str, typer.Option("--model", help="The model whose texts were read: smollm2, or its file.")
    ] = "smollm2",
    judge: Annotated[
        Path | None, typer.Option("--judge", metavar="DIR", help="One more judge: a text-classification folder.")
    ] = None,
    unsafe_label: Annotated[
        list[str] | None, typer.Option(help="Label of that folder that counts as unsafe; repeat it.")
    ] = None,
    card: JudgesOption = None,
    out: OutOption = RESULTS / "judges.json",
) -> None:
    """Set all judges beside each other: on data that none was trained on, and on 300 texts of a real model that were read.

    Example: `edgepatch bench compare-judges --data data`
    """
    folder = require_data(data)
    use_one_thread()
    from edgepatch.bench.lab.judges import comparing, readings
    from edgepatch.bench.lab.judges.card import FOLDER
    from edgepatch.bench.lab.judges.comparison_card import section, write_comparison
    from edgepatch.judges.classifiers import load_judge
    from edgepatch.runtimes import load_runtime

    extra = [load_judge(judge, unsafe_label or [])] if judge else []
    with progress_bars() as progress:
        with load_runtime(model_path(model), None, **readings.RUNTIME) as session:
            texts, differing = readings.read_again(session, folder, progress=progress)
        document = comparing.compare(folder, texts, differing, extra, progress)
    write_comparison(document, card or FOLDER, out)
    print(section(document))
