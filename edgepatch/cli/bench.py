"""``bench``: what a patch costs and gives on a model of yours."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edgepatch.cli.application import app
from edgepatch.cli.chat import Device, DeviceOption
from edgepatch.cli.console import (
    BareFlag,
    JsonFlag,
    LogOption,
    ModelArgument,
    PatchOption,
    StoreOption,
    cell,
    log_beside,
    model_path,
    print_json,
    progress_bars,
    stdout,
)
from edgepatch.errors import InputError
from edgepatch.progress import stage

if TYPE_CHECKING:
    from edgepatch.bench.harness.comparison import Score
    from edgepatch.bench.metrics import Estimate

bench_app = typer.Typer(
    help="Measure a model of yours, bare and patched.\n\nExample: `edgepatch bench harness model.gguf --tasks own_choice`",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")


@bench_app.command()
def harness(
    model: ModelArgument,
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="Names of tasks or groups, with commas; `*` stands for anything.")
    ],
    patch: PatchOption = None,
    bare: BareFlag = False,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder of your task files, which may name Python to run; default: the tasks shipped."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many first items of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in front of each item; default: as the task says.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each item into the model's chat template.")] = False,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Context to load (llama.cpp, ONNX); default: the model's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for the scores and every item behind them.")
    ] = None,
    log: LogOption = None,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run lm-eval tasks (MMLU, GSM8K, your own) bare and patched on the same items: the difference, and what the patch broke.

    Example: `edgepatch bench harness model.gguf --patch detox.safetensors --tasks mmlu_astronomy,gsm8k --limit 200`
    """
    from edgepatch.bench.harness.comparison import OWN_TASKS, HarnessConfig, as_document, compare
    from edgepatch.files.writing import write_atomically
    from edgepatch.runtimes import ACTIVE, load_runtime

    if bare and patch is not None:
        raise InputError("--bare and --patch exclude each other", hint="leave one of them out")
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise InputError("--tasks names no task", hint="for example --tasks own_choice,own_text")
    config = HarnessConfig(names, include_path or OWN_TASKS, limit, num_fewshot, chat)
    options = {} if context_length is None else {"context_length": context_length}
    chosen = None if bare else patch or ACTIVE
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bars(log or log_beside(out)))
        with stage(progress, "load model"):
            runtime = stack.enter_context(load_runtime(model, chosen, store=store, **options))
        found = compare(runtime, config, progress)
        document = as_document(runtime, config, found.scores)
    if out is not None:
        write_atomically(
            out, json.dumps({**document, "items": found.items}, indent=1, ensure_ascii=False, default=str).encode()
        )
    if as_json:
        print_json(document)
    else:
        stdout().print(_table(found.scores))


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
    flash_attention: Annotated[
        bool, typer.Option("--flash-attn/--no-flash-attn", help="Whether llama.cpp uses flash attention.")
    ] = True,
    arms: Annotated[str, typer.Option(help="Only arms of these names, with commas; `*` stands for anything.")] = "",
    parts: Annotated[
        str, typer.Option(help="Only these parts, with commas: arms, costs, serving, memory, starts.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Shorter prompts, fewer depths and texts.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSON file for the document, which is the last line of stdout as well."),
    ] = None,
    log: LogOption = None,
) -> None:
    """Time to first token, decoding, swap, memory: bare, patched, and with what a user would take instead, in turn in one run.

    Example: `edgepatch bench latency --shape llama-3.2-1b --quantization Q4_0 --out bench/results/latency.json`
    """
    from edgepatch.bench.latency.run import measure, write
    from edgepatch.bench.latency.sessions import FULL, QUICK
    from edgepatch.bench.latency.settings import PARTS, Settings

    chosen = _listed(parts) or PARTS
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        raise InputError(f"--parts: expected some of {', '.join(PARTS)}, found {unknown[0]}")
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
        chosen,
    )
    with progress_bars(log or log_beside(out)) as progress:
        document = measure(settings, progress)
    if out is not None:
        write(document, out)
    stdout().print(_times(document["rows"]))
    stdout().print(_goals(document["goals"]))
    print(json.dumps(document))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _times(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("measure", "arm", "prompt", "new", "depth", "median", "least to most", "rate"):
        table.add_column(name, overflow="fold")
    for row in rows:
        sizes = [row.get(name) or "" for name in ("n_prompt", "n_gen", "n_depth")]
        if row["status"] != "ok":
            figures = [row["status"], row["reason"], ""]
        elif "value" in row:
            figures = [f"{row['value']:,} {row['unit']}", "", ""]
        else:
            rate = f"{row['median_ts']:.1f} tok/s" if "median_ts" in row else ""
            figures = [f"{row['median_ms']:.2f} ms", f"{row['min_ms']:.2f} to {row['max_ms']:.2f}", rate]
        table.add_row(*map(cell, (row["measure"], row["arm"], *sizes, *figures)))
    return table


def _goals(goals: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("goal", "wanted", "reached", "met"):
        table.add_column(name, overflow="fold")
    for goal in goals:
        table.add_row(
            *map(cell, (goal["goal"], goal["wanted"], f"{goal['reached']:.4g}", "yes" if goal["met"] else "no"))
        )
    return table


def _table(scores: list[Score]) -> Table:
    is_paired = any(score.difference for score in scores)
    table = Table(box=None, pad_edge=False)
    for name in (
        "task",
        "metric",
        "items",
        "bare",
        *(("patched", "difference", "broken/repaired") if is_paired else ()),
    ):
        table.add_column(name, overflow="fold")
    for score in scores:
        row: list[Any] = [score.task, score.metric, score.num_items, _interval(score.bare)]
        if is_paired:
            flips = (
                f"{score.flips.broken} / {score.flips.repaired} (p {score.flips.p_value:.2g})" if score.flips else ""
            )
            row += [_interval(score.patched), _interval(score.difference, "+"), flips]
        table.add_row(*map(cell, row))
    return table


def _interval(figure: Estimate | None, sign: str = "") -> str:
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]" if figure else ""
