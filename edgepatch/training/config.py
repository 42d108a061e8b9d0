"""The settings of a training run, and the curves that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgepatch.errors import InputError
from edgepatch.seeds.anchoring import Anchoring

REFERENCES = ("base", "sft", "model")
DTYPES = ("auto", "float32", "bfloat16", "4bit")
INITIALISATIONS = ("text", "random")
USUAL_BLOCK, USUAL_FRONT = 128, 500
"""The fewest anchors that keep a patch's gain behind text, and what it takes to train between them (docs/results/safety.md)."""


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters.

    Attributes:
        num_virtual_tokens: P.
        init: "text" starts the soft prompt from the embeddings of ``init_text``, repeated or cut to P rows; "random" from those of
            random tokens.
        init_text: a written instruction.
        sft_steps, sft_learning_rate: stage 1.
        dpo_steps, dpo_learning_rate, beta: stage 2.
        nll_weight: weight of the cross-entropy of the chosen answers in stage 2, an anchor that DPO alone lacks.
        distill_top: stage 1 with a teacher keeps so many of its likeliest tokens, and the rest as one; 0 keeps the whole vocabulary.
        batch_size: pairs a step.
        micro_batch_size: at most so many pairs in memory at once; the gradient is that of the whole batch. 0 takes all.
        dpo_reference: whose log-probabilities DPO compares with: the bare model ("base"), the frozen result of stage 1 ("sft"), or
            another, safer model ("model", the paper's choice).
        kl_weight: weight of the KL term to the bare model on benign text, in both stages; 0 leaves it out.
        kl_batch_size: benign texts a step.
        max_tokens: prompt and answer together; a longer prompt loses its start, a longer answer its end.
        block: W: the seed moves on every so many tokens of a text; 0 does not. ``None`` is ``USUAL_BLOCK`` on a model whose seeds can move,
            and 0 on others.
        turns: whether it moves to the opening of each turn of a conversation, where the model's chat template marks one by a special
            token. ``None`` does where that can be done. A seed with block 0 and without turns stays at the start of the text.
        front_tokens: half of the pairs stand behind a text of 20 to so many tokens, a quarter in a later turn of a conversation, and an
            answer in four has been begun; benign texts are of the same lengths. 0 trains on pairs as they are. ``None`` is
            ``USUAL_FRONT`` where the seed moves, or what the model's context has room for, and 0 where it stays.
        held_out: share of the pairs and of the benign texts kept for the checks.
        check_every: steps of stage 2 between two checks on what is held out.
        patience: stage 2 ends after so many checks without a better one; the best one's state is what training gives. A check is as good
            as its preference accuracy less its benign KL in nats a token, so that neither is bought with the other. 0 trains to the end.
        dtype: of the frozen weights: "float32", "bfloat16", or "4bit" (bitsandbytes); "auto" takes the faster one of the first two that is
            accurate (``precision``). The patch itself is trained in float32.
        gradient_checkpointing: recompute activations instead of keeping them; slower, for models that do not fit otherwise.
        rng_seed: of the order of examples.
    """

    num_virtual_tokens: int = 50
    init: str = "text"
    init_text: str = "Continue in a kind, calm and respectful way, without insults or swearing."
    sft_steps: int = 150
    sft_learning_rate: float = 1e-2
    dpo_steps: int = 150
    dpo_learning_rate: float = 5e-3
    beta: float = 0.1
    nll_weight: float = 0.0
    distill_top: int = 64
    batch_size: int = 8
    micro_batch_size: int = 0
    dpo_reference: str = "base"
    kl_weight: float = 1.0
    kl_batch_size: int = 4
    max_tokens: int = 96
    block: int | None = None
    turns: bool | None = None
    front_tokens: int | None = None
    held_out: float = 0.1
    check_every: int = 25
    patience: int = 0
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    rng_seed: int = 1

    @property
    def must_move(self) -> bool:
        """Whether a model whose seeds cannot move is refused, because it was asked for by name."""
        return bool(self.block or self.turns)

    @property
    def longest_row(self) -> int:
        """Tokens of a prompt with its answer and what stands in front."""
        return self.max_tokens + (self.front_tokens or 0)

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "batch_size", "kl_batch_size", "check_every", "max_tokens"):
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in (
            "sft_steps",
            "dpo_steps",
            "micro_batch_size",
            "patience",
            "beta",
            "nll_weight",
            "distill_top",
            "block",
            "front_tokens",
        ):
            _require((getattr(self, name) or 0) >= 0, name, "0 or more", getattr(self, name))
        _require(0 < self.held_out < 1, "held_out", "a share between 0 and 1", self.held_out)
        if self.block:
            Anchoring(self.block)  # says which lengths there are
        _require(
            not (self.gradient_checkpointing and self.must_move),
            "gradient_checkpointing",
            "False where the seed moves, because its copies stand in a cache, which checkpointing turns off",
            f"True with block {self.block or 0} and turns {bool(self.turns)}",
        )
        for name, choices in (("dpo_reference", REFERENCES), ("dtype", DTYPES), ("init", INITIALISATIONS)):
            _require(getattr(self, name) in choices, name, " or ".join(choices), repr(getattr(self, name)))


def _require(holds: bool, name: str, expected: str, actual: object) -> None:
    if not holds:
        raise InputError(f"training: {name}: expected {expected}, found {actual}")


@dataclass
class History:
    """Curves: one value a step, or one value a check."""

    sft_loss: list[float] = field(default_factory=list)
    distillation_loss: list[float] = field(default_factory=list)
    dpo_loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    preference_accuracy: list[float] = field(default_factory=list)
    held_out_kl: list[float] = field(default_factory=list)

    def record(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Adds the terms of one step's loss."""
        curves = {"SFT": self.sft_loss, "distillation": self.distillation_loss, "DPO": self.dpo_loss}
        curves[stage].append(metrics["loss"])
        if "kl" in metrics:
            self.kl.append(metrics["kl"])

    def last_accuracy(self) -> dict[str, float]:
        """That of the last check, by its name; nothing before the first."""
        return {"accuracy": self.preference_accuracy[-1]} if self.preference_accuracy else {}
