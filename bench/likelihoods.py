"""How likely a runtime holds a text: the one calculation behind every perplexity and every minimal pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgepatch.runtimes.session import Session


def tokens_behind(runtime: Session, text: str) -> list[int]:
    """Token ids of a text in the middle of a prompt: without what the model wants in front of every text."""
    empty = runtime.encode("")
    return runtime.tokens(text)[len(empty) :]


def token_losses(runtime: Session, tokens: Sequence[int], first: int = 1) -> NDArray[np.float64]:
    """Negative log-likelihoods of a prompt's tokens from position ``first`` on, each given all before it.

    Args:
        runtime: bare or patched.
        tokens: T token ids.
        first: 1 or more; what stands before is a condition only.

    Returns:
        (T - first,) float64, in nats.

    Raises:
        InputError: the tokens do not fit the context.
    """
    logits = runtime.logits(tokens)[first - 1 : -1]
    top = logits.max(axis=1)
    log_norms = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
    losses: NDArray[np.float64] = log_norms - logits[np.arange(len(logits)), tokens[first:]]
    return losses
