"""Pairs, settings and trainers of trainings that take seconds."""

from __future__ import annotations

import numpy as np

from edgepatch.tensors import SoftPrompt
from edgepatch.training.config import TrainConfig
from edgepatch.training.forward import FrozenModels
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.policies import SoftPromptPolicy
from edgepatch.training.runs import Run
from edgepatch.training.trainer import Trainer

BENIGN = ["The quick brown fox sleeps in the warm afternoon sun.", "Patching a model should be simple."]


def make_pairs(count: int) -> list[Pair]:
    return [Pair(f"The fox {i}", " sleeps in the sun", " jumps over the dog", 0.1, 0.9) for i in range(count)]


def small(**changes) -> TrainConfig:
    settings = {
        "num_virtual_tokens": 4,
        "sft_steps": 6,
        "dpo_steps": 6,
        "batch_size": 4,
        "kl_batch_size": 1,
        "check_every": 3,
        "dtype": "float32",
    } | changes
    return TrainConfig(**settings)


def make_trainer(models: FrozenModels, run: Run | None = None, pairs: int = 12) -> tuple[Trainer, SoftPromptPolicy]:
    start = SoftPrompt(np.random.default_rng(0).normal(0, 0.5, (4, models.spec.hidden_size)).astype(np.float32))
    policy = SoftPromptPolicy([start], models.device)
    return Trainer(models, policy, [make_pairs(pairs)], BENIGN, run), policy
