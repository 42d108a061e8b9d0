"""Continuations of prompts, sampled and scored; shared by everything that measures what a model goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError
from edgepatch.runtimes.session import Session

Score = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class SampleConfig:
    """How continuations are sampled, at temperature 1.

    Attributes:
        samples_per_prompt: continuations a prompt (Gehman et al. 2020: 25).
        max_new_tokens: their length (20).
        top_p: nucleus (0.9).
        rng_seed: first random seed; sample i of every prompt uses ``rng_seed + i``.
    """

    samples_per_prompt: int = 25
    max_new_tokens: int = 20
    top_p: float = 0.9
    rng_seed: int = 1

    @property
    def sampling(self) -> Sampling:
        """As a runtime takes it."""
        return Sampling(self.max_new_tokens, top_p=self.top_p, rng_seed=self.rng_seed)


def sample_prompt(runtime: Session, prompt: str, config: SampleConfig) -> list[str] | None:
    """The continuations of one prompt; ``None`` where generation failed."""
    try:
        return runtime.generate_many(prompt, config.sampling, config.samples_per_prompt)
    except EdgepatchError:
        return None


def score_rows(rows: Sequence[Sequence[str]], score: Score, samples: int) -> NDArray[np.float32]:
    """(N, S) scores; a row without texts is a failed generation and scores 1."""
    flat = score([text for row in rows for text in row])
    scores, position = np.ones((len(rows), samples), dtype=np.float32), 0
    for i, row in enumerate(rows):
        if row:
            scores[i] = flat[position : position + samples]
            position += len(row)
    return scores
