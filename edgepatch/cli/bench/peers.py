"""``bench peers``: another project's own tests, run on edgepatch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import RESULTS, OutOption, bench_app, end_with
from edgepatch.cli.console import LogOption, print_table, progress_bars


@bench_app.command()
def peers(
    source: Annotated[
        Path,
        typer.Option(metavar="FILE", help="llama-cpp-python's source archive, or a folder of llama.cpp's sources."),
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Only this suite: vocabularies, templates or server; may be repeated.")
    ] = None,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder where the archive is unpacked.")] = Path(
        "out/peers"
    ),
    out: OutOption = RESULTS / "peers.json",
    log: LogOption = None,
) -> None:
    """Run llama.cpp's vocabularies with their expected ids, its chat templates, and its server tests: bench/results/peers.json.

    Example: `edgepatch bench peers --source llama_cpp_python-0.3.36.tar.gz`
    """
    from edgepatch.bench.peers import run
    from edgepatch.bench.peers.rows import VERDICTS, count

    with progress_bars(log or work / "peers.log", lambda: "the same command begins anew") as progress:
        rows = run.run(source, out, work / "sources", only or (), progress)
    print_table(
        ["suite", *VERDICTS], [[suite, *(counts[name] for name in VERDICTS)] for suite, counts in count(rows).items()]
    )
    end_with([f"{row.suite}: {row.test}: {row.reason}" for row in rows if row.verdict == "fail"])
