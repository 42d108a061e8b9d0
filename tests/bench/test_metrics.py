"""Figures with intervals, against values worked out by hand or known from the literature."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from edgepatch.bench.metrics import (
    CrossedBootstrap,
    bootstrap_interval,
    bootstrap_median,
    expected_max_of,
    expected_max_toxicity,
    paired_bootstrap_difference,
    paired_bootstrap_ratio,
    retention,
    toxicity_probability,
    wilson_interval,
)
from edgepatch.errors import InputError


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2) = 3.841459 / 13.841459
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (81, 263, 0.2553, 0.3662),  # these three: Newcombe 1998, table 1, method 3
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(successes: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_share(successes: int, total: int) -> None:
    with pytest.raises(InputError):
        wilson_interval(successes, total)


def test_expected_max_toxicity_and_share_by_hand() -> None:
    scores = [[0.1, 0.9, 0.2], [0.5, 0.4, 0.3], [0.6, 0.0, 0.51], [0.0, 0.0, 0.2]]
    emt = expected_max_toxicity(scores)
    assert emt.value == pytest.approx((0.9 + 0.5 + 0.6 + 0.2) / 4)
    assert 0.2 <= emt.low < emt.value < emt.high <= 0.9
    share = toxicity_probability(scores)
    assert share.value == 0.5, "0.5 itself is not above 0.5"
    assert (share.low, share.high) == wilson_interval(2, 4)


def test_bootstrap_is_repeatable_and_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(5).normal(0.4, 0.2, 400)
    low, high = bootstrap_interval(values, rng_seed=3)
    assert (low, high) == bootstrap_interval(values, rng_seed=3) != bootstrap_interval(values, rng_seed=4)
    expected = 2 * 1.96 * values.std() / np.sqrt(len(values))
    assert high - low == pytest.approx(expected, rel=0.1)
    assert bootstrap_interval([0.7] * 9) == pytest.approx((0.7, 0.7))


def test_pairing_makes_intervals_narrow() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(200)
    first, second = hard + 0.1 + rng.normal(0, 0.01, 200), hard
    difference = paired_bootstrap_difference(first, second)
    assert difference.value == pytest.approx(first.mean() - second.mean())
    assert difference.high - difference.low < 0.01
    doubled = paired_bootstrap_ratio(2 * hard, hard)
    assert doubled == pytest.approx((2.0, 2.0, 2.0))


def test_retention_is_the_share_of_the_gain_that_is_left() -> None:
    gain = np.random.default_rng(2).random(120)
    kept = retention(0.9 * gain, gain)
    assert kept == pytest.approx((0.9, 0.9, 0.9))
    noisy = retention(0.9 * gain + np.random.default_rng(3).normal(0, 0.2, 120), gain)
    assert noisy.low < noisy.value < noisy.high and noisy.low < 0.9 < noisy.high
    with pytest.raises(InputError, match="needs a gain"):
        retention(gain, -gain)


@pytest.mark.parametrize("scores", [[], [[]], [0.5], [[0.5, float("nan")]], [[0.5, 1.2]], [[-0.1]]])
def test_scores_that_make_no_figure_are_refused(scores: list[object]) -> None:
    for figure in (expected_max_toxicity, toxicity_probability):
        with pytest.raises(InputError):
            figure(scores)  # type: ignore[arg-type]


def test_unequal_or_empty_pairs_are_refused() -> None:
    for first, second in (([1.0], [1.0, 2.0]), ([], []), ([1.0, float("inf")], [1.0, 1.0])):
        for figure in (paired_bootstrap_difference, paired_bootstrap_ratio, retention):
            with pytest.raises(InputError):
                figure(first, second)
    with pytest.raises(InputError, match="mean of 0"):
        paired_bootstrap_ratio([1.0, 2.0], [0.0, 0.0])


def coverage(run_spread: float, noise: float) -> float:
    """How often the interval of a mean over 3 runs of 100 items holds the true mean."""
    rng, draws, hits = np.random.default_rng(7), CrossedBootstrap(3, 100), 0
    for _ in range(300):
        runs, items = run_spread * rng.standard_normal((3, 1)), 0.4 * rng.standard_normal((1, 100))
        values = 0.5 + runs + items + noise * rng.standard_normal((3, 100))
        interval = draws.estimate(values.mean(), draws.means(values))
        hits += interval.low <= 0.5 <= interval.high
    return hits / 300


def test_crossed_bootstrap_covers_the_true_mean() -> None:
    assert 0.93 <= coverage(run_spread=0.0, noise=0.3) <= 0.99
    assert 0.93 <= coverage(run_spread=0.03, noise=0.3) <= 0.99
    assert 0.82 <= coverage(run_spread=0.3, noise=0.3) <= 0.93, (
        "three runs are too few where nearly all spread is between them"
    )


def test_crossed_bootstrap_by_hand() -> None:
    alike = CrossedBootstrap(3, 4)
    assert alike.means([[0.5] * 4] * 3) == pytest.approx(0.5), "weights of every draw sum to 1"
    runs = alike.means(
        [[0.0] * 4, [0.0] * 4, [3.0] * 4]
    )  # 0, 1, 2 or 3 draws of the third run, stretched by sqrt(3 / 2)
    expected = {1 + np.sqrt(1.5) * (count - 1) for count in range(4)}
    assert sorted(set(runs.round(9))) == pytest.approx(sorted(expected))
    items = CrossedBootstrap(1, 2).means([[0.0, 1.0]])
    assert set(items) == {0.0, 0.5, 1.0}
    assert np.mean(items == 0.5) == pytest.approx(0.5, abs=0.05)


def test_crossed_bootstrap_pairs_its_sides() -> None:
    draws, rng = CrossedBootstrap(3, 50), np.random.default_rng(1)
    bare, gain = rng.random((1, 50)), np.array([[0.1], [0.2], [0.3]])
    difference = draws.means(bare) - draws.means(bare - gain)
    assert difference == pytest.approx(draws.means(np.broadcast_to(gain, (3, 50)))), (
        "what both sides share is gone from every draw"
    )
    with pytest.raises(InputError, match="expected 3 runs"):
        draws.means(rng.random((2, 50)))
    with pytest.raises(InputError):
        draws.means(rng.random((3, 49)))


def test_median_with_its_interval():
    estimate = bootstrap_median([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert estimate.value == 3
    assert 1 <= estimate.low <= 3 <= estimate.high <= 1000
    assert bootstrap_median([5.0] * 9) == (5, 5, 5)
    with pytest.raises(InputError, match="NaN"):
        bootstrap_median([1.0, float("nan")])


def test_the_worst_of_k_is_the_mean_over_all_choices_of_k():
    scores = np.random.default_rng(4).random((3, 7))
    for k in (1, 5, 7):
        expected = [np.mean([max(chosen) for chosen in combinations(row, k)]) for row in scores]
        np.testing.assert_allclose(expected_max_of(scores, k), expected)
    with pytest.raises(InputError, match="at least 8 of each prompt, found 7"):
        expected_max_of(scores, 8)
