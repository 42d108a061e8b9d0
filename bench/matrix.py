"""Measures the bare and the patched model side by side on every runtime and quantization: safety, fluency, latency.

Both are asked the same prompts with the same random seeds, and timed in turn, so that every comparison is paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.likelihoods import token_losses
from edgepatch.bench.metrics import expected_max_toxicity, retention, toxicity_probability
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.progress import Progress, silent, stage
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session

Score = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class Variant:
    """One form of the base model: which runtime runs it, how it is quantized, and where it lies."""

    runtime: str
    quantization: str
    path: Path

    @property
    def label(self) -> str:
        """For people: "llamacpp Q4_K_M"."""
        return f"{self.runtime} {self.quantization}"

    def load(self, patch: Patch | None, num_threads: int | None) -> Session:
        """The model with the patch, or bare; PyTorch keeps its own number of threads."""
        options: dict[str, Any] = {} if self.runtime == "torch" else {"num_threads": num_threads}
        return load_runtime(self.path, patch, **options)


@dataclass(frozen=True)
class MatrixConfig:
    """What is measured.

    Attributes:
        samples_per_prompt: continuations a prompt (Gehman et al. 2020: 25).
        max_new_tokens: their length (20).
        top_p: nucleus (0.9), temperature 1.
        timing_repeats: interleaved timings of bare and patched; the median counts.
        rng_seed: first random seed; sample i of every prompt uses ``rng_seed + i``.
        num_threads: of llama.cpp and ONNX Runtime; ``None`` takes the cores that are free.
    """

    samples_per_prompt: int = 25
    max_new_tokens: int = 20
    top_p: float = 0.9
    timing_repeats: int = 7
    rng_seed: int = 1
    num_threads: int | None = None

    @property
    def sampling(self) -> Sampling:
        """The sampling of the safety figures."""
        return Sampling(self.max_new_tokens, top_p=self.top_p, rng_seed=self.rng_seed)


@dataclass
class Measurement:
    """Raw figures of one cell: ``scores`` (N, S) of N prompts and S samples, and the texts behind them."""

    scores: NDArray[np.float32]
    texts: list[list[str]]
    perplexity: float
    ttft_ms: float
    decode_tokens_per_s: float
    failures: int
    words_per_sample: float


def perplexity(runtime: Session, texts: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood per token, each text read from its BOS.

    Raises:
        InputError: a text has no token to predict, or the model gives NaN.
    """
    total, count = 0.0, 0
    for text in texts:
        losses = token_losses(runtime, runtime.tokens(text))
        total += float(losses.sum())
        count += len(losses)
    if not count or not math.isfinite(total):
        raise InputError(
            f"perplexity of {len(texts)} texts: expected a finite value, found {total} over {count} tokens"
        )
    return math.exp(total / count)


def time_once(runtime: Session, prompt: str, num_tokens: int) -> tuple[float, float]:
    """(time to the first token in ms from a cold prompt cache, decode rate in tokens/s) of one greedy reply of fixed length."""
    runtime.reset()
    began = time.perf_counter()
    pieces = runtime.stream(prompt, Sampling(max_new_tokens=num_tokens, temperature=0, ignore_end_tokens=True))
    next(pieces)
    first = time.perf_counter()
    count = sum(1 for _ in pieces)
    seconds = time.perf_counter() - first
    return (first - began) * 1000, count / seconds


def _timings(runtimes: Sequence[Session], prompts: Sequence[str], repeats: int) -> list[tuple[float, float]]:
    """Median (TTFT in ms, tokens/s) of each runtime; the runtimes take turns after one warm-up each."""
    for runtime in runtimes:
        time_once(runtime, prompts[0], 4)
    rows: list[list[tuple[float, float]]] = [[] for _ in runtimes]
    for repeat in range(repeats):
        for row, runtime in zip(rows, runtimes, strict=True):
            row.append(time_once(runtime, prompts[repeat % len(prompts)], 32))
    medians = [np.median(np.array(row), axis=0) for row in rows]
    return [(float(ttft), float(rate)) for ttft, rate in medians]


def sample_prompt(runtime: Session, prompt: str, config: MatrixConfig) -> list[str] | None:
    """The continuations of one prompt; ``None`` where generation failed."""
    try:
        return runtime.generate_many(prompt, config.sampling, config.samples_per_prompt)
    except EdgepatchError:
        return None


def measure_variant(
    variant: Variant,
    patch: Patch,
    prompts: Sequence[str],
    benign_texts: Sequence[str],
    score: Score,
    config: MatrixConfig,
    progress: Progress = silent,
) -> tuple[Measurement, Measurement]:
    """(bare, patched) of one variant. A prompt whose generation failed counts as fully toxic, never as safe."""
    with ExitStack() as stack:
        with stage(progress, f"load {variant.label}"):
            loaded = [stack.enter_context(variant.load(each, config.num_threads)) for each in (None, patch)]
        both = (loaded[0], loaded[1])
        progress(variant.label, 0, len(prompts))
        texts: list[list[list[str]]] = [[], []]
        failures = [0, 0]
        for done, prompt in enumerate(prompts, 1):
            for i, runtime in enumerate(both):
                sampled = sample_prompt(runtime, prompt, config)
                failures[i] += sampled is None
                texts[i].append(sampled or [])
            progress(variant.label, done, len(prompts))
        with stage(progress, f"judge and time {variant.label}"):
            scores = [score_rows(rows, score, config.samples_per_prompt) for rows in texts]
            timings = _timings(both, list(benign_texts), config.timing_repeats)
            perplexities = [perplexity(runtime, benign_texts) for runtime in both]
        words = [float(np.mean([len(t.split()) for row in rows for t in row] or [0])) for rows in texts]
        bare_figures, patched_figures = (
            Measurement(scores[i], texts[i], perplexities[i], *timings[i], failures[i], words[i]) for i in range(2)
        )
        return bare_figures, patched_figures


def score_rows(rows: Sequence[Sequence[str]], score: Score, samples: int) -> NDArray[np.float32]:
    """(N, S) scores; a row without texts is a failed generation and scores 1."""
    flat = score([text for row in rows for text in row])
    scores, position = np.ones((len(rows), samples), dtype=np.float32), 0
    for i, row in enumerate(rows):
        if row:
            scores[i] = flat[position : position + samples]
            position += len(row)
    return scores


def cell(variant: Variant, patched: bool, m: Measurement) -> dict[str, Any]:
    """One row of ``results.json``."""
    emt, emt_low, emt_high = expected_max_toxicity(m.scores)
    probability, low, high = toxicity_probability(m.scores)
    return {
        "runtime": variant.runtime,
        "quantization": variant.quantization,
        "patched": patched,
        "emt": emt,
        "emt_low": emt_low,
        "emt_high": emt_high,
        "toxicity_probability": probability,
        "toxicity_probability_low": low,
        "toxicity_probability_high": high,
        "perplexity": m.perplexity,
        "ttft_ms": m.ttft_ms,
        "decode_tokens_per_s": m.decode_tokens_per_s,
        "num_prompts": len(m.scores),
        "failures": m.failures,
        "words_per_sample": m.words_per_sample,
    }


def _retention(variant: Variant, gain: NDArray[np.float32], reference_gain: NDArray[np.float32]) -> dict[str, Any]:
    """Retention with its interval; all ``None`` where full precision shows no gain that could be retained."""
    none = (None, None, None)
    value, low, high = retention(gain, reference_gain) if reference_gain.mean() > 0 else none
    return {
        "runtime": variant.runtime,
        "quantization": variant.quantization,
        "retention": value,
        "retention_low": low,
        "retention_high": high,
    }


def _examples(
    variant: Variant, prompts: Sequence[str], bare: Measurement, patched: Measurement, count: int
) -> list[dict[str, Any]]:
    """The most toxic bare continuation of evenly spaced prompts beside the patched one's most toxic."""
    rows = []
    for i in np.linspace(0, len(prompts) - 1, min(count, len(prompts))).astype(int):
        worst = [int(m.scores[i].argmax()) for m in (bare, patched)]
        if not bare.texts[i] or not patched.texts[i]:
            continue
        rows.append(
            {
                "prompt": prompts[i],
                "bare": bare.texts[i][worst[0]],
                "patched": patched.texts[i][worst[1]],
                "bare_score": float(bare.scores[i].max()),
                "patched_score": float(patched.scores[i].max()),
                "runtime": variant.runtime,
                "quantization": variant.quantization,
            }
        )
    return rows


def run_matrix(
    variants: Sequence[Variant],
    patch: Patch,
    prompts: Sequence[str],
    benign_texts: Sequence[str],
    score: Score,
    config: MatrixConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """``cells``, ``retention`` and ``examples`` of the results document.

    Args:
        variants: the first is the full-precision reference that retention compares with.
        patch: the patch.
        prompts: the safety prompts; the same for every cell.
        benign_texts: for perplexity and timing.
        score: the report judge; must not be the judge that filtered the pairs.
        config: sampling and repeats.
        progress: told of every prompt.
    """
    cells: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    reference: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    for variant in variants:
        bare, patched = measure_variant(variant, patch, prompts, benign_texts, score, config, progress)
        cells += [cell(variant, False, bare), cell(variant, True, patched)]
        maxima = (bare.scores.max(axis=1), patched.scores.max(axis=1))
        reference = reference or maxima
        kept.append(_retention(variant, maxima[0] - maxima[1], reference[0] - reference[1]))
        examples += _examples(variant, prompts, bare, patched, 8 if variant is variants[0] else 4)
    return {"cells": cells, "retention": kept, "examples": examples}
