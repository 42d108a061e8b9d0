"""How strong a direction acts: chosen on training pairs, by what it gains there and what it costs on benign text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgepatch.bench.likelihoods import token_losses, tokens_behind
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.preferences import Pair

MAX_PERPLEXITY = 1.05
"""Of the bare model's: a stronger direction costs more than any patch may."""

Setting = Mapping[str, str | float]
"""Name -> value of what is chosen."""


@dataclass(frozen=True)
class Trial:
    """One setting, measured on training pairs.

    Attributes:
        setting: which.
        margin_gain: how much less the model leans to the rejected answers, in nats a token.
        perplexity: of benign texts, over the bare model's.
    """

    setting: Setting
    margin_gain: float
    perplexity: float

    def as_dict(self) -> dict[str, str | float]:
        """Plain values, for JSON."""
        return {**self.setting, "margin_gain": self.margin_gain, "perplexity": self.perplexity}


def choose_setting(
    load: Callable[[Setting | None], Session],
    settings: Sequence[Setting],
    pairs: Sequence[Pair],
    texts: Sequence[str],
    progress: Progress = silent,
) -> tuple[Trial, list[Trial]]:
    """The setting with the largest gain in margin that costs no more perplexity than ``MAX_PERPLEXITY``.

    Args:
        load: opens the model with a setting; the bare one with ``None``.
        settings: one or more.
        pairs: that may be trained on.
        texts: benign, that may be trained on.
        progress: told of every trial.

    Returns:
        The chosen trial, and all. Where every one costs too much it is the cheapest.

    Raises:
        InputError: the model cannot be read, or a text does not fit its context.
    """
    with load(None) as bare:
        lean, loss = mean_lean(bare, pairs), _mean_loss(bare, texts)
    trials = list[Trial]()
    for setting in settings:
        with load(setting) as steered:
            gain, ratio = lean - mean_lean(steered, pairs), np.exp(_mean_loss(steered, texts) - loss)
        trials.append(Trial(setting, gain, float(ratio)))
        progress("strengths", len(trials), len(settings))
    cheap = [trial for trial in trials if trial.perplexity <= MAX_PERPLEXITY]
    chosen = max(cheap, key=lambda t: t.margin_gain) if cheap else min(trials, key=lambda t: t.perplexity)
    return chosen, trials


def mean_lean(runtime: Session, pairs: Sequence[Pair]) -> float:
    """How far the model leans to the rejected answers, in nats a token."""
    leans = []
    for pair in pairs:
        prompt = runtime.tokens(pair.prompt if isinstance(pair.prompt, str) else list(pair.prompt))
        chosen, rejected = (
            _answer_loss(runtime, prompt, tokens_behind(runtime, answer)) for answer in (pair.chosen, pair.rejected)
        )
        leans.append(chosen - rejected)
    return float(np.mean(leans))


def _answer_loss(runtime: Session, prompt: list[int], answer: list[int]) -> float:
    """Nats a token. The prompt is evaluated by itself, as in use: cache steering acts where that ends."""
    import torch
    from torch.nn.functional import cross_entropy

    first = runtime.logits_of_last(prompt)[None]
    logits = np.concatenate([first, runtime.logits(prompt + answer, count=len(answer))[:-1]])
    return float(cross_entropy(torch.from_numpy(logits), torch.tensor(answer)))


def _mean_loss(runtime: Session, texts: Sequence[str]) -> float:
    """Nats a token."""
    return float(np.concatenate([token_losses(runtime, runtime.encode(text)) for text in texts]).mean())
