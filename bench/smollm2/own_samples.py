"""Preference pairs from SmolLM2's own continuations: its kindest ones against its rudest, for each training prompt.

Other models' continuations are told apart by their style after a few steps of DPO, which then learns little of rudeness.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.bench.safety.continuations import SampleConfig, sample_prompt
from edgepatch.judges.refusals import is_coherent
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.preferences import Pair

SAMPLES = SampleConfig(samples_per_prompt=8, max_new_tokens=20, rng_seed=7)
PAIRS_PER_PROMPT = 3
MIN_MARGIN, MAX_CHOSEN = 0.3, 0.2
FEWEST_WORDS = 5


@dataclass(frozen=True)
class Continued:
    """A prompt, what the bare model went on with, and the filter judge's scores."""

    prompt: str
    texts: list[str]
    scores: list[float]


def training_prompts(data: Path) -> list[str]:
    """Challenging prompts that may be trained on, in a random order that stays the same."""
    prompts = list(dict.fromkeys(each.prompt for each in datasets.instructed_continuations(data)))
    random.Random(1).shuffle(prompts)
    return prompts


def sample_own(runtime: Session, prompts: Sequence[str], journal: Path) -> Iterator[Continued]:
    """Continuations of the prompts that the journal does not hold yet; each is added to it.

    Args:
        runtime: the bare model, with room for ``SAMPLES.samples_per_prompt`` sequences.
        prompts: training prompts.
        journal: JSON Lines, one prompt a line.
    """
    score = ToxicityScorer.load("filter").score
    done = {each.prompt for each in read_own(journal)} if journal.exists() else set[str]()
    with journal.open("a", encoding="utf-8") as lines:
        for prompt in prompts:
            if prompt not in done:
                texts = sample_prompt(runtime, prompt, SAMPLES) or []
                continued = Continued(prompt, texts, [float(value) for value in score(texts)] if texts else [])
                lines.write(json.dumps(vars(continued)) + "\n")
                lines.flush()
                yield continued


def read_own(journal: Path) -> list[Continued]:
    """What ``sample_own`` has kept."""
    return [Continued(**json.loads(line)) for line in journal.read_text(encoding="utf-8").splitlines()]


def own_pairs(continued: Sequence[Continued]) -> list[Pair]:
    """The kindest whole continuations against the rudest, in turn; none of a prompt that has only one sort."""
    pairs = list[Pair]()
    for each in continued:
        scored = sorted(zip(each.scores, each.texts, strict=True))
        kind = [(s, t) for s, t in scored if s <= MAX_CHOSEN and is_coherent(t) and len(t.split()) >= FEWEST_WORDS]
        rude = [(s, t) for s, t in reversed(scored) if s > MAX_CHOSEN + MIN_MARGIN]
        count = min(PAIRS_PER_PROMPT, max(len(kind), len(rude))) if kind and rude else 0
        for (low, good), (high, bad) in islice(zip(cycle(kind), cycle(rude)), count):
            pairs.append(Pair(each.prompt, good, bad, low, high))
    return pairs
