"""``bench latency``, ``swap``, ``moves``, ``machine``, ``buffers``, ``first-contact``, ``trl``: what a patch costs in time and memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import (
    RESULTS,
    SHAPES,
    OutOption,
    RepeatsOption,
    ResultsFolderOption,
    ThreadsOption,
    bench_app,
    use_one_thread,
)
from edgepatch.cli.chat import Device, DeviceOption
from edgepatch.cli.console import (
    FlashFlag,
    ForceFlag,
    JsonFlag,
    LogOption,
    log_beside,
    model_path,
    new_file,
    print_json,
    print_table,
    progress_bars,
    stdout,
    table,
    tell,
)
from edgepatch.errors import InputError

ALL_CORES = os.cpu_count() or 1
ShapesOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder of random models, each made once.")]


@bench_app.command()
def latency(
    shape: Annotated[
        str, typer.Option("--shape", help="Shape of a random model, made once in out/shapes.")
    ] = "llama-3.2-1b",
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            parser=model_path,
            help="GGUF file or ONNX folder of yours, in place of a shape.",
        ),
    ] = None,
    quantization: Annotated[
        str,
        typer.Option(
            "--quantization", help="Of the random model: F16, Q8_0, Q4_0, Q4_K_M (llama.cpp), int8, int4 (ONNX)."
        ),
    ] = "Q4_0",
    patch: Annotated[
        Path | None, typer.Option("--patch", "-p", help="Patch file for the model; else a random one of 50 tokens.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="So many rounds, all arms in turn in each.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    device: DeviceOption = Device.cpu,
    flash_attention: FlashFlag = True,
    arms: Annotated[
        str,
        typer.Option(
            help="Only arms of these names, with commas; `*` stands for anything. Without --parts nothing else."
        ),
    ] = "",
    parts: Annotated[
        str, typer.Option(help="Only these parts, with commas: arms, costs, serving, memory, starts. Default: all.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Shorter prompts, fewer depths and texts.")] = False,
    out: Annotated[Path | None, new_file("JSON file for the document, which --json prints as well.")] = None,
    force: ForceFlag = False,
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Time to first token, decoding, swap, memory: bare, patched, and with what a user would take instead, in turn in one run.

    Example: `edgepatch bench latency --shape llama-3.2-1b --quantization Q4_0 --out bench/results/latency.json`
    """
    from edgepatch.bench.latency.run import measure, write
    from edgepatch.bench.latency.sessions import FULL, QUICK
    from edgepatch.bench.latency.settings import Settings, due_parts

    settings = Settings(
        model,
        shape,
        quantization,
        patch,
        repeats,
        threads or os.cpu_count() or 1,
        device.value,
        flash_attention,
        _listed(arms),
        QUICK if quick else FULL,
        due_parts(_listed(parts), _listed(arms)),
    )
    with progress_bars(log or log_beside(out)) as progress:
        document = measure(settings, progress)
    if out is not None:
        write(document, out)
    if as_json:
        print_json(document)
        return
    from edgepatch.cli.tables.speed import GOALS, LESS, TIMES, goal_rows, latency_answer, time_rows

    print_table(TIMES, time_rows(document["rows"]), latency_answer(document), LESS)
    stdout().print()
    print_table(GOALS, goal_rows(document["goals"]))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@bench_app.command()
def swap(
    shape: Annotated[
        str, typer.Option(help="Shape of a random model, made once in the folder of shapes.")
    ] = "llama-3.2-1b",
    quantization: Annotated[str, typer.Option(help="F16, Q8_0, Q4_0 or Q4_K_M.")] = "Q4_0",
    threads: ThreadsOption = ALL_CORES,
    repeats: RepeatsOption = 15,
    shapes: ShapesOption = SHAPES,
    out: OutOption = RESULTS / "swap.json",
) -> None:
    """Time the exchange of patches on a model of a real size.

    Example: `edgepatch bench swap --repeats 5`
    """
    from edgepatch.bench.latency import swap as exchange

    rows = exchange.run(shape, quantization, threads, repeats, shapes, out)["rows"]
    columns = ("median_ms", "min_ms", "max_ms")
    first = next(iter(rows))
    print_table(
        ("swap", "median ms", "least", "most"),
        [(name, *(f"{row[column]:.1f}" for column in columns)) for name, row in rows.items()],
        f"{first}: {rows[first]['median_ms']:.1f} ms (median)",
    )


@bench_app.command()
def moves(
    shape: Annotated[
        str, typer.Option(help="Shape of a random model, made once in the folder of shapes.")
    ] = "llama-3.2-1b",
    quantization: Annotated[str, typer.Option(help="F16, Q8_0, Q4_0 or Q4_K_M.")] = "Q4_0",
    threads: ThreadsOption = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 2048,
    decoded: Annotated[int, typer.Option(min=1, help="Tokens that are generated behind it.")] = 128,
    repeats: RepeatsOption = 5,
    shapes: ShapesOption = SHAPES,
    out: OutOption = RESULTS / "moves.json",
    log: LogOption = None,
) -> None:
    """Time a seed that goes along with the text: bare, pinned, and moving every 64, 128 and 256 tokens, in turn.

    Example: `edgepatch bench moves --shape smollm-135m --quantization Q8_0 --repeats 3`
    """
    from edgepatch.bench.latency import moves as floating

    sizes = floating.Sizes(prompt, decoded, repeats)
    with progress_bars(log or log_beside(out)) as progress:
        document = floating.run(shape, quantization, threads, sizes, shapes, out, progress)
    from edgepatch.cli.tables.speed import MOVES, move_rows, moves_answer

    print_table(tuple(MOVES.values()), move_rows(document["cells"]), moves_answer(document["cells"]))
    stdout().print()
    names = [name.replace("_", " ") for name in document["pieces"][0]]
    print_table(names, [list(piece.values()) for piece in document["pieces"]])


@bench_app.command()
def machine(
    threads: ThreadsOption = ALL_CORES,
    seconds: Annotated[float, typer.Option(min=0, help="Of each of the two measurements.")] = 5.0,
    out: OutOption = RESULTS / "machine.json",
    as_json: JsonFlag = False,
) -> None:
    """Measure this machine's memory bandwidth, which bounds the rate of decoding; half a minute, on a quiet machine.

    Example: `edgepatch bench machine --seconds 2`
    """
    from edgepatch.bench.shapes import machine as limits

    document = limits.run(threads, seconds, out)
    if as_json:
        print_json(document)
        return
    from edgepatch.cli.tables.speed import machine_answer

    tell(machine_answer(document))


@bench_app.command()
def buffers(
    model: Annotated[list[Path] | None, typer.Option(help="Another GGUF file; may be repeated.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated; default: 1 and 2.")] = None,
    repeats: RepeatsOption = 5,
    shapes: ShapesOption = SHAPES,
    out: OutOption = RESULTS / "extra_buffers.json",
) -> None:
    """Time llama.cpp with its kernels for repacked weights and without, in turn.

    Example: `edgepatch bench buffers --threads 1`
    """
    use_one_thread()
    from edgepatch.bench import extra_buffers

    rows = extra_buffers.run(model or (), threads or (1, 2), repeats, shapes, out)["rows"]
    from edgepatch.cli.tables.speed import buffers_answer

    names = ("model", "threads", "measure", "wall_speedup", "cpu_speedup")
    lines = [[row[name] for name in names] for row in rows]
    print_table([name.replace("_", " ") for name in names], lines, buffers_answer(rows))


@bench_app.command()
def first_contact(
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL", parser=model_path, help="GGUF file whose first load is timed.")
    ] = None,
    forged: Annotated[bool, typer.Option("--forged", help="Judge 2,415 forged GGUF files.")] = False,
    threads: ThreadsOption = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Loads of each kind.")] = 5,
    out: OutOption = RESULTS / "first_contact.json",
    as_json: JsonFlag = False,
) -> None:
    """Time the first load of a model, which a child tries beforehand, and judge what becomes of forged files.

    Example: `edgepatch bench first-contact --model smollm2 --forged`
    """
    from edgepatch.bench.first_contact import run as contact

    if model is None and not forged:
        raise InputError("expected --model, --forged or both, found neither")
    measured = contact.run(model, forged, threads, rounds, out)
    if as_json:
        print_json(measured)
        return
    from edgepatch.cli.tables.speed import contact_rows

    stdout().print(table(contact_rows(measured)))


@bench_app.command()
def trl(
    model: Annotated[list[str] | None, typer.Option(help="lab or llama-64m; may be repeated; default: both.")] = None,
    repeats: RepeatsOption = 3,
    threads: ThreadsOption = 1,
    out: ResultsFolderOption = RESULTS,
    log: LogOption = None,
) -> None:
    """Compare training speed and memory with PEFT + TRL on the same job: trl.json and trl.md.

    Example: `edgepatch bench trl --model lab`
    """
    from edgepatch.bench.trl import run as comparison

    kept = f"the rows that are complete are in {out}; the same command starts again"
    with progress_bars(log or out / "trl.log", lambda: kept) as progress:
        document = comparison.run(out, repeats, threads, model or tuple(comparison.STEPS), progress)
    print(comparison.render(document))
