"""Trains the semantic judges: four small heads on frozen sentence embeddings.

    edgepatch bench judges --semantic --data DIR

Needs scikit-learn, torch and the package of the embedding model. The heads of a purpose share no training row with those of the other one, nor
with its lexical judge: toxicity goes by the very rows of the lexical judges, answers by ``answer_rows``. How much a head is regularised
is chosen on a held-out fifth of its own training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.lab.judges.answer_rows import Answer, answer_rows
from edgepatch.bench.lab.judges.figures import area_under_curve
from edgepatch.bench.lab.judges.rows import Rows, as_rows, training_rows
from edgepatch.bench.lab.judges.training import FOLDS, fit_calibration
from edgepatch.files.writing import write_atomically
from edgepatch.judges.embeddings import SentenceEmbedder, embedding_digest, shared_embedder
from edgepatch.judges.heads import Head, head_bytes
from edgepatch.judges.semantic import ANSWER_CLASSES, SEMANTIC, Purpose, answer_features
from edgepatch.progress import Progress, silent, stage
from edgepatch.prompts.sets import evenly

PURPOSES: tuple[Purpose, ...] = ("report", "filter")
PENALTIES = (0.1, 0.3, 1.0, 3.0)
MAX_STEPS = 200
MOST_OTHERS = 2000
"""Rows of a source that counts little in the loss; embedding more of them takes long and adds next to nothing."""


def standardised(features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """(features of mean 0 and variance 1, mean, standard deviation)."""
    mean, deviation = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    return (features - mean) / deviation, mean, deviation


def fit(
    features: NDArray[np.float32], target: NDArray[np.float64], weight: NDArray[np.float64], penalty: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Multinomial logistic regression on soft targets, with an L2 penalty, by L-BFGS.

    scikit-learn's takes hard labels alone; every row would stand twice, and the rows are what takes the time.

    Args:
        features: (N, F), standardised.
        target: (N, C), the probability of each class; with C = 1, of the only one.
        weight: (N,), in the loss.
        penalty: half of it times the squared weights, beside the mean loss.

    Returns:
        (weights (F, C), bias (C,)).
    """
    from scipy.optimize import minimize

    columns, share = target.shape[1], weight / weight.sum()

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        parameters = flat.reshape(-1, columns)
        logits = (features @ parameters[:-1].astype(np.float32)).astype(np.float64) + parameters[-1]
        log_total, chances = _normalised(logits)
        value = float(share @ (log_total - (target * logits).sum(axis=1))) + penalty / 2 * (parameters[:-1] ** 2).sum()
        error = (chances - target) * share[:, None]
        slope = np.vstack([features.T @ error.astype(np.float32), error.sum(axis=0)])
        slope[:-1] += penalty * parameters[:-1]
        return value, slope.ravel()

    start = np.zeros((features.shape[1] + 1) * columns)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS}).x.reshape(-1, columns)
    return best[:-1], best[-1]


def _normalised(logits: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(log of the total odds (N,), probabilities (N, C)): the softmax, or for one class the sigmoid."""
    if logits.shape[1] == 1:
        return np.logaddexp(0, logits[:, 0]), 1 / (1 + np.exp(-np.clip(logits, -50, 50)))
    top = logits.max(axis=1, keepdims=True)
    odds = np.exp(logits - top)
    return np.log(odds.sum(axis=1)) + top[:, 0], odds / odds.sum(axis=1, keepdims=True)


def in_fold(
    features: NDArray[np.float32],
    target: NDArray[np.float64],
    weight: NDArray[np.float64],
    mine: NDArray[np.bool_],
    penalty: float,
) -> NDArray[np.float64]:
    """(M, C) decision values of the M rows of a fold, by a model that has not read it."""
    weights, bias = fit(features[~mine], target[~mine], weight[~mine], penalty)
    values: NDArray[np.float64] = features[mine] @ weights + bias
    return values


def train_toxicity(name: str, rows: Rows, embedder: SentenceEmbedder) -> Head:
    """The head of toxicity, calibrated on out-of-fold values as the lexical judges are (Platt)."""
    features, mean, deviation = standardised(embedder.features(rows.texts))
    target, fold = rows.target[:, None], rows.group // 7919 % FOLDS
    toxic = rows.target > 0.5
    first = fold == 0
    counts = rows.calibrates[first]

    def held_out_auc(penalty: float) -> float:
        values = in_fold(features, target, rows.weight, first, penalty)[:, 0]
        return area_under_curve(values[counts], toxic[first][counts])

    best = max(PENALTIES, key=held_out_auc)
    values = np.zeros(len(toxic))
    for k in range(FOLDS):
        values[fold == k] = in_fold(features, target, rows.weight, fold == k, best)[:, 0]
    slope, intercept = fit_calibration(values[rows.calibrates], toxic[rows.calibrates])
    weights, bias = fit(features, target, rows.weight, best)
    return folded(name, ("toxic",), slope * weights, slope * bias + intercept, mean, deviation)


def folded(
    name: str,
    classes: tuple[str, ...],
    weights: NDArray[np.float64],
    bias: NDArray[np.float64],
    mean: NDArray[np.float32],
    deviation: NDArray[np.float32],
) -> Head:
    """The head on features as they come: standardisation is part of its weights."""
    scaled = weights / deviation[:, None]
    shift = bias - mean.astype(np.float64) @ scaled
    return Head(name, classes, embedding_digest(), scaled.astype(np.float32), shift.astype(np.float32))


def train_answers(name: str, rows: Sequence[Answer], embedder: SentenceEmbedder) -> Head:
    """The head of answers; no request of the held-out fifth is in the rest."""
    raw = answer_features(embedder, [row.request for row in rows], [row.reply for row in rows])
    features, mean, deviation = standardised(raw)
    target = np.array([[float(row.verdict.value == kind) for kind in ANSWER_CLASSES] for row in rows])
    place = {request: i for i, request in enumerate(sorted({row.request for row in rows}))}
    first = np.array([place[row.request] % FOLDS == 0 for row in rows])
    weight = np.ones(len(rows))
    losses = {p: _loss(in_fold(features, target, weight, first, p), target[first]) for p in PENALTIES}
    weights, bias = fit(features, target, weight, min(losses, key=lambda p: losses[p]))
    return folded(name, ANSWER_CLASSES, weights, bias, mean, deviation)


def _loss(logits: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """Mean negative log-likelihood."""
    log_total, _ = _normalised(logits)
    return float((log_total - (target * logits).sum(axis=1)).mean())


def toxicity_rows(folder: Path) -> dict[str, dict[str, list[tuple[str, float, int]]]]:
    """Purpose -> source -> rows of the lexical judge of that purpose, fewer of the sources that count little."""
    return {
        purpose: {
            source: list(rows) if source == "RealToxicityPrompts" else evenly(rows, MOST_OTHERS)
            for source, rows in sources.items()
        }
        for purpose, sources in training_rows(folder).items()
    }


def run(data: Path, out: Path, progress: Progress = silent) -> list[Path]:
    """Trains and writes the four heads.

    Args:
        data: folder of the data sets.
        out: folder for the heads.
        progress: told of every stage.

    Returns:
        Their files.

    Raises:
        InputError: a data file or the embedding model is missing.
        MissingExtraError: torch or transformers is not installed.
    """
    embedder, heads = shared_embedder(), list[Head]()
    toxicity, answers = toxicity_rows(data), answer_rows(data)
    for purpose in PURPOSES:
        with stage(progress, f"toxicity, {purpose}"):
            heads.append(train_toxicity(f"{SEMANTIC}-toxicity-{purpose}", as_rows(toxicity[purpose]), embedder))
        with stage(progress, f"answers, {purpose}"):
            heads.append(train_answers(f"{SEMANTIC}-answers-{purpose}", answers[purpose], embedder))
    files = [out / f"{head.name}.safetensors" for head in heads]
    for file, head in zip(files, heads, strict=True):
        write_atomically(file, head_bytes(head))
    return files
