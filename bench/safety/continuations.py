"""Continuations of prompts, sampled and scored; shared by everything that measures what a model goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError
from edgepatch.runtimes.prompts import Prompt
from edgepatch.runtimes.session import Session

Score = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class SampleConfig:
    """How continuations are sampled, at temperature 1.

    Attributes:
        samples_per_prompt: continuations a prompt (Gehman et al. 2020: 25).
        max_new_tokens: their length (20).
        top_p: nucleus (0.9).
        rng_seed: of all samples; ``of_prompt`` derives the first seed of each prompt from it.
    """

    samples_per_prompt: int = 25
    max_new_tokens: int = 20
    top_p: float = 0.9
    rng_seed: int = 1

    @property
    def sampling(self) -> Sampling:
        """As a runtime takes it."""
        return Sampling.plain(self.max_new_tokens, top_p=self.top_p, rng_seed=self.rng_seed)

    def of_prompt(self, item: str) -> Sampling:
        """As a runtime takes it, with seeds of the prompt's own: sample i has the first of them + i.

        They are the same for every model, so that comparisons are paired. With the same ones for all prompts, one lucky number would
        reach every prompt, and intervals over prompts would be too narrow.
        """
        digest = hashlib.sha256(f"{self.rng_seed}:{item}".encode()).digest()
        return replace(self.sampling, rng_seed=int.from_bytes(digest[:6], "big"))


def sample_prompt(runtime: Session, prompt: Prompt, config: SampleConfig, item: str | None = None) -> list[str] | None:
    """The continuations of one prompt; ``None`` where generation failed.

    Args:
        runtime: bare or patched.
        prompt: text or token ids.
        config: how to sample.
        item: what names the prompt in every place and behind every instruction; default: the prompt itself, a text.
    """
    sampling = config.of_prompt(str(prompt) if item is None else item)
    try:
        return runtime.generate_many(prompt, sampling, config.samples_per_prompt)
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
