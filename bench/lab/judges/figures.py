"""Figures of a judge: area under the ROC curve, reliability, agreement."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_DRAWS = 1000


def area_under_curve(scores: NDArray[Any], toxic: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by the rank sum, ties shared."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
    positives = int(toxic.sum())
    return float((ranks[toxic].sum() - positives * (positives + 1) / 2) / (positives * (len(toxic) - positives)))


def auc_interval(scores: NDArray[Any], toxic: NDArray[np.bool_]) -> tuple[float, float, float]:
    """(AUC, low, high): percentile bootstrap over texts, 95 %."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(scores), len(scores)) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.quantile([area_under_curve(scores[d], toxic[d]) for d in draws], [0.025, 0.975])
    return area_under_curve(scores, toxic), float(low), float(high)


def reliability(scores: NDArray[Any], toxic: NDArray[np.bool_]) -> list[tuple[float, float, int, float, float]]:
    """(from, to, texts, mean score, share toxic) in ten equal bins of the score; empty bins are left out."""
    bins = np.minimum((scores * 10).astype(int), 9)
    table = []
    for k in range(10):
        inside = bins == k
        if inside.any():
            means = float(scores[inside].mean()), float(toxic[inside].mean())
            table.append((k / 10, (k + 1) / 10, int(inside.sum()), *means))
    return table


def kappa(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Cohen's kappa: agreement beyond what the two shares alone would give (Cohen 1960).

    Args:
        first, second: (N,) labels of any kind.

    Returns:
        1 for agreement everywhere, 0 for chance; 0 where both give one and the same label throughout, which says nothing.
    """
    observed = float((first == second).mean())
    labels = np.union1d(first, second)
    expected = float(sum((first == label).mean() * (second == label).mean() for label in labels))
    return (observed - expected) / (1 - expected) if expected < 1 else 0.0


def kappa_interval(first: NDArray[Any], second: NDArray[Any]) -> tuple[float, float, float]:
    """(kappa, low, high): percentile bootstrap over texts, 95 %."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(first), len(first)) for _ in range(BOOTSTRAP_DRAWS)]
    low, high = np.quantile([kappa(first[d], second[d]) for d in draws], [0.025, 0.975])
    return kappa(first, second), float(low), float(high)
