"""``bench evidence``, ``unpatch``, ``length``, ``composition``: whether a patch does what it is for, after quantization and against writing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.bench.door import (
    RESULTS,
    DataOption,
    OutOption,
    ThreadsOption,
    bench_app,
    end_with,
    require_data,
    use_one_thread,
)
from edgepatch.cli.console import LogOption, counted, model_path, progress_bars
from edgepatch.errors import InputError

Names = list[str] | None


@bench_app.command()
def evidence(
    data: DataOption = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for models, patches and raw cells.")
    ] = Path("out/evidence"),
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Train what is missing, or measure what is trained.")
    ] = True,
    measuring: Annotated[
        bool, typer.Option("--measuring/--no-measuring", help="Measure what is due, or assemble what is measured.")
    ] = True,
    domain: Annotated[Names, typer.Option(help="Only this domain; may be repeated.")] = None,
    arm: Annotated[Names, typer.Option(help="Only this arm; may be repeated.")] = None,
    column: Annotated[Names, typer.Option(help="Only this column, as 'llamacpp Q4_K_M'; may be repeated.")] = None,
    composition: Annotated[bool, typer.Option("--composition/--no-composition", help="Measure compositions.")] = True,
    prompts: Annotated[
        tuple[int, int, int] | None,
        typer.Option(metavar="CORE COMPOSED REST", help="Prompts of every domain, in each kind of cell."),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write bench/results and docs/results/safety.md too.")
    ] = False,
    log: LogOption = None,
) -> None:
    """Does the gain hold after quantization? Every arm on every runtime and quantization (hours; it goes on where it stopped).

    Example: `edgepatch bench evidence --publish`
    """
    use_one_thread()
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.evidence import run as matrix
    from edgepatch.bench.evidence.cells import ARMS, DEFAULT_ITEMS, DOMAINS, EvidenceConfig

    config = EvidenceConfig(
        items=dict.fromkeys(DOMAINS, prompts or DEFAULT_ITEMS),
        domains=tuple(domain or DOMAINS),
        arms=tuple(arm or ARMS),
        columns=tuple(column or ()),
        composition=composition,
    )
    kept = "what is trained and measured is kept; the same command goes on from there"
    with progress_bars(log or out / "evidence.log", lambda: kept) as progress:
        document = matrix.run(
            out,
            data_folder(data),
            config,
            num_workers=workers,
            is_trained=training,
            is_measured=measuring,
            is_published=publish,
            progress=progress,
        )
    failures = matrix.failures(document)
    met = sum(goal["met"] for goal in document["goals"])
    print(
        f"{met} of {len(document['goals'])} goals are met; failed or missing: {counted(len(failures), 'measurement')}"
    )
    end_with(failures[:20])


@bench_app.command()
def unpatch(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            parser=model_path,
            help="Model that the patch fits, or the name smollm2; default: the lab model at F16.",
        ),
    ] = None,
    patch: Annotated[
        Path | None, typer.Option("--patch", "-p", help="Patch file; default: the lab patch that moves.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each attempt.")] = 48,
    samples: Annotated[int, typer.Option(min=1, help="Continuations a prompt.")] = 25,
    threads: ThreadsOption = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="JSON file of the results. Default: unpatching.json, or unpatching-PATCH.json.",
        ),
    ] = None,
) -> None:
    """What writing can do against a patch: many shots, dilution, a system prompt against it, a reply begun for it.

    Examples: `edgepatch bench unpatch --prompts 12`,
    `edgepatch bench unpatch --model smollm2 --patch detox.safetensors --prompts 24 --samples 5`
    """
    use_one_thread()
    from edgepatch.bench.safety import unpatching

    if model is not None and patch is None:
        raise InputError(
            f"--model {model.name}: expected --patch too, found none", hint="name a patch that was made for it"
        )
    own = RESULTS / ("unpatching.json" if patch is None else f"unpatching-{patch.stem}.json")
    unpatching.run(out or own, model, patch or unpatching.PATCH, prompts, samples, threads)


@bench_app.command()
def length(
    model: Annotated[
        Path | None, typer.Option(help="Model that the patches fit; default: the lab model at F16.")
    ] = None,
    patch: Annotated[
        list[Path] | None, typer.Option("--patch", "-p", help="Patch file; may be repeated. Default: the lab patches.")
    ] = None,
    block: Annotated[
        list[int] | None, typer.Option(help="W to try; may be repeated. Default: 32, 64, 128, 256.")
    ] = None,
    all_rules: Annotated[
        bool,
        typer.Option(
            "--all-rules/--both-rules", help="Moving at turns and in blocks alone as well, or at both together."
        ),
    ] = True,
    domain: Annotated[
        str,
        typer.Option(help="toxicity, gender or harm; the patches of the latter two are those of `bench composition`."),
    ] = "toxicity",
    data: DataOption = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each place.")] = 40,
    samples: Annotated[int, typer.Option(min=1, help="Continuations a prompt.")] = 25,
    threads: ThreadsOption = 1,
    out: OutOption = RESULTS / "length.json",
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder of what is measured already.")] = Path("out/length"),
    made: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of pairs and patches that `bench composition` has made.")
    ] = Path("out/composition"),
    log: LogOption = None,
) -> None:
    """Does a patch hold behind text and in later turns? Pinned against moving, gain and cost (an hour; it goes on where it stopped).

    Results of other domains stay in the file.

    Example: `edgepatch bench length --prompts 12 --block 128`
    """
    use_one_thread()
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.lab import LAB_PATCHES
    from edgepatch.bench.safety import length as places
    from edgepatch.bench.safety.composing import Workshop
    from edgepatch.bench.safety.probes import probe_of
    from edgepatch.patch.file import read_patch

    probe_of(domain)
    is_made = not patch and domain != "toxicity"
    folder = require_data(data) if is_made else data_folder(data)
    kept = "what is measured is kept; the same command goes on from there"
    with progress_bars(log or work / "length.log", lambda: kept) as progress:
        patches = [read_patch(path) for path in patch or LAB_PATCHES]
        if is_made:
            workshop = Workshop(made, require_data(data), progress)
            patches = [workshop.alone(domain), workshop.moving(domain)]
        places.run(
            out,
            work,
            model,
            patches,
            block or [32, 64, 128, 256],
            folder,
            prompts,
            samples,
            threads,
            domain,
            all_rules,
            progress,
        )


@bench_app.command()
def composition(
    data: DataOption = None,
    items: Annotated[int, typer.Option(min=1, help="Prompts or requests of each domain.")] = 60,
    threads: ThreadsOption = 1,
    out: OutOption = RESULTS / "composition.json",
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of pairs and patches that are made already.")
    ] = Path("out/composition"),
    log: LogOption = None,
) -> None:
    """What is left of each gain where patches stand side by side: alone, untrained for it, trained jointly (an hour at first).

    Example: `edgepatch bench composition --items 20`
    """
    use_one_thread()
    from edgepatch.bench.safety import composing

    folder = require_data(data)
    kept = "what is made is kept; the same command goes on from there"
    with progress_bars(log or work / "composition.log", lambda: kept) as progress:
        composing.run(out, work, folder, items, threads, progress)
