"""``bench report`` and ``bench gate``: what is done with measurements that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepatch.cli.bench.door import RESULTS, bench_app
from edgepatch.cli.console import JsonFlag, cell, counted, print_json, stdout
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.bench.report.gate import Failure

ResultsOption = Annotated[Path, typer.Option(help="Folder of the JSON files that measurements left.")]


@bench_app.command()
def report(
    results: ResultsOption = RESULTS,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file. Default: report.html with the results.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make one HTML page from all results: safety, speed, growth, goals, environment, commands.

    Example: `edgepatch bench report --results bench/results`
    """
    from edgepatch.bench.report.files import RESULT_FILES, read_results
    from edgepatch.bench.report.overview import goals, headline, render_html
    from edgepatch.files.writing import write_atomically

    files = read_results(results)
    page = out or results / "report.html"
    write_atomically(page, render_html(files).encode())
    if as_json:
        names = ("of", "goal", "on", "wanted", "reached", "verdict")
        judged = [dict(zip(names, goal, strict=True)) for goal in goals(files)]
        missing = [file.name for file in RESULT_FILES if file.name not in files]
        print_json({"html": str(page), "goals": judged, "missing": missing})
    else:
        stdout().print(f"{cell(headline(files))}\n{cell(page)}", soft_wrap=True)


@bench_app.command()
def gate(
    baseline: Annotated[Path | None, typer.Option(help="JSON file with a floor or a ceiling for each figure.")] = None,
    write: Annotated[
        Path | None, typer.Option(help="Make such a file from the present results, with the tolerances that it states.")
    ] = None,
    results: ResultsOption = RESULTS,
    as_json: JsonFlag = False,
) -> None:
    """Hold results against a baseline: exit code 0 when all figures pass, 1 when one is worse or missing, 2 for input that cannot be used.

    Examples: `edgepatch bench gate --baseline baseline.json`, `edgepatch bench gate --write baseline.json`
    """
    from edgepatch.bench.report.gate import as_document, check, figures, make_baseline, read_baseline
    from edgepatch.files.writing import write_atomically

    if (baseline is None) == (write is None):
        raise InputError("expected either --baseline or --write, found " + ("both" if baseline else "neither"))
    if write is not None:
        written = make_baseline(figures(results), f"edgepatch bench gate --results {results} --write {write}")
        write_atomically(write, (json.dumps(written, indent=1) + "\n").encode())
        stdout().print(f"{cell(write)}: {counted(len(written['figures']), 'figure')}", soft_wrap=True)
        return
    assert baseline is not None
    bounds = read_baseline(baseline)
    failures = check(bounds, figures(results))
    if as_json:
        print_json(as_document(failures, len(bounds)))
    else:
        _tell(failures, len(bounds))
    if failures:
        raise typer.Exit(1)


def _tell(failures: list[Failure], num_figures: int) -> None:
    for failure in failures:
        line = f"{failure.figure}: {failure.reason}: expected {failure.expected}, found {failure.found}"
        stdout().print(cell(line), soft_wrap=True)
    stdout().print(f"{num_figures - len(failures)} of {num_figures} figures pass", soft_wrap=True)
