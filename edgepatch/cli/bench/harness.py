"""``bench harness``: tasks of lm-eval on a model of yours, bare and patched."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.bench.door import bench_app
from edgepatch.cli.console import (
    BareFlag,
    ForceFlag,
    JsonFlag,
    LogOption,
    ModelArgument,
    PatchOption,
    PinnedFlag,
    StoreOption,
    TemplateFlag,
    counted,
    log_beside,
    new_file,
    print_json,
    print_table,
    progress_bars,
)
from edgepatch.errors import InputError
from edgepatch.progress import stage

if TYPE_CHECKING:
    from edgepatch.bench.harness.comparison import Score
    from edgepatch.bench.metrics import Estimate


@bench_app.command()
def harness(
    model: ModelArgument,
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="Names of tasks or groups, with commas; `*` stands for anything.")
    ],
    patch: PatchOption = None,
    bare: BareFlag = False,
    pinned: PinnedFlag = False,
    other_template: TemplateFlag = False,
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
    out: Annotated[Path | None, new_file("JSON file for the scores and every item behind them.")] = None,
    force: ForceFlag = False,
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

    if bare and patch:
        raise InputError("--bare and --patch exclude each other", hint="leave one of them out")
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise InputError("--tasks names no task", hint="for example --tasks own_choice,own_text")
    config = HarnessConfig(names, include_path or OWN_TASKS, limit, num_fewshot, chat)
    options: dict[str, Any] = {} if context_length is None else {"context_length": context_length}
    chosen = None if bare else patch or ACTIVE
    with ExitStack() as stack:
        progress = stack.enter_context(progress_bars(log or log_beside(out)))
        with stage(progress, "load model"):
            runtime = stack.enter_context(
                load_runtime(model, chosen, store=store, pinned=pinned, other_template=other_template, **options)
            )
        comparison = compare(runtime, config, progress)
        document = as_document(runtime, config, comparison.scores)
    if out is not None:
        write_atomically(
            out, json.dumps({**document, "items": comparison.items}, indent=1, ensure_ascii=False, default=str).encode()
        )
    if as_json:
        print_json(document)
    else:
        print_scores(comparison.scores)


def print_scores(scores: list[Score]) -> None:
    is_paired = any(score.difference for score in scores)
    rows = []
    for score in scores:
        row: list[Any] = [score.task, score.metric, score.num_items, _interval(score.bare)]
        if is_paired:
            flips = (
                f"{score.flips.broken} / {score.flips.repaired} (p {score.flips.p_value:.2g})" if score.flips else ""
            )
            row += [_interval(score.patched), _interval(score.difference, "+"), flips]
        rows.append(row)
    paired_columns = ("patched", "difference", "broken/repaired") if is_paired else ()
    print_table(("task", "metric", "items", "bare", *paired_columns), rows, _answer(scores))


def _answer(scores: list[Score]) -> str:
    """What the patch does to the scores, in a sentence: a difference counts where its interval leaves 0 out."""
    differences = [(score, score.difference) for score in scores if score.difference]
    if not differences:
        return f"{counted(len(scores), 'score')} of the bare model"
    moved = [(score, figure) for score, figure in differences if figure.low > 0 or figure.high < 0]
    if not moved:
        return f"the patch moves none of {counted(len(differences), 'score')} beyond chance (95 % intervals)"
    told = "; ".join(f"{score.task} {score.metric} {_interval(figure, '+')}" for score, figure in moved)
    return f"the patch moves {len(moved)} of {counted(len(differences), 'score')} beyond chance: {told}"


def _interval(figure: Estimate | None, sign: str = "") -> str:
    return f"{figure.value:{sign}.3f} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]" if figure else ""
