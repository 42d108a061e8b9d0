"""The demo's part of the evidence matrix: the bare and the patched model on every column, and what the two cost there.

Cells are planned, opened and measured as those of the evidence matrix; the demo adds times, for which both are loaded at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.columns import COMMON_GGUF_TYPES, ONNX_PRECISIONS, TORCH, Column, columns
from edgepatch.bench.evidence.cells import CellKey, EvidenceConfig, plan
from edgepatch.bench.evidence.measuring import Bench, Workplace, open_runtime
from edgepatch.bench.metrics import retention
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.retained import Sizes, benign_texts
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.progress import Progress, silent, stage, within
from edgepatch.runtimes.session import Session

DOMAIN, ARMS = "toxicity", ("bare", "patch")
TIMED_TOKENS, WARM_UP_TOKENS = 32, 4
REFERENCE_EXAMPLES, EXAMPLES = 8, 4
"""Of the reference column, and of each other."""

Raw = dict[str, Any]
Times = tuple[float, float]
"""(time to the first token in ms, decoded tokens per second)."""


def demo_columns() -> list[Column]:
    """What the demo measures; full precision first, which retention is compared with."""
    names = [TORCH.name, *(f"llamacpp {kind}" for kind in COMMON_GGUF_TYPES), *(f"onnx {p}" for p in ONNX_PRECISIONS)]
    return [column for name in names for column in columns() if column.name == name]


def demo_config(num_prompts: int, num_benign_texts: int, samples: SampleConfig) -> EvidenceConfig:
    """The evidence runner's settings for a demo: one training run, one domain, on the runtimes' own settings."""
    return EvidenceConfig(
        items={DOMAIN: (num_prompts,) * 3},
        retained=(Sizes(num_benign_texts, 0, 0),) * 2,
        rng_seeds=(1,),
        domains=(DOMAIN,),
        columns=tuple(column.name for column in demo_columns()),
        arms=ARMS,
        composition=False,
        samples=samples,
        measures=("safety", "retained"),
        routes=("stored",),
        num_sequences=1,
        context_length=None,
        num_texts_kept=num_prompts,
    )


def measure_demo(
    place: Workplace, config: EvidenceConfig, timing_repeats: int, progress: Progress = silent
) -> dict[str, Any]:
    """``cells``, ``retention`` and ``examples`` of the results document. A generation that failed counts as toxic, never as safe.

    Args:
        place: holds the files of all columns of the base, and the patch.
        config: of ``demo_config``.
        timing_repeats: timings of bare and patched, in turn; the median counts.
        progress: told of every cell, and of the prompts of one.

    Raises:
        EdgepatchError: a model cannot be loaded with the patch, or gives NaN.
    """
    document: dict[str, Any] = {"cells": [], "retention": [], "examples": []}
    gain_at_full_precision: NDArray[np.float64] | None = None
    for column in demo_columns():
        keys = [key for key in plan(config) if key.column == column.name]
        cells = _measure_cells(place, config, keys, progress)
        with stage(progress, f"time {column.name}"):
            times = _measure_times(place, config, keys, timing_repeats)
        bare, patched = (cells["safety", arm] for arm in ARMS)
        gain = np.array(bare["values"]) - np.array(patched["values"])
        is_reference = gain_at_full_precision is None
        gain_at_full_precision = gain if gain_at_full_precision is None else gain_at_full_precision
        document["cells"] += [_cell(column, arm, cells, times[arm]) for arm in ARMS]
        document["retention"].append(_retention(column, gain, gain_at_full_precision))
        document["examples"] += _examples(column, bare, patched, REFERENCE_EXAMPLES if is_reference else EXAMPLES)
    return document


def _measure_cells(
    place: Workplace, config: EvidenceConfig, keys: Sequence[CellKey], progress: Progress
) -> dict[tuple[str, str], Raw]:
    """(measure, arm) -> raw result of the cells of one column."""
    cells, column = dict[tuple[str, str], Raw](), keys[0].column
    bench = Bench(place, config, within(progress, column))
    progress(column, 0, len(keys))
    try:
        for done, key in enumerate(keys, 1):
            cells[key.measure, key.arm] = bench.measure(key)
            progress(column, done, len(keys))
    finally:
        bench.close()
    return cells


# Times.


def _measure_times(place: Workplace, config: EvidenceConfig, keys: Sequence[CellKey], repeats: int) -> dict[str, Times]:
    """Medians of each arm of a column; both are loaded and take turns, after one warm-up each."""
    prompts = benign_texts(place.data, config.sizes(keys[0]).num_texts)
    with ExitStack() as stack:
        runtimes = {
            key.arm: stack.enter_context(open_runtime(place, key, config)) for key in keys if key.measure == "safety"
        }
        for runtime in runtimes.values():
            time_once(runtime, prompts[0], WARM_UP_TOKENS)
        times: dict[str, list[Times]] = {arm: [] for arm in ARMS}
        for repeat in range(repeats):
            for arm in ARMS:
                times[arm].append(time_once(runtimes[arm], prompts[repeat % len(prompts)], TIMED_TOKENS))
    medians = {arm: np.median(np.array(rows), axis=0) for arm, rows in times.items()}
    return {arm: (float(ttft_ms), float(rate)) for arm, (ttft_ms, rate) in medians.items()}


def time_once(runtime: Session, prompt: str, num_tokens: int) -> Times:
    """Times of one greedy reply of fixed length, from a cold prompt cache."""
    runtime.reset()
    began = time.perf_counter()
    pieces = runtime.stream(prompt, Sampling.plain(max_new_tokens=num_tokens, temperature=0, ignore_end_tokens=True))
    next(pieces)
    first = time.perf_counter()
    count = sum(1 for _ in pieces)
    seconds = time.perf_counter() - first
    return (first - began) * 1000, count / seconds


# Rows of the document.


def perplexity(raw: Raw) -> float:
    """exp of the mean negative log-likelihood per token, of a raw result of "retained".

    Raises:
        InputError: there is no token to predict, or the model gave NaN.
    """
    total, count = sum(raw["nll"]), sum(raw["num_tokens"])
    if not count or not math.isfinite(total):
        raise InputError(
            f"perplexity of {len(raw['nll'])} texts: expected a finite value, found {total} over {count} tokens"
        )
    return math.exp(total / count)


def _cell(column: Column, arm: str, cells: Mapping[tuple[str, str], Raw], times: Times) -> dict[str, Any]:
    safety = cells["safety", arm]
    emt, emt_low, emt_high = safety["figures"]["expected_max_toxicity"]
    probability, low, high = safety["figures"]["toxicity_probability"]
    return {
        "runtime": column.runtime,
        "quantization": column.quantization,
        "patched": arm == "patch",
        "emt": emt,
        "emt_low": emt_low,
        "emt_high": emt_high,
        "toxicity_probability": probability,
        "toxicity_probability_low": low,
        "toxicity_probability_high": high,
        "perplexity": perplexity(cells["retained", arm]),
        "ttft_ms": times[0],
        "decode_tokens_per_s": times[1],
        "num_prompts": len(safety["values"]),
        "failures": safety["failures"],
        "words_per_sample": safety["figures"].get("words_per_sample", [0.0])[0],
    }


def _retention(column: Column, gain: NDArray[np.float64], reference_gain: NDArray[np.float64]) -> dict[str, Any]:
    """Retention with its interval; all ``None`` where full precision shows no gain that could be retained."""
    none = (None, None, None)
    value, low, high = retention(gain, reference_gain) if reference_gain.mean() > 0 else none
    return {
        "runtime": column.runtime,
        "quantization": column.quantization,
        "retention": value,
        "retention_low": low,
        "retention_high": high,
    }


def _examples(column: Column, bare: Raw, patched: Raw, count: int) -> list[dict[str, Any]]:
    """The most toxic bare continuation of evenly spaced prompts beside the patched one's most toxic."""
    score, rows = ToxicityScorer.load("report").score, []
    pairs = list(zip(bare["texts"], patched["texts"], strict=True))
    for place in np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int):
        one, other = pairs[place]
        if not one["texts"] or not other["texts"]:
            continue
        rows.append(
            {
                "prompt": one["item"],
                "bare": one["texts"][int(score(one["texts"]).argmax())],
                "patched": other["texts"][int(score(other["texts"]).argmax())],
                "bare_score": one["value"],
                "patched_score": other["value"],
                "runtime": column.runtime,
                "quantization": column.quantization,
            }
        )
    return rows
