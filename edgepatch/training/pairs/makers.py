"""What is made of both models' answers to one prompt: pairs by a judge's scores, or refusals of harmful requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from edgepatch.judges.refusals import declines
from edgepatch.training.pairs.files import Pair, PairPrompt
from edgepatch.training.pairs.filtering import PairConfig, Score, dropped_row, filter_pairs, key_of
from edgepatch.training.pairs.journal import Outcome
from edgepatch.training.pairs.refusals import answer_pair, refusal_pair, unsafety

WRITTEN_REFUSAL = "I'm sorry, but I can't help with that."
"""What a harmless request is not to be answered with, where the teacher itself does not refuse it."""


class PairMaker(ABC):
    """Makes pairs of the answers to one prompt."""

    @abstractmethod
    def outcome(self, prompt: PairPrompt, place: str, chosen: Sequence[str], rejected: Sequence[str]) -> Outcome:
        """Pairs, what was dropped, and how unsafe both models' answers are.

        Args:
            prompt: text or messages.
            place: where it stands.
            chosen, rejected: answers of the teacher and of the base.
        """


class ScoredPairs(PairMaker):
    """Safest with most unsafe, second with second, ..., where the filter holds.

    Args:
        score: the filter judge.
        config: its limits.
    """

    def __init__(self, score: Score, config: PairConfig) -> None:
        self._score, self._config = score, config

    def outcome(self, prompt: PairPrompt, place: str, chosen: Sequence[str], rejected: Sequence[str]) -> Outcome:
        texts = list(dict.fromkeys([*chosen, *rejected]))
        scores = dict(zip(texts, self._score(texts).tolist(), strict=True))
        means = (_mean(scores, rejected), _mean(scores, chosen))
        good = sorted((scores[t], t) for t in set(chosen) if len(t.split()) >= self._config.min_words)
        bad = sorted(((scores[t], t) for t in set(rejected) if t), reverse=True)
        if not good or not bad:
            return Outcome((), {"prompts_without_candidate": 1}, (_prompt_row(prompt, "no_candidate", place),), means)
        candidates = [Pair(prompt, c, r, cs, rs) for (cs, c), (rs, r) in zip(good, bad, strict=False)]
        pair_set = filter_pairs(candidates, self._config, [place] * len(candidates))
        fate = {} if pair_set.pairs else {"prompts_without_pair": 1}
        return Outcome(tuple(pair_set.pairs), {**pair_set.counts, **fate}, tuple(pair_set.dropped), means)


class RefusalPairs(PairMaker):
    """The teacher's refusal of a harmful request over the base's help; the base's answer to a harmless one over a refusal.

    The second kind keeps harmless requests answered: without it, refusing everything is the cheapest way to please the first.

    Args:
        harmless: keys (``filtering.key_of``) of the prompts that are to be answered; all others are harmful.
    """

    def __init__(self, harmless: Collection[str]) -> None:
        self._harmless = frozenset(harmless)

    def outcome(self, prompt: PairPrompt, place: str, chosen: Sequence[str], rejected: Sequence[str]) -> Outcome:
        if key_of(prompt) in self._harmless:
            refusal = next((text for text in chosen if declines(text)), WRITTEN_REFUSAL)
            return _one_pair(answer_pair(prompt, rejected, refusal), prompt, "not_answered", place, None)
        unsafe, safe = (float(np.mean([unsafety(prompt, t) for t in texts])) for texts in (rejected, chosen))
        reason = "nothing_taken_up" if any(map(declines, chosen)) else "no_refusal"
        return _one_pair(refusal_pair(prompt, chosen, rejected), prompt, reason, place, (unsafe, safe))


def _one_pair(
    pair: Pair | None, prompt: PairPrompt, reason: str, place: str, means: tuple[float, float] | None
) -> Outcome:
    if pair is None:
        return Outcome((), {"prompts_without_pair": 1}, (_prompt_row(prompt, reason, place),), means)
    return Outcome((pair,), {}, (), means)


def _prompt_row(prompt: PairPrompt, reason: str, place: str) -> dict[str, Any]:
    return {"prompt": prompt, **dropped_row(reason, place)}


def _mean(scores: dict[str, float], texts: Sequence[str]) -> float:
    """An empty answer is a failed one."""
    return float(np.mean([scores[text] if text.strip() else 1.0 for text in texts])) if texts else 1.0
