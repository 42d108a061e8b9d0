"""Pairs, settings and trainers of trainings that take seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgepatch.converters.hf import caches, rotary
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.tensors import KVSeed, SoftPrompt
from edgepatch.training.config import TrainConfig
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.frozen.rows import Example
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
        "block": 0,
        "turns": False,
        "front_tokens": 0,
    } | changes
    return TrainConfig(**settings)


def make_trainer(models: FrozenModels, run: Run | None = None, pairs: int = 12) -> tuple[Trainer, SoftPromptPolicy]:
    start = SoftPrompt(np.random.default_rng(0).normal(0, 0.5, (4, models.spec.hidden_size)).astype(np.float32))
    policy = SoftPromptPolicy(start, models.device)
    return Trainer(models, policy, [make_pairs(pairs)], BENIGN, run), policy


def plain_logits(model, seed: KVSeed, anchoring: Anchoring | None, tokens: Sequence[int]) -> torch.Tensor:
    """(T, V): the seed is put in front of each span in the cache of a plain forward pass."""
    rotation, cache = rotary.read_rotation(model), caches.seeded_cache(model, seed)
    rows = []
    for start, end, anchor in anchoring.spans(tokens) if anchoring else [(0, len(tokens), 0)]:
        caches.replace_keys(cache, rotation.moved(seed, anchor).keys)
        with torch.inference_mode():
            rows.append(model(input_ids=torch.tensor([tokens[start:end]]), past_key_values=cache).logits[0])
    return torch.cat(rows)


def plain_log_probabilities(
    model, seed: KVSeed, anchoring: Anchoring | None, examples: Sequence[Example]
) -> torch.Tensor:
    """(B, A) of each example's answers, one plain forward pass each."""
    return torch.stack(
        [
            torch.stack([_log_probability(model, seed, anchoring, e.prompt, answer) for answer in e.answers])
            for e in examples
        ]
    )


def _log_probability(model, seed, anchoring, prompt, answer) -> torch.Tensor:
    log_p = plain_logits(model, seed, anchoring, prompt + answer)[len(prompt) - 1 : -1].log_softmax(-1)
    return log_p[torch.arange(len(answer)), torch.tensor(answer)].sum()


def random_examples(rng: np.random.Generator, lengths: Sequence[int]) -> list[Example]:
    """Prompts of these lengths, each with answers of 20 and of 33 tokens."""

    def ids(n):
        return tuple(int(i) for i in rng.integers(5, 4000, n))

    return [Example((1, *ids(n)), (ids(20), ids(33))) for n in lengths]
