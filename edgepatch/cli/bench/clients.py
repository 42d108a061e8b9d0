"""``bench clients``: OpenAI's clients, from the package indexes, against a server of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import RESULTS, OutOption, bench_app, end_with
from edgepatch.cli.console import LogOption, ModelArgument, PatchOption, print_table, progress_bars
from edgepatch.progress import published_command


@bench_app.command()
def clients(
    model: ModelArgument,
    patch: PatchOption = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this client; may be repeated.")] = None,
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the clients' own environments, about 2 GB.")
    ] = Path("out/clients"),
    out: OutOption = RESULTS / "clients.json",
    log: LogOption = None,
) -> None:
    """Install ten clients from PyPI and npm, and run each against `edgepatch serve`: bench/results/clients.json.

    Example: `edgepatch bench clients SmolLM2-135M-Instruct.Q4_1.gguf --patch patches/smollm2-detox-0.2.0.safetensors`
    """
    from edgepatch.bench.clients import run

    command = published_command()
    with progress_bars(log or work / "clients.log", lambda: "the same command begins anew") as progress:
        rows = run.run(model, patch or (), out, work.resolve(), command, only or (), progress)
    print_table(
        ["client", "version", "case", "verdict", "note"],
        [[row.client, row.version, row.case, row.verdict, row.note] for row in rows],
    )
    end_with([f"{row.client}: {row.case}: {row.note}" for row in rows if row.verdict == "fail"])
