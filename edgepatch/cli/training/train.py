"""``train``: from pairs to a patch."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    from edgepatch.training.config import TrainConfig
    from edgepatch.training.distillation import Teacher
    from edgepatch.training.frozen.forward import BenignText
    from edgepatch.training.pairs.preferences import Pair


LORA_RATES = {"sft_learning_rate": 1e-3, "dpo_learning_rate": 5e-4}
"""Weights move everything at once; a patch takes ten times as much."""

KINDS = ("soft-prompt", "kv", "lora")


def _teacher(distill: str | None, text: Path | None, any_teacher: bool, pairs_file: Path) -> Teacher | None:
    """Whose distributions are learned, where any are."""
    from edgepatch.training.distillation import Teacher
    from edgepatch.training.pairs.provenance import safety_texts_of
    from edgepatch.training.pairs.sources import is_adapter
    from edgepatch.training.pairs.teachers import SELF, read_safety_texts

    if distill is None:
        if text is not None or any_teacher:
            raise InputError("--teacher-text and --any-teacher are for a teacher", hint="add --distill self")
        return None
    texts = read_safety_texts(text) if text else ()
    if distill == SELF:
        return Teacher(texts or safety_texts_of(pairs_file), None, any_teacher)
    if not is_adapter(distill):
        raise InputError(
            f"--distill {distill}: expected self, or a PEFT folder of a LoRA adapter for MODEL, whose logits can be had on its tokens",
            hint="a model or server of another kind makes pairs: edgepatch pairs --teacher",
        )
    return Teacher(texts, Path(distill), any_teacher)


def _refuse_for_lora(options: Mapping[str, object]) -> None:
    wrong = [name for name, value in options.items() if value]
    if wrong:
        raise InputError(f"--kind lora trains on MODEL alone, found {wrong[0]}", hint="leave it out")


def _train_lora(
    model: Path,
    config: TrainConfig,
    teacher: Teacher | None,
    rank: int,
    pairs_file: Path,
    benign: Path | None,
    out: Path,
    run: Path | None,
    device: str | None,
    log: Path | None,
    as_json: bool,
) -> None:
    from edgepatch.files.writing import require_new_folder
    from edgepatch.training.lora import LoRATraining

    require_new_folder(out)
    pairs, texts = _material(pairs_file, benign, config, run, None)
    with progress_bars(log_of(log, out, run), lambda: kept_in(run)) as progress:
        training = LoRATraining(model, config, rank, run, device, teacher)
        record = training.train(pairs, texts, out, progress)
    accuracy = (training.history.preference_accuracy or [float("nan")])[-1]
    if as_json:
        print_json({"path": str(out), "training": record})
    else:
        print(f"{out}: LoRA of rank {rank}, held-out preference accuracy {accuracy:.2f}")


def _material(
    pairs_file: Path, benign: Path | None, config: TrainConfig, run: Path | None, reference: Path | None
) -> tuple[list[Pair], list[BenignText]]:
    """(pairs, benign texts), and that training can begin with them: all that is known before a model is loaded.

    Raises:
        InputError: a file cannot be used, there are too few pairs, or the run folder holds a run with other settings.
    """
    from edgepatch.training.pairs.preferences import read_pairs
    from edgepatch.training.runs import require_same_config
    from edgepatch.training.trainer import require_trainable

    pairs, texts = read_pairs(pairs_file), benign_texts(benign)
    require_trainable(config, [pairs], texts, reference is not None)
    require_same_config(run, config)
    return pairs, texts


@app.command()
def train(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            parser=model_path,
            help="Model to be patched: Transformers folder, or GGUF file to be dequantized.",
        ),
    ],
    pairs_file: Annotated[Path, typer.Option("--pairs", help="Preference pairs, JSON Lines.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Patch file to write; with --kind lora a new folder.")
    ],
    benign: BenignOption = None,
    name: Annotated[str, typer.Option(help="Name of the patch.")] = "patch",
    version: Annotated[str, typer.Option(help="Its version (SemVer).")] = "0.1.0",
    kind: Annotated[
        str,
        typer.Option(
            help="soft-prompt; kv: keys and values of every layer, from a patch given by --start; or lora: no patch but an adapter folder, "
            "a teacher for one."
        ),
    ] = "soft-prompt",
    rank: Annotated[int | None, typer.Option(min=1, help="Of a LoRA adapter; default: 16.")] = None,
    start: Annotated[Path | None, typer.Option(help="Patch whose seed a K/V prefix starts from.")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Patch to train beside, which stays as it is; repeat for several.")
    ] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="Train on a quantized GGUF file of the model instead; repeat for several.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Safer model whose log-probabilities DPO compares with.")
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            help="Learn a teacher's distributions in place of SFT: self (MODEL behind the safety text that the pairs were made with), or "
            "the PEFT LoRA folder of an adapter for MODEL."
        ),
    ] = None,
    teacher_text: Annotated[
        Path | None,
        typer.Option(help="File with a safety text of yours for the teacher, as `edgepatch pairs` takes it."),
    ] = None,
    any_teacher: Annotated[
        bool, typer.Option("--any-teacher", help="Go on with a teacher that does not prefer the chosen answers.")
    ] = False,
    distill_top: Annotated[
        int | None, typer.Option(min=0, help="Likeliest tokens of the teacher that are kept; 0: all. Default: 64.")
    ] = None,
    run: RunOption = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="P.")] = 50,
    init: Annotated[str | None, typer.Option(help="text or random.")] = None,
    init_text: Annotated[str | None, typer.Option(help="Instruction whose embeddings start the soft prompt.")] = None,
    sft_steps: SFTStepsOption = None,
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
    pinned: Annotated[
        bool, typer.Option("--pinned", help="The seed stays at the start of the text, where its hold fades.")
    ] = False,
    front_tokens: FrontTokensOption = None,
    kl_weight: KLWeightOption = None,
    kl_batch_size: KLBatchSizeOption = None,
    held_out: HeldOutOption = None,
    dpo_reference: Annotated[str | None, typer.Option(help="base, sft, or model (with --reference).")] = None,
    patience: PatienceOption = None,
    dtype: DtypeOption = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations to save memory.")
    ] = False,
    device: DeviceOption = None,
    rng_seed: RNGSeedOption = 1,
    log: LogOption = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a patch on the frozen model: SFT, or distillation of a teacher, then DPO. Its seed moves with the text where it can.

    Several GPUs: `accelerate launch --multi_gpu -m edgepatch.cli train ...`

    Examples: `edgepatch train models/base --pairs pairs.jsonl -o detox.safetensors --name detox --run runs/detox`,
    `edgepatch train models/base --pairs pairs.jsonl --distill self -o detox.safetensors --name detox --run runs/detox`,
    `edgepatch train models/base --pairs pairs.jsonl --kind lora -o adapters/safer`
    """
    if kind not in KINDS or (kind == "kv") != (start is not None):
        raise InputError(
            f"--kind: expected soft-prompt, lora, or kv with --start; found {kind} {'with' if start else 'without'} --start"
        )
    if pinned and (block or turns):
        raise InputError("--pinned: the seed stays at the start, so expected no --block and no --turns beside it")
    options = {**context.params, **({"dpo_reference": "model"} if reference and not dpo_reference else {})}
    options |= {"block": 0, "turns": False} if pinned else {}
    if kind == "lora":
        options = {**options, **{name: LORA_RATES[name] for name in LORA_RATES if options[name] is None}}
    elif rank is not None:
        raise InputError(f"--rank: expected with --kind lora, found with --kind {kind}", hint="leave it out")
    config = config_of(options)
    teacher = _teacher(distill, teacher_text, any_teacher, pairs_file)
    if kind == "lora":
        _refuse_for_lora({"--start": start, "--beside": beside, "--weights": weights, "--reference": reference})
        _train_lora(model, config, teacher, rank or 16, pairs_file, benign, out, run, device, log, as_json)
        return
    from edgepatch.files.writing import require_new_file
    from edgepatch.patch.file import read_patch, write_patch
    from edgepatch.patch.manifest import require_option
    from edgepatch.training import parallel
    from edgepatch.training.page import write_training_page
    from edgepatch.training.patching import PatchTraining

    require_new_file(out, force)
    require_option("name", name)
    require_option("version", version)
    pairs, texts = _material(pairs_file, benign, config, run, reference)
    started = read_patch(start) if start else None
    company = [read_patch(file) for file in beside or ()]
    require_base(model, [*([started] if started else []), *company])
    with progress_bars(log_of(log, out, run), lambda: kept_in(run)) as bars:
        progress = silent if os.environ.get("RANK", "0") != "0" else bars  # of several processes the first speaks
        training = PatchTraining(model, config, weights or (), run, reference, device, note, progress, teacher)
        if started is not None:
            patch = training.kv_prefix(started, pairs, texts, name, version, progress, company)
        else:
            patch = training.soft_prompt(pairs, texts, name, version, progress, company)
        if parallel.world()[0]:
            return  # the first process writes
        patch = replace(patch, created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
        digest = write_patch(patch, out)
        if run is not None:
            write_training_page(training.history, patch.training, f"{name} {version}", run / "curves.html")
    accuracy = (training.history.preference_accuracy or [float("nan")])[-1]
    if as_json:
        print_json({"path": str(out), "digest": digest, "training": patch.training})
    else:
        print(
            f"{out}: {patch.num_virtual_tokens} virtual tokens, held-out preference accuracy {accuracy:.2f}, SHA-256 {digest}"
        )
