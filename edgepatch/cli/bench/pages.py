"""``bench pages``: every kind of page in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import RESULTS, bench_app, end_with
from edgepatch.cli.bench.results import ResultsOption
from edgepatch.cli.console import JsonFlag, LogOption, counted, print_json, print_table, progress_bars


@bench_app.command()
def pages(
    results: ResultsOption = RESULTS,
    browser: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Chromium; else EDGEPATCH_CHROMIUM, else the one installed.")
    ] = None,
    axe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="axe-core's axe.min.js; else npm fetches it into the folder.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this kind: report, evidence, own, safety, curves; may be repeated."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for pages, pictures and pages.json.")
    ] = Path("out/pages"),
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Look at each kind of page on a phone, a tablet and a desktop, light and dark: widths, sizes of text, axe-core.

    Exit code 1 where a page does not keep what it should. Nothing is written but the folder.

    Example: `edgepatch bench pages --browser /usr/bin/chromium`
    """
    from edgepatch.bench.pages import run
    from edgepatch.bench.pages.browser import find_browser

    program = find_browser(browser)
    with progress_bars(log or out / "pages.log", lambda: "the same command begins anew") as progress:
        rows = run.run(results, out, program, axe or run.fetch_axe(out / "axe"), only or (), progress)
    if as_json:
        print_json(rows)
    else:
        sizes = ("height", "overflow", "smallest_text_px")
        lines = [
            [
                row["page"],
                row["view"],
                *("" if row[name] is None else f"{row[name]:.4g}" for name in sizes),
                len(row["problems"]),
            ]
            for row in rows
        ]
        num_sound = sum(not row["problems"] for row in rows)
        answer = f"{num_sound} of {counted(len(rows), 'view')} are as they should be; pictures are in {out}"
        print_table(("page", "view", "height px", "overflow px", "smallest text px", "problems"), lines, answer)
    end_with([f"{row['page']} at {row['view']}: {problem}" for row in rows for problem in row["problems"]])
