"""``train-together``: patches that keep their gains side by side."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import ForceFlag, JsonFlag, model_path, note, print_json, progress_bars
from edgepatch.cli.training.options import (
    BatchSizeOption,
    BenignOption,
    BetaOption,
    BlockOption,
    DeviceOption,
    DPOLearningRateOption,
    DPOStepsOption,
    DtypeOption,
    FrontTokensOption,
    HeldOutOption,
    KLBatchSizeOption,
    KLWeightOption,
    LogOption,
    MaxTokensOption,
    MicroBatchSizeOption,
    NLLWeightOption,
    PatienceOption,
    RNGSeedOption,
    RunOption,
    SFTLearningRateOption,
    SFTStepsOption,
    TurnsOption,
    benign_texts,
    config_of,
    kept_in,
    log_of,
    require_base,
)
from edgepatch.errors import InputError
from edgepatch.progress import silent

if TYPE_CHECKING:
    from edgepatch.patch.file import Patch
    from edgepatch.tensors import KVSeed, SoftPrompt
    from edgepatch.training.pairs.preferences import Pair


def _parts(named: list[str], company: list[Patch]) -> tuple[list[Patch], list[list[Pair]]]:
    """(patches, pairs of each), as they were named; all can stand beside the company.

    Raises:
        InputError: a name has another form, fewer than two are named, a file cannot be read, or they cannot stand side by side.
        MismatchError: they are for different bases.
    """
    from edgepatch.patch.composition import in_order
    from edgepatch.patch.file import read_patch
    from edgepatch.training.pairs.preferences import read_pairs

    files = [part.partition("=") for part in named]
    wrong = next((part for part, (patch, _, pairs) in zip(named, files, strict=True) if not patch or not pairs), None)
    if wrong is not None:
        raise InputError(
            f"--part: expected PATCH=PAIRS, found {wrong}", hint="as in --part detox.safetensors=own.jsonl"
        )
    patches = [read_patch(Path(patch)) for patch, _, _ in files]
    in_order([*patches, *company])
    return patches, [read_pairs(Path(pairs)) for _, _, pairs in files]


def _start(patch: Patch) -> SoftPrompt | KVSeed:
    """What is trained on: a soft prompt, or keys and values."""
    start = patch.soft_prompt or patch.kv_seed
    if start is None:
        raise InputError(f"{patch.name} {patch.version}: expected a soft prompt or a seed, found neither")
    return start


@app.command("train-together")
def train_together(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            parser=model_path,
            help="Model to be patched: Transformers folder, or GGUF file to be dequantized.",
        ),
    ],
    parts: Annotated[
        list[str],
        typer.Option("--part", metavar="PATCH=PAIRS", help="Patch to go on from, and its pairs; repeat for each."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for the trained patches, NAME-VERSION.safetensors."),
    ],
    version: Annotated[str, typer.Option(help="Version of all of them (SemVer).")],
    beside: Annotated[
        list[Path] | None, typer.Option(help="Patch to train beside, which stays as it is; repeat for several.")
    ] = None,
    benign: BenignOption = None,
    run: RunOption = None,
    sft_steps: SFTStepsOption = 0,
    sft_learning_rate: SFTLearningRateOption = None,
    dpo_steps: DPOStepsOption = None,
    dpo_learning_rate: DPOLearningRateOption = None,
    beta: BetaOption = None,
    nll_weight: NLLWeightOption = None,
    batch_size: BatchSizeOption = None,
    micro_batch_size: MicroBatchSizeOption = None,
    max_tokens: MaxTokensOption = None,
    block: BlockOption = None,
    turns: TurnsOption = None,
    front_tokens: FrontTokensOption = None,
    kl_weight: KLWeightOption = None,
    kl_batch_size: KLBatchSizeOption = None,
    held_out: HeldOutOption = None,
    patience: PatienceOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    rng_seed: RNGSeedOption = 1,
    log: LogOption = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Train patches further, each beside any of the others: what was trained alone may keep little of its gain in company.

    Each step reads the pairs of one patch and draws which of the others stand beside it. Each is released and signed on its own.

    Example: `edgepatch train-together models/base --part detox.safetensors=detox.jsonl --part harm.safetensors=harm.jsonl
    --version 0.2.0 -o together`
    """
    from edgepatch.files.writing import require_new_file
    from edgepatch.patch.file import read_patch, write_patch
    from edgepatch.patch.manifest import require_option
    from edgepatch.training import parallel
    from edgepatch.training.page import write_training_page
    from edgepatch.training.patching import PatchTraining
    from edgepatch.training.runs import require_same_config
    from edgepatch.training.trainer import require_trainable

    require_option("version", version)
    config = config_of(context.params)
    company = [read_patch(file) for file in beside or ()]
    patches, tasks = _parts(parts, company)
    starts, texts = [_start(patch) for patch in patches], benign_texts(benign)
    files = [out / f"{patch.name}-{version}.safetensors" for patch in patches]
    for file in files:
        require_new_file(file, force)
    require_trainable(config, tasks, texts, has_reference=False)
    require_same_config(run, config)
    require_base(model, [*patches, *company])
    with progress_bars(log_of(log, out, run), lambda: kept_in(run)) as bars:
        progress = silent if os.environ.get("RANK", "0") != "0" else bars  # of several processes the first speaks
        training = PatchTraining(model, config, (), run, None, device, note, progress)
        names = [patch.name for patch in patches]
        trained = training.segments(tasks, starts, texts, names, version, progress, company)
        if parallel.world()[0]:
            return  # the first process writes
        created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        out.mkdir(parents=True, exist_ok=True)
        digests = [
            write_patch(replace(patch, created=created), file) for patch, file in zip(trained, files, strict=True)
        ]
        if run is not None:
            title = f"{', '.join(names)} {version}"
            write_training_page(training.history, trained[0].training, title, run / "curves.html")
    accuracy = (training.history.preference_accuracy or [float("nan")])[-1]
    if as_json:
        rows = [
            {"path": str(f), "digest": d, "training": p.training}
            for f, d, p in zip(files, digests, trained, strict=True)
        ]
        print_json({"patches": rows})
        return
    for file, digest, patch in zip(files, digests, trained, strict=True):
        print(f"{file}: {patch.num_virtual_tokens} virtual tokens, SHA-256 {digest}")
    print(f"held-out preference accuracy, all side by side: {accuracy:.2f}")
