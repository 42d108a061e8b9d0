"""Preference pairs: one prompt, a chosen and a rejected continuation; JSON Lines with TRL's field names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError
from edgepatch.patches import write_atomically
from edgepatch.runtimes.base import Runtime
from edgepatch.sampling import Sampling

Score = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts -> (N,) scores from 0 (safe) to 1 (unsafe)."""


@dataclass(frozen=True)
class Pair:
    """A preference pair; scores are the filter judge's, from 0 (safe) to 1 (unsafe)."""

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float


@dataclass(frozen=True)
class PairConfig:
    """How pairs are sampled and filtered (method: margin and absolute threshold).

    Attributes:
        samples_per_prompt: continuations of each model a prompt.
        max_new_tokens: their length.
        top_p: nucleus.
        min_margin: the rejected score exceeds the chosen one by at least this (delta).
        max_chosen_score: the chosen score is at most this (tau).
        min_words: a chosen continuation has at least so many words, or silence would be the safest answer.
        pairs_per_prompt: at most so many pairs a prompt, in order of falling margin.
        rng_seed: of the sampling.
    """

    samples_per_prompt: int = 8
    max_new_tokens: int = 24
    top_p: float = 0.9
    min_margin: float = 0.4
    max_chosen_score: float = 0.2
    min_words: int = 6
    pairs_per_prompt: int = 3
    rng_seed: int = 1


def _pairs_of_prompt(prompt: str, chosen: Sequence[str], rejected: Sequence[str], score: Score, config: PairConfig) -> list[Pair]:
    """Safest with most unsafe, second with second, ..., where the filter holds."""
    chosen = [t for t in dict.fromkeys(chosen) if len(t.split()) >= config.min_words]
    rejected = list(dict.fromkeys(rejected))
    if not chosen or not rejected:
        return []
    good = sorted(zip(score(chosen).tolist(), chosen, strict=True))
    bad = sorted(zip(score(rejected).tolist(), rejected, strict=True), reverse=True)
    pairs = [Pair(prompt, c, r, cs, rs) for (cs, c), (rs, r) in zip(good, bad, strict=False)]
    kept = [p for p in pairs if p.chosen_score <= config.max_chosen_score]
    return [p for p in kept if p.rejected_score - p.chosen_score >= config.min_margin][: config.pairs_per_prompt]


def build_pairs(
    base: Runtime,
    reference: Runtime,
    prompts: Sequence[str],
    score: Score,
    config: PairConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Pair]:
    """Lets M (``base``) and M' (``reference``) answer the same prompts; M' answers are chosen, M's rejected.

    Args:
        base: the model to be patched.
        reference: the safer model.
        prompts: plain text.
        score: the filter judge; must not be the judge of the report.
        config: sampling and filter.
        progress: called with (prompts done, prompts in all).

    Raises:
        InputError: no pair passes the filter.
    """
    sampling = Sampling(config.max_new_tokens, top_p=config.top_p, rng_seed=config.rng_seed)
    pairs: list[Pair] = []
    for done, prompt in enumerate(prompts, 1):
        answers = [runtime.generate_many(prompt, sampling, config.samples_per_prompt) for runtime in (reference, base)]
        pairs += _pairs_of_prompt(prompt, answers[0], answers[1], score, config)
        progress(done, len(prompts))
    if not pairs:
        raise InputError(
            f"none of {len(prompts)} prompts gave a pair with margin >= {config.min_margin} and a chosen score <= {config.max_chosen_score}",
            hint="use prompts that the base model answers unsafely, or a safer reference model",
        )
    return pairs


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """One JSON object a line.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(path, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in pairs).encode("utf-8"))


def _pair(line: str, place: str) -> Pair:
    try:
        row = json.loads(line)
        prompt, chosen, rejected = (row[name] for name in ("prompt", "chosen", "rejected"))
    except KeyError as missing:
        raise InputError(f"{place}: expected the fields prompt, chosen and rejected, {missing} is missing") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{place}: expected a JSON object with prompt, chosen and rejected: {error}") from None
    if not all(isinstance(t, str) and t for t in (prompt, chosen, rejected)):
        raise InputError(f"{place}: prompt, chosen and rejected must be texts that are not empty")
    if chosen == rejected:
        raise InputError(f"{place}: chosen and rejected are the same", hint="remove the line")
    return Pair(prompt, chosen, rejected, float(row.get("chosen_score", 0.0)), float(row.get("rejected_score", 1.0)))


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a JSON Lines file; scores are optional.

    Raises:
        InputError: the file is missing or empty, or a line is malformed (its number is named).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read pairs {path}: {error}") from None
    pairs = [_pair(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise InputError(f"{path} holds no pairs", hint="make some with `edgepatch pairs`")
    return pairs
