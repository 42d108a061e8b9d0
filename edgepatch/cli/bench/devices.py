"""``bench devices``: the real clients of every export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import RESULTS, OutOption, bench_app, end_with, use_one_thread
from edgepatch.cli.console import LogOption, model_path, print_table, progress_bars

COLUMNS = ("client", "version", "model", "tokens_equal", "tokens_compared", "bare_differs_at", "max_abs_dlogit")


@bench_app.command()
def devices(
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the clients, installed from npm and PyPI, and the models.")
    ] = Path("out/devices"),
    smollm2: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL", parser=model_path, help="Also SmolLM2-135M-Instruct: its GGUF file, or `smollm2`."
        ),
    ] = None,
    out: OutOption = RESULTS / "devices.json",
    log: LogOption = None,
) -> None:
    """Ask node-llama-cpp, transformers.js, onnxruntime-web, mlx-lm and llama.cpp for patched answers: bench/results/devices.json.

    A browser is asked where EDGEPATCH_CHROMIUM names one.

    Example: `edgepatch bench devices --smollm2 smollm2`
    """
    use_one_thread()
    from edgepatch.bench.devices import run

    with progress_bars(log or work / "devices.log", lambda: "the same command goes on") as progress:
        rows = run.run(out, work, smollm2, progress)
    table = [[*(row.as_dict()[name] for name in COLUMNS), row.verdict] for row in rows]
    print_table([*COLUMNS, "verdict"], table)
    end_with(list(run.failures(rows)))
