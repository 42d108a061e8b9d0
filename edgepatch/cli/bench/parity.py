"""``bench parity``, ``llama-server``, ``optimum``, ``identity``: whether a seed does exactly what it should, and only where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import (
    RESULTS,
    OutOption,
    ResultsFolderOption,
    bench_app,
    end_with,
    use_one_thread,
)
from edgepatch.cli.console import LogOption, progress_bars


@bench_app.command()
def parity(
    only: Annotated[
        list[str] | None, typer.Option(help="Only this architecture; may be repeated. No results are written.")
    ] = None,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder for models and measurements that are kept.")] = Path(
        "out/parity"
    ),
    llama_cpp: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="llama.cpp's sources; else those of llama-cpp-python, fetched once."),
    ] = None,
    log: LogOption = None,
) -> None:
    """Compare every architecture, runtime, quantization and cache with Transformers: bench/results/parity.json, bench/results/parity.md.

    Example: `edgepatch bench parity --only llama`
    """
    use_one_thread()
    from edgepatch.bench.parity import run as comparison

    kept = "what is measured is kept; the same command goes on from there"
    with progress_bars(log or work / "parity.log", lambda: kept) as progress:
        verdict = comparison.run(only or (), work, llama_cpp, progress)
    print(f"{verdict.num_passed} rows reach their floors, {len(verdict.failures)} do not")
    end_with(verdict.failures)


@bench_app.command()
def llama_server(
    build: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for llama-server's sources and build; made once, in 20 minutes.")
    ] = Path("out/llama-server"),
    tests: Annotated[bool, typer.Option("--tests/--no-tests", help="Run its tests before the transcript.")] = True,
    out: ResultsFolderOption = RESULTS,
) -> None:
    """Build an unmodified llama-server, test patches on it, and compare its replies with ours, token for token.

    Example: `edgepatch bench llama-server --no-tests`
    """
    use_one_thread()
    from edgepatch.bench.llama_server import run as server

    print(server.run(out, build, tests))


@bench_app.command()
def optimum(
    environment: Annotated[
        Path, typer.Option(metavar="DIR", help="Virtual environment with optimum, made where it is missing.")
    ] = Path("out/optimum-env"),
) -> None:
    """Export graphs with Hugging Face optimum, in an environment of its own, and test them.

    Example: `edgepatch bench optimum`
    """
    use_one_thread()
    from edgepatch.bench.checkout import run_tests
    from edgepatch.converters.onnx.exporters import optimum_python

    optimum_python(environment)
    variables = {"EDGEPATCH_OPTIMUM_ENV": str(environment.absolute())}
    raise typer.Exit(run_tests("converters/onnx/test_optimum.py", **variables))


@bench_app.command()
def identity(out: OutOption = RESULTS / "fingerprints.json") -> None:
    """Which quantizations, fine-tunes and impostors of the lab model a patch accepts.

    Example: `edgepatch bench identity`
    """
    use_one_thread()
    from edgepatch.bench.identity import run as comparison

    wrong = comparison.run(out)
    print("wrong verdicts:" if wrong else "every verdict that is certain is right")
    end_with(wrong)
