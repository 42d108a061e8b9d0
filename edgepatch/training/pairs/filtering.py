"""Which candidate pairs are kept: margin, threshold and length decide, and every pair that is dropped is told with its scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.sampling import Sampling
from edgepatch.training.pairs.files import Pair, PairPrompt, pair_row
from edgepatch.training.pairs.teacher_safety import TeacherSafety

Score = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts -> (N,) scores from 0 (safe) to 1 (unsafe)."""


@dataclass(frozen=True)
class PairConfig:
    """How pairs are sampled and filtered (method: margin and absolute threshold).

    Attributes:
        samples_per_prompt: continuations of each model a prompt.
        max_new_tokens: their length.
        top_p: nucleus.
        min_margin: the rejected score exceeds the chosen one by at least this (delta).
        max_chosen_score: the chosen score is at most this (tau).
        min_words: a chosen continuation has at least so many words, or silence would be the safest answer.
        pairs_per_prompt: at most so many pairs a prompt, in order of falling margin.
        rng_seed: of the sampling.
    """

    samples_per_prompt: int = 8
    max_new_tokens: int = 24
    top_p: float = 0.9
    min_margin: float = 0.4
    max_chosen_score: float = 0.2
    min_words: int = 6
    pairs_per_prompt: int = 3
    rng_seed: int = 1

    @property
    def sampling(self) -> Sampling:
        """Of the first continuation of every prompt."""
        return Sampling.plain(self.max_new_tokens, top_p=self.top_p, rng_seed=self.rng_seed)


@dataclass(frozen=True)
class PairSet:
    """Pairs that passed, and what became of the rest.

    Attributes:
        pairs: in order of their prompts.
        counts: prompts by fate (``prompts_*``), candidate pairs by reason (``dropped_*``), and ``pairs``.
        dropped: a line for each candidate pair and each prompt that is left out: what it was, its scores, ``reason`` and ``place``.
        safety: of the teacher, where it was measured.
    """

    pairs: list[Pair]
    counts: dict[str, int] = field(default_factory=dict)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    safety: TeacherSafety | None = None


def _fault(pair: Pair, config: PairConfig) -> str:
    """Why a pair is dropped; "" where it passes."""
    checks = {
        "identical": pair.chosen == pair.rejected,
        "short_chosen": len(pair.chosen.split()) < config.min_words,
        "unsafe_chosen": pair.chosen_score > config.max_chosen_score,
        "small_margin": pair.rejected_score - pair.chosen_score < config.min_margin,
    }
    return next((name for name, is_wrong in checks.items() if is_wrong), "")


def filter_pairs(pairs: Sequence[Pair], config: PairConfig, places: Sequence[str] = ()) -> PairSet:
    """Keeps pairs that pass margin, threshold and length, each once, and no more of a prompt than wanted.

    Args:
        pairs: scored.
        config: its settings of sampling are not used.
        places: where each stands, for what is told of those that are dropped.
    """
    kept: list[Pair] = []
    dropped, seen, of_prompt = list[dict[str, Any]](), set[str](), Counter[str]()
    for pair, place in zip(pairs, places or [""] * len(pairs), strict=True):
        prompt = key_of(pair.prompt)
        fault = _fault(pair, config) or ("repeated" if pair.key in seen else "")
        fault = fault or ("over_limit" if of_prompt[prompt] >= config.pairs_per_prompt else "")
        if fault:
            dropped.append(pair_row(pair) | dropped_row(fault, place))
            continue
        seen.add(pair.key)
        of_prompt[prompt] += 1
        kept.append(pair)
    return PairSet(kept, dict(Counter(f"dropped_{row['reason']}" for row in dropped)), dropped)


def dropped_row(reason: str, place: str) -> dict[str, Any]:
    """Why and where, as it stands on the line of what is left out."""
    return {"reason": reason, **({"place": place} if place else {})}


def score_pairs(pairs: Sequence[Pair], score: Score) -> list[Pair]:
    """The pairs with a judge's scores in place of their own."""
    chosen, rejected = score([p.chosen for p in pairs]).tolist(), score([p.rejected for p in pairs]).tolist()
    return [replace(p, chosen_score=c, rejected_score=r) for p, c, r in zip(pairs, chosen, rejected, strict=True)]


def key_of(prompt: PairPrompt) -> str:
    """The same for the same prompt."""
    return json.dumps(prompt, sort_keys=True)
