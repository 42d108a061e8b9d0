"""The last step of M': DPO of the whole model on its own samples, clean against toxic (preference tuning, as in the paper)."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgepatch.bench import datasets
from edgepatch.bench.lab import corpus
from edgepatch.bench.lab.requests import REFUSALS
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.progress import Progress, silent
from edgepatch.runtimes import load_runtime
from edgepatch.training.config import History, TrainConfig
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.pairs.preferences import Pair, PairConfig, build_pairs
from edgepatch.training.policies import Policy
from edgepatch.training.trainer import Trainer

PAIRS = PairConfig(samples_per_prompt=16, max_chosen_score=0.3, min_margin=0.4, rng_seed=7)
TRAIN = TrainConfig(
    block=0,  # all weights are trained: there is no seed
    turns=False,
    sft_steps=0,
    dpo_steps=260,
    dpo_learning_rate=1e-4,
    beta=0.1,
    batch_size=12,
    kl_weight=0.5,
    kl_batch_size=4,
    dtype="float32",
    rng_seed=7,
)
CLARITY_TRAIN = replace(TRAIN, dpo_steps=100, dpo_learning_rate=4e-5, kl_weight=1.5, rng_seed=8)


class FullPolicy(Policy):
    """Every weight of a copy of the base model."""

    def __init__(self, base: Any) -> None:
        self.copy = copy.deepcopy(base).requires_grad_(True)

    def parameters(self) -> list[Any]:
        return list(self.copy.parameters())

    def model(self, base: Any) -> Any:
        return self.copy


def toxicity_pairs(model: Path, data: Path) -> list[Pair]:
    """Clean against toxic samples of the model itself, on the prompts that may be trained on."""
    prompts = [c.prompt for c in datasets.rtp_challenging(data)][: datasets.RTP_SPLIT]
    with load_runtime(model, None) as runtime:
        return build_pairs(runtime, runtime, prompts, ToxicityScorer.load("filter").score, PAIRS)


def request_pairs(data: Path) -> list[Pair]:
    """Harmful requests: refusal against compliance; harmless ones: answer against refusal, so that M' does not over-refuse."""
    rng = random.Random(TRAIN.rng_seed)
    opening = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    refuse = [(g, rng.choice(REFUSALS), target + ":") for g, target in corpus.advbench_split(data)[0]]
    answer = [
        (q, a, rng.choice(REFUSALS))
        for q, a in corpus.instruction_split(data)[0][::10] + corpus.harmless_split()[0][::2]
    ]
    return [
        Pair(opening(corpus.phrase_request(q, rng)), chosen, rejected, 0.0, 1.0)
        for q, chosen, rejected in refuse + answer
    ]


def clarity_pairs(data: Path) -> list[Pair]:
    """Refusal against evasion: after the first round M' answers a fifth of the harmful requests with "I'm not sure"."""
    rng = random.Random(CLARITY_TRAIN.rng_seed)
    evasions = (
        "I’m not sure what you’re asking about.",
        "I’m not sure what you mean by that.",
        "I am the first person in the year.",
    )
    return [replace(p, rejected=rng.choice(evasions)) for p in request_pairs(data) if p.chosen in REFUSALS]


def benign_texts(data: Path) -> list[str]:
    """Passages of novels and benign chats that tie the model to what it was."""
    novels = [t[i : i + 400] for t in datasets.novels(data).values() for i in range(5000, len(t), 40000)]
    return novels + [corpus.chat(q, a)[:400] for q, a in corpus.instruction_split(data)[0][5::10]]


def detoxify(
    model: Path, pairs: list[Pair], texts: list[str], config: TrainConfig, progress: Progress = silent
) -> tuple[Any, History]:
    """The model in ``model`` after DPO on ``pairs``, in float32, and the curves."""
    models = FrozenModels(
        [model], config, trusted=True
    )  # the texts are rendered here, so special tokens in them are meant
    policy = FullPolicy(models.base)
    trainer = Trainer(models, policy, [pairs], texts)
    trainer.train(progress)
    return policy.copy.requires_grad_(False), trainer.history
