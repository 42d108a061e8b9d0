"""``train``: from pairs to a patch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import ForceFlag, JsonFlag, log_beside, model_path, note, print_json, progress_bars
from edgepatch.errors import InputError
from edgepatch.progress import silent

if TYPE_CHECKING:
    from edgepatch.patch.file import Patch
    from edgepatch.training.config import TrainConfig
    from edgepatch.training.distillation import Teacher
    from edgepatch.training.forward import BenignText
    from edgepatch.training.pairs.preferences import Pair


LORA_RATES = {"sft_learning_rate": 1e-3, "dpo_learning_rate": 5e-4}
"""Weights move everything at once; a patch takes ten times as much."""

KINDS = ("soft-prompt", "kv", "lora")


def _benign_texts(path: Path | None) -> list[BenignText]:
    from edgepatch.prompts.sets import load_benign_text, load_prompts
    from edgepatch.training.pairs.prompt_files import read_prompts

    return list(read_prompts(path).prompts) if path else [*load_benign_text("train"), *load_prompts("benign", "train")]


def _config(parameters: Mapping[str, Any]) -> TrainConfig:
    """Of the command's parameters, those that are given and that training knows."""
    from dataclasses import fields

    from edgepatch.training.config import TrainConfig

    names = {f.name for f in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in parameters.items() if name in names and value is not None})


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
    with progress_bars(_log(log, out, run), lambda: _kept(run)) as progress:
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

    pairs, texts = read_pairs(pairs_file), _benign_texts(benign)
    require_trainable(config, [pairs], texts, reference is not None)
    require_same_config(run, config)
    return pairs, texts


def _require_base(model: Path, patches: Sequence[Patch]) -> None:
    """Raises unless patches are for the model that is to be loaded."""
    from edgepatch.runtimes import read_spec

    for patch in patches:
        patch.base.require_same(read_spec(model))


def _log(log: Path | None, out: Path, run: Path | None) -> Path | None:
    return log or (run / "train.log" if run else log_beside(out))


def _kept(run: Path | None) -> str:
    """What a training that was ended has left."""
    from edgepatch.training.runs import CHECKPOINT_FILE

    if run is None:
        return "nothing is kept; with --run FOLDER a stopped training goes on where it was"
    if (run / CHECKPOINT_FILE).is_file():
        return f"what is trained is kept in {run}; the same command goes on from there"
    return "nothing is trained yet; the same command starts again"


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
    benign: Annotated[
        Path | None, typer.Option(help="Benign texts or conversations for the KL term; default: the texts shipped.")
    ] = None,
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
    run: Annotated[
        Path | None, typer.Option(help="Run folder: checkpoints and curves; a stopped run goes on from there.")
    ] = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="P.")] = 50,
    init: Annotated[str | None, typer.Option(help="text or random.")] = None,
    init_text: Annotated[str | None, typer.Option(help="Instruction whose embeddings start the soft prompt.")] = None,
    sft_steps: Annotated[int | None, typer.Option(min=0, help="Steps of stage 1.")] = None,
    sft_learning_rate: Annotated[float | None, typer.Option(help="Learning rate of stage 1.")] = None,
    dpo_steps: Annotated[int | None, typer.Option(min=0, help="Steps of stage 2.")] = None,
    dpo_learning_rate: Annotated[float | None, typer.Option(help="Learning rate of stage 2.")] = None,
    beta: Annotated[float | None, typer.Option(min=0, help="Strength of DPO's tie to its reference.")] = None,
    nll_weight: Annotated[
        float | None, typer.Option(min=0, help="Weight of the chosen answers' cross-entropy in stage 2.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pairs a step.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=0, help="Pairs in memory at once; the gradient stays the batch's.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Longest prompt and answer together.")] = None,
    block: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The seed moves on every so many tokens of a text, 8 to 512. Default: 128 where the model's seeds can move.",
        ),
    ] = None,
    turns: Annotated[
        bool | None,
        typer.Option(
            "--turns/--no-turns",
            help="The seed moves to the opening of each turn of a conversation. Default: where that can be done.",
            show_default=False,
        ),
    ] = None,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="The seed stays at the start of the text, where its hold fades.")
    ] = False,
    front_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Put texts of 20 to so many tokens, or earlier turns, in front of three pairs in four. "
            "Default: 500 where the seed moves, or what the context has room for.",
        ),
    ] = None,
    kl_weight: Annotated[float | None, typer.Option(min=0, help="Weight of the KL term on benign text.")] = None,
    dpo_reference: Annotated[str | None, typer.Option(help="base, sft, or model (with --reference).")] = None,
    patience: Annotated[
        int | None, typer.Option(min=0, help="End after so many checks without a better one; 0: never.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the frozen weights: float32, bfloat16, 4bit, or auto: the faster one of the first two that is accurate, "
            "tried on the model for about a second or a hundredth of the run; default: auto."
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations to save memory.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")] = None,
    rng_seed: Annotated[int, typer.Option(help="Random seed of the order of examples.")] = 1,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="Log of the progress, added to; default: train.log in the run folder, else OUT.log beside the output.",
        ),
    ] = None,
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
    config = _config(options)
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
    _require_base(model, [*([started] if started else []), *company])
    with progress_bars(_log(log, out, run), lambda: _kept(run)) as bars:
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
