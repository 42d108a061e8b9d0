"""Sampling: the rule by hand, the distribution, and the pairing of random numbers."""

import numpy as np
import pytest

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.sampling import Sampling, draw_token


def plain_draw(logits, sampling, uniform):
    """The rule in its plainest form: sort all, cut to top-k, cut to top-p, invert."""
    probabilities = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    order = np.argsort(-probabilities, kind="stable")[: sampling.top_k or None]
    cumulative = np.cumsum(probabilities[order])
    mass = cumulative[-1] if sampling.top_k else probabilities.sum()
    kept = min(int((cumulative < sampling.top_p * mass).sum()) + 1, len(order))
    return order[int((cumulative[: kept - 1] <= uniform * cumulative[kept - 1]).sum())]


@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.05, 0), (1.0, 1), (1.0, 40), (0.5, 400), (0.9, 9999)])
def test_draws_follow_the_rule(spread, top_p, top_k):
    rng = np.random.default_rng(5)
    sampling = Sampling(top_p=top_p, top_k=top_k, temperature=0.7)
    for round_number in range(40):
        logits = (rng.standard_normal(1000) * spread).astype(np.float32)
        uniform = np.random.default_rng(round_number).random()
        drawn = draw_token(logits, sampling, np.random.default_rng(round_number))
        if spread:
            assert drawn == plain_draw(logits, sampling, uniform)
        assert 0 <= drawn < 1000


def test_frequencies_are_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    rng = np.random.default_rng(1)
    counts = np.bincount([draw_token(logits, Sampling(), rng) for _ in range(20000)], minlength=4) / 20000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.012
    nucleus = {draw_token(logits, Sampling(top_p=0.75), rng) for _ in range(500)}
    assert nucleus == {0, 1}


def test_greedy_takes_the_best_and_still_advances_the_generator():
    logits = np.array([0, 3, 1], dtype=np.float32)
    one, two = np.random.default_rng(1), np.random.default_rng(1)
    assert draw_token(logits, Sampling(temperature=0), one) == 1
    two.random()
    assert one.random() == two.random()


def test_nan_logits_are_an_error_not_a_token():
    with pytest.raises(EdgepatchError, match="NaN"):
        draw_token(np.array([0, np.nan], dtype=np.float32), Sampling(), np.random.default_rng(1))


@pytest.mark.parametrize("wrong", [{"top_p": 0}, {"top_p": 1.1}, {"temperature": -1}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
