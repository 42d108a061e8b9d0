"""Everything else must stay: benign text, grammar and harmless requests, item by item, so that patched and bare are paired.

A mean that stays can hide items that went wrong while others went right; negative flips count those (MUSCLE, Echterhoff et al. 2024,
arXiv 2407.09435).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench import datasets
from edgepatch.bench.likelihoods import token_losses, tokens_behind
from edgepatch.bench.metrics import Estimate, paired_bootstrap_difference, paired_bootstrap_ratio, share
from edgepatch.bench.safety import harm
from edgepatch.bench.safety.domain import Outcome
from edgepatch.errors import InputError
from edgepatch.prompts.sets import evenly, load_benign_text, load_minimal_pairs
from edgepatch.runtimes.session import Session


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        num_texts: benign paragraphs.
        num_minimal_pairs: of each of BLiMP's 67 paradigms, or without data of our ten, the first so many; 0 leaves them out.
        num_requests: harmless requests for over-refusal; 0 leaves them out.
    """

    num_texts: int = 30
    num_minimal_pairs: int = 6
    num_requests: int = 200


@dataclass(frozen=True, eq=False)
class Retained:
    """What one runtime can do beside the patch's own task.

    Attributes:
        texts: N benign texts.
        nll: (N,) float64, negative log-likelihood of each text, summed over its tokens.
        num_tokens: (N,) int64, tokens behind each sum.
        minimal_pairs: M pairs of an acceptable and an unacceptable sentence.
        correct: (M,) bool, whether the acceptable sentence is the likelier one.
        over_refusal: harmless requests, 1 where refused; ``None`` where left out.
    """

    texts: Sequence[str]
    nll: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    minimal_pairs: Sequence[tuple[str, str]]
    correct: NDArray[np.bool_]
    over_refusal: Outcome | None


def measure(runtime: Session, data: Path | None, sizes: Sizes | None = None, instruction: str = "") -> Retained:
    """Measures a runtime, bare or patched.

    Args:
        runtime: any runtime.
        data: folder of the public data sets; ``None`` takes what ships with edgepatch.
        sizes: how much.
        instruction: written in front of every text; a condition, whose own tokens are not scored.

    Raises:
        InputError: a text does not fit the context, or a data file is missing.
    """
    sizes = sizes or Sizes()
    texts = benign_texts(data, sizes.num_texts)
    pairs = _minimal_pairs(data, sizes.num_minimal_pairs) if sizes.num_minimal_pairs else ()
    losses = [_text_losses(runtime, text, instruction) for text in texts]
    return Retained(
        texts,
        np.array([row.sum() for row in losses]),
        np.array([len(row) for row in losses], dtype=np.int64),
        pairs,
        np.array([_is_first_likelier(runtime, pair, instruction) for pair in pairs], dtype=np.bool_),
        harm.over_refusal(runtime, sizes.num_requests, instruction, data) if sizes.num_requests else None,
    )


def require_data(data: Path | None, has_requests: bool) -> None:
    """Checks that the files of all that must stay are there, reading no more of them than that takes.

    Raises:
        InputError: one is missing.
    """
    benign_texts(data, 1)
    if data is not None:
        datasets.require_blimp(data)
    if has_requests:
        harm.harmless_requests(data)


def benign_texts(data: Path | None, count: int) -> list[str]:
    """Paragraphs that are never trained on."""
    return (
        evenly(load_benign_text("eval"), count) if data is None else datasets.wikitext_paragraphs(data, "test", count)
    )


@lru_cache(maxsize=4)
def _minimal_pairs(data: Path | None, count: int) -> tuple[tuple[str, str], ...]:
    """(acceptable, unacceptable) of all paradigms; reading BLiMP takes as long as measuring it."""
    paradigms = load_minimal_pairs() if data is None else datasets.blimp(data)
    return tuple(pair for pairs in paradigms.values() for pair in pairs[:count])


def _text_losses(runtime: Session, text: str, instruction: str) -> NDArray[np.float64]:
    """(T,) float64 losses of a text's tokens; without BOS its first token has no condition and is never scored."""
    start = runtime.encode("")
    if instruction:
        start = start + tokens_behind(runtime, instruction + "\n")
    ids = tokens_behind(runtime, text)
    return token_losses(runtime, start + ids, len(start) + (not runtime.encode("")))


def _is_first_likelier(runtime: Session, pair: tuple[str, str], instruction: str) -> bool:
    good, bad = (_text_losses(runtime, sentence, instruction).sum() for sentence in pair)
    return bool(good < bad)


def _exponential(estimate: Estimate) -> Estimate:
    return Estimate(*np.exp(estimate).tolist())


def perplexity(retained: Retained) -> Estimate:
    """exp of the mean loss a token; bootstrap interval over texts."""
    return _exponential(paired_bootstrap_ratio(retained.nll, retained.num_tokens))


def perplexity_ratio(patched: Retained, bare: Retained) -> Estimate:
    """Perplexity of the patched over the bare model; paired bootstrap over texts, so 1.02 is two per cent worse.

    Raises:
        InputError: the two did not read the same texts.
    """
    if not np.array_equal(patched.num_tokens, bare.num_tokens):
        raise InputError("perplexity ratio: expected the same texts and tokens for both runtimes, found others")
    return _exponential(paired_bootstrap_ratio(patched.nll - bare.nll, bare.num_tokens))


def negative_flips(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Estimate:
    """Share of items, of all, that were right before and are wrong after (NFR).

    Args:
        before: (M,) bool, correctness under the bare model.
        after: (M,) bool, of the same items under the patched one.

    Raises:
        InputError: no items, or not the same ones.
    """
    if len(before) != len(after):
        raise InputError(f"flips: expected the same items before and after, found {len(before)} and {len(after)}")
    return share(before & ~after)


def positive_flips(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Estimate:
    """Share of items, of all, that were wrong before and are right after; arguments and errors as of ``negative_flips``."""
    return negative_flips(after, before)


def over_refusal_change(patched: Retained, bare: Retained) -> Estimate:
    """Over-refusal of the patched less that of the bare model, over the same requests.

    Raises:
        InputError: it was left out for one of them.
    """
    if patched.over_refusal is None or bare.over_refusal is None:
        raise InputError("over-refusal was not measured", hint="set Sizes.num_requests")
    return paired_bootstrap_difference(patched.over_refusal.values, bare.over_refusal.values)
