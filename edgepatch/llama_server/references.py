"""What a server must answer: next-token log probabilities of our own runtime on the same GGUF file, with the patch and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.llama_server.export import ExportOptions, open_session
from edgepatch.patch.file import Patch

MIN_EFFECT = 0.02
"""Smallest difference, in nats, between patched and bare that can be told from the rounding of another cache type or device."""

MAX_SHARE = 0.25
"""A patched server is nearer to the patched reference than to the others by at least this factor."""

LogProbs = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Reference:
    """The next token after one prompt, three ways.

    Attributes:
        tokens: the prompt behind the seed.
        patched: (V,) log probabilities with the patch.
        bare: without anything in front.
        as_text: with the labels in front, read as text: what a server does that has lost the seed.
    """

    tokens: list[int]
    patched: LogProbs
    bare: LogProbs
    as_text: LogProbs


@dataclass(frozen=True)
class Distance:
    """How far a server's log probabilities are from each reference, in nats, averaged over prompts.

    Attributes:
        patched: from the patched model.
        bare: from the bare model.
        as_text: from the bare model that reads the labels as text.
        effect: distance between the patched model and the nearer of the others.
    """

    patched: float
    bare: float
    as_text: float
    effect: float

    @property
    def is_patched(self) -> bool:
        """Whether the server can only be serving the patch."""
        return self.effect >= MIN_EFFECT and self.patched <= MAX_SHARE * min(self.bare, self.as_text)

    @property
    def nearest(self) -> str:
        """ "patched", "bare", "as_text", or "none" where every reference is about as far as the others are from each other."""
        distances = {"patched": self.patched, "bare": self.bare, "as_text": self.as_text}
        name = min(distances, key=lambda key: distances[key])
        return name if distances[name] <= max(0.5 * self.effect, MIN_EFFECT) else "none"


def log_softmax(logits: NDArray[np.float32]) -> LogProbs:
    """(V,) log probabilities."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: LogProbs = shifted - np.log(np.exp(shifted).sum())
    return result


def make_references(
    model: Path, patch: Patch, options: ExportOptions, labels: list[int], prompts: Sequence[list[int]]
) -> list[Reference]:
    """References of prompts; the model is loaded twice, one after the other."""
    with open_session(model, patch, options) as session:
        patched = [log_softmax(session.logits(prompt)[-1]) for prompt in prompts]
    with open_session(model, None, options) as session:
        bare = [log_softmax(session.logits(prompt)[-1]) for prompt in prompts]
        as_text = [log_softmax(session.logits(labels + prompt)[-1]) for prompt in prompts]
    return [Reference(*row) for row in zip(map(list, prompts), patched, bare, as_text, strict=True)]


def _gap(logprobs: Mapping[int, float], reference: LogProbs) -> float:
    """Mean difference of log probabilities over the server's own top tokens, weighted with their probability."""
    ids = np.fromiter(logprobs, dtype=np.int64)
    values = np.fromiter(logprobs.values(), dtype=np.float64)
    weights = np.exp(values)
    return float((weights * np.abs(values - reference[ids])).sum() / weights.sum())


def _top(reference: LogProbs, count: int) -> dict[int, float]:
    return {int(i): float(reference[i]) for i in np.argsort(-reference)[:count]}


def effect_of(reference: Reference, count: int = 20) -> float:
    """How far the nearer of the others is from the patched model, in nats, over its top tokens."""
    top = _top(reference.patched, count)
    return min(_gap(top, reference.bare), _gap(top, reference.as_text))


def measure(answers: Sequence[tuple[Reference, Mapping[int, float]]]) -> Distance:
    """Distances of a server's answers.

    Args:
        answers: each with token id -> log probability of the server's top tokens.
    """
    means = [
        np.mean([_gap(logprobs, getattr(r, name)) for r, logprobs in answers])
        for name in ("patched", "bare", "as_text")
    ]
    own = [(r, _top(r.patched, len(logprobs))) for r, logprobs in answers]
    effect = min(np.mean([_gap(logprobs, getattr(r, name)) for r, logprobs in own]) for name in ("bare", "as_text"))
    return Distance(float(means[0]), float(means[1]), float(means[2]), float(effect))
