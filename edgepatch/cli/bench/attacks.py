"""``bench security``, ``fuzz``: what attacks the project. Both run in a child, for the attacks are not in the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import RESULTS, OutOption, bench_app, use_one_thread


@bench_app.command()
def security(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this figure, F1 to F18; may be repeated. Its row takes the place of the old one."),
    ] = None,
) -> None:
    """Measure the security figures F1 to F18, a line each; exit code 1 when one is missed: bench/results/security.json.

    Example: `edgepatch bench security --only F10`
    """
    use_one_thread()
    from edgepatch.bench.checkout import run_attack

    words = [word for figure in only or () for word in ("--only", figure)]
    raise typer.Exit(run_attack("security", *words))


@bench_app.command()
def fuzz(
    seconds: Annotated[int, typer.Option(min=1, help="For all readers together.")] = 600,
    engine: Annotated[
        str, typer.Option(help="atheris (installed where this Python has it), or blind; default: the better one.")
    ] = "",
    out: OutOption = RESULTS / "fuzz.json",
) -> None:
    """Fuzz every reader of foreign bytes, guided by the branches that an input reaches where atheris installs.

    Example: `edgepatch bench fuzz --seconds 60`
    """
    from edgepatch.bench.checkout import install, run_attack

    if engine != "blind" and not install("atheris"):
        print("note: no atheris for this Python; fuzzing blindly")
    words = ["--seconds", str(seconds), "--out", str(Path(out).absolute())]
    raise typer.Exit(run_attack("fuzz", *words, *(["--engine", engine] if engine else [])))
