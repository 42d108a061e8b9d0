"""``bench``: what a patch costs and gives on a model of yours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edgepatch.cli.console import (
    BareFlag,
    JsonFlag,
    ModelArgument,
    PatchOption,
    StoreOption,
    cell,
    print_json,
    progress_bars,
    stdout,
)
from edgepatch.cli.root import app
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.bench.harness import Score
    from edgepatch.bench.metrics import Estimate

bench_app = typer.Typer(
    help="Measure a model of yours, bare and patched.\n\nExample: `edgepatch bench harness model.gguf --tasks own_choice`",
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")


@bench_app.command()
def harness(
    model: ModelArgument,
    tasks: Annotated[str, typer.Option("--tasks", "-t", help="Names of tasks or groups, with commas; `*` stands for anything.")],
    patch: PatchOption = None,
    bare: BareFlag = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of your task files, which may name Python to run; default: the tasks shipped.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many first items of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in front of each item; default: as the task says.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each item into the model's chat template.")] = False,
    context_length: Annotated[int | None, typer.Option(min=1, help="Context to load (llama.cpp, ONNX); default: the model's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for the scores and every item behind them.")] = None,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run lm-eval tasks (MMLU, GSM8K, your own) bare and patched on the same items: the difference, and what the patch broke.

    Example: `edgepatch bench harness model.gguf --patch detox.safetensors --tasks mmlu_astronomy,gsm8k --limit 200`
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; the bars here are ours
    from edgepatch.bench.harness import OWN_TASKS, HarnessConfig, as_document, compare
    from edgepatch.patches import write_atomically
    from edgepatch.runtimes import ACTIVE, load_runtime

    if bare and patch is not None:
        raise InputError("--bare and --patch exclude each other", hint="leave one of them out")
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise InputError("--tasks names no task", hint="for example --tasks own_choice,own_text")
    config = HarnessConfig(names, include_path or OWN_TASKS, limit, num_fewshot, chat)
    options = {} if context_length is None else {"context_length": context_length}
    chosen = None if bare else patch or ACTIVE
    with load_runtime(model, chosen, store=store, **options) as runtime:
        with progress_bars() as bars:
            found = compare(runtime, config, bars)
        document = as_document(runtime, config, found.scores)
    if out is not None:
        write_atomically(out, json.dumps({**document, "items": found.items}, indent=1, ensure_ascii=False, default=str).encode())
    if as_json:
        print_json(document)
    else:
        stdout().print(_table(found.scores))


def _table(scores: list[Score]) -> Table:
    is_paired = any(score.difference for score in scores)
    table = Table(box=None, pad_edge=False)
    for name in ("task", "metric", "items", "bare", *(("patched", "difference", "broken/repaired") if is_paired else ())):
        table.add_column(name, overflow="fold")
    for score in scores:
        row: list[Any] = [score.task, score.metric, score.num_items, _interval(score.bare)]
        if is_paired:
            flips = f"{score.flips.broken} / {score.flips.repaired} (p {score.flips.p_value:.2g})" if score.flips else ""
            row += [_interval(score.patched), _interval(score.difference, "+"), flips]
        table.add_row(*map(cell, row))
    return table


def _interval(figure: Estimate | None, sign: str = "") -> str:
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]" if figure else ""
