"""What a server must answer: next-token log probabilities of our own runtime on the same GGUF file, with the patch and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepatch.runtimes.session import Session

MIN_EFFECT = 0.02
"""Smallest difference, in nats, between patched and bare that can be told from the rounding of another cache type or device."""

MAX_SHARE = 0.25
"""A patched server is nearer to the patched reference than to the bare one by at least this factor."""

LogProbs = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reference:
    """The next token after one prompt, two ways.

    Attributes:
        tokens: the prompt.
        patched: (V,) log probabilities with the patch.
        bare: without it.
    """

    tokens: list[int]
    patched: LogProbs
    bare: LogProbs


@dataclass(frozen=True)
class Distance:
    """How far a server's log probabilities are from each reference, in nats, averaged over prompts.

    Attributes:
        patched: from the patched model.
        bare: from the bare model.
        effect: distance between the two.
    """

    patched: float
    bare: float
    effect: float

    @property
    def is_patched(self) -> bool:
        """Whether the server can only be serving the patch."""
        return self.effect >= MIN_EFFECT and self.patched <= MAX_SHARE * self.bare

    @property
    def nearest(self) -> str:
        """ "patched", "bare", or "none" where both are about as far as they are from each other."""
        name, distance = ("patched", self.patched) if self.patched <= self.bare else ("bare", self.bare)
        return name if distance <= max(MAX_SHARE * self.effect, MIN_EFFECT) else "none"


def log_softmax(logits: NDArray[np.float32]) -> LogProbs:
    """(V,) log probabilities."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: LogProbs = shifted - np.log(np.exp(shifted).sum())
    return result


def make_references(session: Session, prompts: Sequence[list[int]]) -> list[Reference]:
    """References of prompts; the session's patch is taken off for the bare half, and put back.

    Args:
        session: of the patch, whose seed stands where the server's does.
        prompts: token ids.
    """
    patch = session.patch
    patched = [log_softmax(session.logits_of_last(prompt)) for prompt in prompts]
    session.swap(None)
    bare = [log_softmax(session.logits_of_last(prompt)) for prompt in prompts]
    session.swap(patch)
    return [Reference(*row) for row in zip(map(list, prompts), patched, bare, strict=True)]


def _gap(logprobs: Mapping[int, float], reference: LogProbs) -> float:
    """Mean difference of log probabilities over the server's own top tokens, weighted with their probability."""
    ids = np.fromiter(logprobs, dtype=np.int64)
    values = np.fromiter(logprobs.values(), dtype=np.float64)
    weights = np.exp(values)
    return float((weights * np.abs(values - reference[ids])).sum() / weights.sum())


def _top(reference: LogProbs, count: int) -> dict[int, float]:
    return {int(i): float(reference[i]) for i in np.argsort(-reference)[:count]}


def effect_of(reference: Reference, count: int = 20) -> float:
    """How far the bare model is from the patched one, in nats, over the patched model's top tokens."""
    return _gap(_top(reference.patched, count), reference.bare)


def measure(answers: Sequence[tuple[Reference, Mapping[int, float]]]) -> Distance:
    """Distances of a server's answers.

    Args:
        answers: each with token id -> log probability of the server's top tokens.
    """
    patched, bare = (
        float(np.mean([_gap(logprobs, getattr(reference, name)) for reference, logprobs in answers]))
        for name in ("patched", "bare")
    )
    effect = float(np.mean([effect_of(reference, len(logprobs)) for reference, logprobs in answers]))
    return Distance(patched, bare, effect)
