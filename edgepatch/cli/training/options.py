"""Options that every verb that trains takes, and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.console import log_beside

if TYPE_CHECKING:
    from edgepatch.patch.file import Patch
    from edgepatch.training.config import TrainConfig
    from edgepatch.training.frozen.forward import BenignText

BenignOption = Annotated[
    Path | None, typer.Option(help="Benign texts or conversations for the KL term; default: the texts shipped.")
]
RunOption = Annotated[
    Path | None, typer.Option(help="Run folder: checkpoints and curves; a stopped run goes on from there.")
]
SFTStepsOption = Annotated[int | None, typer.Option(min=0, help="Steps of stage 1.")]
SFTLearningRateOption = Annotated[float | None, typer.Option(help="Learning rate of stage 1.")]
DPOStepsOption = Annotated[int | None, typer.Option(min=0, help="Steps of stage 2.")]
DPOLearningRateOption = Annotated[float | None, typer.Option(help="Learning rate of stage 2.")]
BetaOption = Annotated[float | None, typer.Option(min=0, help="Strength of DPO's tie to its reference.")]
NLLWeightOption = Annotated[
    float | None, typer.Option(min=0, help="Weight of the chosen answers' cross-entropy in stage 2.")
]
BatchSizeOption = Annotated[int | None, typer.Option(min=1, help="Pairs a step.")]
MicroBatchSizeOption = Annotated[
    int | None, typer.Option(min=0, help="Pairs in memory at once; the gradient stays the batch's.")
]
MaxTokensOption = Annotated[int | None, typer.Option(min=2, help="Longest prompt and answer together.")]
BlockOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="The seed moves on every so many tokens of a text, 8 to 512. Default: 128 where the model's seeds can move.",
    ),
]
TurnsOption = Annotated[
    bool | None,
    typer.Option(
        "--turns/--no-turns",
        help="The seed moves to the opening of each turn of a conversation. Default: where that can be done.",
        show_default=False,
    ),
]
FrontTokensOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Put texts of 20 to so many tokens, or earlier turns, in front of three pairs in four. "
        "Default: 500 where the seed moves, or what the context has room for.",
    ),
]
KLWeightOption = Annotated[float | None, typer.Option(min=0, help="Weight of the KL term on benign text.")]
KLBatchSizeOption = Annotated[int | None, typer.Option(min=1, help="Benign texts a step.")]
HeldOutOption = Annotated[
    float | None, typer.Option(help="Share of pairs and benign texts that is kept for the checks.")
]
PatienceOption = Annotated[
    int | None, typer.Option(min=0, help="End after so many checks without a better one; 0: never.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Of the frozen weights: float32, bfloat16, 4bit, or auto: the faster one of the first two that is accurate, "
        "tried on the model for about a second or a hundredth of the run; default: auto."
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")]
RNGSeedOption = Annotated[int, typer.Option(help="Random seed of the order of examples.")]
LogOption = Annotated[
    Path | None,
    typer.Option(
        "--log",
        metavar="FILE",
        help="Log of the progress, added to; default: train.log in the run folder, else OUT.log beside the output.",
    ),
]


def benign_texts(path: Path | None) -> list[BenignText]:
    from edgepatch.prompts.sets import load_benign_text, load_prompts
    from edgepatch.training.pairs.prompt_files import read_prompts

    return list(read_prompts(path).prompts) if path else [*load_benign_text("train"), *load_prompts("benign", "train")]


def config_of(parameters: Mapping[str, Any]) -> TrainConfig:
    """Of the command's parameters, those that are given and that training knows."""
    from dataclasses import fields

    from edgepatch.training.config import TrainConfig

    names = {f.name for f in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in parameters.items() if name in names and value is not None})


def require_base(model: Path, patches: Sequence[Patch]) -> None:
    """Raises unless patches are for the model that is to be loaded."""
    from edgepatch.runtimes import read_spec

    for patch in patches:
        patch.base.require_same(read_spec(model))


def log_of(log: Path | None, out: Path, run: Path | None) -> Path | None:
    return log or (run / "train.log" if run else log_beside(out))


def kept_in(run: Path | None) -> str:
    """What a training that was ended has left."""
    from edgepatch.training.runs import CHECKPOINT_FILE

    if run is None:
        return "nothing is kept; with --run FOLDER a stopped training goes on where it was"
    if (run / CHECKPOINT_FILE).is_file():
        return f"what is trained is kept in {run}; the same command goes on from there"
    return "nothing is trained yet; the same command starts again"
