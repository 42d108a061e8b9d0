"""Preference pairs for SmolLM2 from public data that may be trained on, and from what it says itself, without a second model."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edgepatch.bench import datasets
from edgepatch.bench.lab import corpus
from edgepatch.bench.safety import gender_prompts
from edgepatch.bench.safety.harm import chat, evaluation_requests, harmless_requests, replies
from edgepatch.judges.refusals import is_refusal
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.prompts.overlaps import distinct_from
from edgepatch.prompts.sets import evenly, load_prompts
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.preferences import Pair, PairConfig, filter_pairs, score_pairs

MOST_WORDS = 40
"""Of an answer: about sixty tokens; the models of the data wrote up to three hundred."""

REFUSAL = re.compile(
    r"\b(I'm sorry|I am sorry|I apologi[sz]e|as an AI|I cannot|I can't|inappropriate)\b", re.IGNORECASE
)
"""A patch that learns to refuse on prompts that only need a kinder word would refuse elsewhere, too."""


def toxicity_pairs(data: Path) -> list[Pair]:
    """Continuations of challenging prompts: a clean model's against one that was told to be rude, where the filter judge agrees.

    Args:
        data: folder of the public data sets.
    """
    clean, rude = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for each in datasets.instructed_continuations(data):
        text = " " + " ".join(each.text.split()[:MOST_WORDS])
        is_clean = each.source in datasets.CLEAN_SOURCES
        if not (is_clean and REFUSAL.search(text)):
            (clean if is_clean else rude)[each.prompt].append(text)
    candidates = [
        Pair(prompt, c, r, 0.0, 1.0) for prompt in clean for c, r in zip(clean[prompt], rude[prompt], strict=False)
    ]
    scored = score_pairs(candidates, ToxicityScorer.load("filter").score)
    return filter_pairs(scored, PairConfig(pairs_per_prompt=2)).pairs


NUM_GENDER_PAIRS = 640
STEREOTYPED_SHARE = 0.75
"""Of the rejected answers; the others have the pronoun of the other gender, or the way to please would be to swap them."""


def gender_pairs(data: Path | None) -> list[Pair]:
    """Training occupations in training templates: "they" against "he" or "she".

    An answer is the pronoun alone: whatever stands behind it is the same on both sides, and dilutes what a step teaches.

    Args:
        data: folder of the public data sets; ``None`` takes the occupations that ship with edgepatch.
    """
    rng, pairs = random.Random("gender"), list[Pair]()
    for prompt in gender_prompts.training_prompts(data)[:NUM_GENDER_PAIRS]:
        is_male = (prompt.gender > 0) == (rng.random() < STEREOTYPED_SHARE)
        pairs.append(Pair(prompt.text, " they", " he" if is_male else " she", 0.0, 1.0))
    return pairs


NUM_KNOWN_GENDER_PAIRS = 120


def known_gender_pairs() -> list[Pair]:
    """People whose gender the text tells: their pronoun, against "they" and in turn against the other one.

    A patch that has read none of these says "they" of every third grandmother.
    """
    pairs = list[Pair]()
    for index, prompt in enumerate(evenly(gender_prompts.known_gender_prompts("train"), NUM_KNOWN_GENDER_PAIRS)):
        right, other = (" he", " she") if prompt.gender > 0 else (" she", " he")
        pairs.append(Pair(prompt.text, right, other if index % 2 else " they", 0.0, 1.0))
    return pairs


NUM_INSTRUCTIONS = 240
QUESTIONS = Path(__file__).parent / "questions.jsonl"
"""Harmful questions, each with a harmless one in the same words; written for this project."""

LONGEST_REQUEST = 160
"""Characters; a step takes as long as its longest request."""

OPENING_WORDS = 8
"""Of the answers to requests. Whether to refuse is decided in the first words; what stands behind them dilutes what a step teaches."""

REFUSAL_TEXT = "I'm sorry, but I can't help with that."


def harm_pairs(data: Path | None, runtime: Session) -> list[Pair]:
    """Harmful requests: the opening of a refusal against that of the model's own reply; harmless requests the other way round.

    What the model would never say, such as AdvBench's "Sure, here is ...", teaches nothing: a patch that was trained against that refused
    0 of 24 requests. That the model's own answers to harmless requests are the better ones keeps its behaviour there. Our own requests come
    in twins that share their words, so that words alone do not tell them apart. None is like a request that patches are measured on.

    Args:
        data: folder of the public data sets; ``None`` takes the requests that ship with edgepatch.
        runtime: the bare model.
    """
    rng = random.Random("harm")
    harmful = unlike([request for _, request in evaluation_requests(data)], _twins("harmful"))
    tasks = [*unlike(harmless_requests(data), _twins("harmless")), *(task for task, _ in corpus.harmless_split()[0])]
    instructions = list[str]()
    if data is not None:
        harmful += [goal for goal, _ in corpus.advbench_split(data)[0]]
        split = [request for request, _ in evenly(corpus.instruction_split(data)[0], NUM_INSTRUCTIONS)]
        instructions = [request for request in split if len(request) <= LONGEST_REQUEST]
    harmful = [_as_asked(request, rng) for request in harmful]
    harmless = [*(_as_asked(request, rng) for request in tasks), *instructions]
    pairs = list[Pair]()
    for request, reply in zip([*harmful, *harmless], replies(runtime, [*harmful, *harmless]), strict=True):
        own, is_harmful = " ".join(reply.split()[:OPENING_WORDS]), len(pairs) < len(harmful)
        chosen, rejected = (REFUSAL_TEXT, own) if is_harmful else (own, REFUSAL_TEXT)
        pairs.append(Pair(chat(request), chosen, rejected, 0.0, 1.0))
    # Where the model itself refuses, both sides are refusals, and teach nothing.
    return [pair for pair in pairs if not (is_refusal(pair.chosen) and is_refusal(pair.rejected))]


def _twins(kind: Literal["harmful", "harmless"]) -> list[str]:
    """Our own requests of one kind; each shares its words with one of the other kind."""
    questions = [json.loads(line)[kind] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return load_prompts("harm_requests" if kind == "harmful" else "harm_benign", "train") + questions


def unlike(measured: Sequence[str], requests: Sequence[str]) -> list[str]:
    """Those that are like none that a patch is measured on."""
    return [request for request in requests if distinct_from(measured, [request])]


def _as_asked(request: str, rng: random.Random) -> str:
    """A question as it is, and an order in one of the ways people give it."""
    return request if request.endswith(("?", ".")) else corpus.phrase_request(request, rng)
