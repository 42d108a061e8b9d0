"""``bench smollm2``, ``baselines``, ``attention``: the evidence on a model that people use, and what stands beside and behind it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import RESULTS, DataOption, OutOption, bench_app, end_with, require_data, use_one_thread
from edgepatch.cli.bench.safety import amounts_of, print_summary
from edgepatch.cli.console import LogOption, model_path, note, print_table, progress_bars, tell
from edgepatch.errors import InputError
from edgepatch.progress import published_command


@bench_app.command()
def smollm2(
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="TYPE", help="Only these further forms. Default: all eleven."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Only the file as it is published, and no further form.")
    ] = False,
    prompts: Annotated[int | None, typer.Option(min=2, help="Prompts of toxicity. Default: 24.")] = None,
    samples: Annotated[int | None, typer.Option(min=5, help="Continuations of each. Default: 8.")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="Prompts of gender, requests of harm. Default: 24.")] = None,
    requests: Annotated[int | None, typer.Option(min=2, help="Harmless requests. Default: 16.")] = None,
    data: DataOption = None,
    out: OutOption = RESULTS / "evidence-smollm2.json",
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of forms and raw cells; what is there is not measured again.")
    ] = Path("out/evidence-smollm2"),
    workers: Annotated[int, typer.Option(min=1, help="Processes; each loads the model.")] = 2,
    log: LogOption = None,
) -> None:
    """Every shipped patch on every form of SmolLM2: alone, all together, and a written safety text (two hours on two cores).

    Exit code 1 where a form refuses a patch, or something else could not be measured; the results are written all the same.

    Example: `edgepatch bench smollm2 --data DATA --on Q8_0 --on Q4_K_M`
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # libraries read it when they are loaded
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.evidence.own_model import failures
    from edgepatch.bench.report.own_model import render_page
    from edgepatch.bench.smollm2 import matrix
    from edgepatch.bench.smollm2.shipped import newest_patches
    from edgepatch.files.writing import write_atomically

    if published and on:
        raise InputError("--published: expected no --on beside it, for it names further forms")
    types = () if published else on or matrix.TYPES
    amounts = amounts_of(matrix.AMOUNTS, prompts, samples, items, requests)
    question = matrix.question_of(model_path("smollm2"), newest_patches(), types, amounts, workers, 1)
    kept = f"what is measured is kept in {work}; the same command goes on from there"
    with progress_bars(log or work / "evidence.log", lambda: kept) as progress:
        document = matrix.run(question, work, data_folder(data), progress, note)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(out, (text + "\n").encode())
    write_atomically(out.with_suffix(".html"), render_page(document).encode())
    print_summary(document)
    for arm, verdict in document["verdicts"].items():
        tell(f"{arm}: {verdict['sentence']}")
    end_with(failures(document)[:20])


@bench_app.command()
def baselines(
    pairs: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder that python -m edgepatch.bench.smollm2.make wrote.")
    ] = Path("out/smollm2"),
    data: DataOption = None,
    out: OutOption = RESULTS / "baselines-smollm2.json",
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the control vectors.")] = Path("out/baselines"),
    log: LogOption = None,
) -> None:
    """What costs a user little in place of a patch on SmolLM2: a control vector and a cache edit of the same pairs, and a guard (an hour).

    Example: `edgepatch bench baselines --data DATA --pairs out/smollm2`
    """
    use_one_thread()
    from edgepatch.bench.smollm2 import baselines as measurement
    from edgepatch.bench.smollm2 import matrix
    from edgepatch.files.writing import write_atomically

    folder = require_data(data)
    with progress_bars(log or work / "baselines.log") as progress:
        document = measurement.run(model_path("smollm2"), folder, pairs, work, matrix.AMOUNTS, progress)
    document = {"command": published_command(), **document}
    write_atomically(out, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    for row in document["rows"]:
        ratio = row["ratio"]
        change = f"{row['bare']:.3f} -> {row['score']:.3f}, {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] of bare"
        tell(f"{row['arm']}, {row['domain']}: {change}")


@bench_app.command()
def attention(
    model: Annotated[
        Path | None,
        typer.Option(
            parser=model_path,
            metavar="MODEL",
            help="GGUF file or Transformers folder that the patches fit. Default: SmolLM2.",
        ),
    ] = None,
    patch: Annotated[
        list[Path] | None,
        typer.Option("--patch", "-p", help="Patch file; may be repeated. Default: those that ship for SmolLM2."),
    ] = None,
    front: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Tokens in front of a prompt; may be repeated. Default: 0, 128, 512, 1500."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each place.")] = 6,
    data: DataOption = None,
    out: OutOption = RESULTS / "attention-smollm2.json",
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the model as PyTorch reads it; what is there stays.")
    ] = Path("out/attention"),
    log: LogOption = None,
) -> None:
    """How much attention text pays to the seed, layer by layer: each patch and all together, pinned and moving (ten minutes on one core).

    Example: `edgepatch bench attention --data DATA --front 0 --front 512 --prompts 2`
    """
    use_one_thread()
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.safety import attention as measurement
    from edgepatch.bench.smollm2.shipped import newest_patches
    from edgepatch.files.writing import write_atomically
    from edgepatch.patch.file import read_patch

    if model is not None and not patch:
        raise InputError(
            f"--model {model.name}: expected --patch too, found none", hint="name a patch that was made for it"
        )
    patches = [read_patch(path) for path in patch or newest_patches().values()]
    fronts, folder = front or measurement.FRONTS, data_folder(data)
    with progress_bars(log or work / "attention.log") as progress:
        document = measurement.run(model or model_path("smollm2"), patches, work, folder, fronts, prompts, progress)
    write_atomically(out, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    print_table(
        measurement.COLUMNS,
        measurement.table(document),
        "Shares are means over layers, heads and the last tokens of prompts.",
    )
