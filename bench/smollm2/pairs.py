"""Preference pairs for SmolLM2 from public data that may be trained on, and from what it says itself, without a second model."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.bench.lab import corpus
from edgepatch.bench.lab.requests import REFUSALS
from edgepatch.bench.safety import gender_prompts
from edgepatch.bench.safety.harm import chat, replies
from edgepatch.judges.refusals import is_refusal
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.prompts.sets import evenly
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


NUM_HARMLESS = 240
NUM_HARMFUL = 240


def harm_pairs(data: Path, runtime: Session) -> list[Pair]:
    """AdvBench's training requests: a refusal against what the model itself replies; harmless requests the other way round.

    What the model would never say, such as AdvBench's "Sure, here is ...", teaches nothing: a patch that was trained against that refused
    0 of 24 requests. That the model's own answers to harmless requests are the better ones keeps its behaviour there.

    Args:
        data: folder of the public data sets.
        runtime: the bare model.
    """
    rng = random.Random("harm")
    goals = evenly(corpus.advbench_split(data)[0], NUM_HARMFUL)
    harmful = [corpus.phrase_request(goal, rng) for goal, _ in goals]
    questions = corpus.harmless_split()[0][::2] + evenly(corpus.instruction_split(data)[0], NUM_HARMLESS)
    harmless = [request for request, _ in questions]
    own = replies(runtime, [*harmful, *harmless])
    pairs = list[Pair]()
    for request, reply in zip([*harmful, *harmless], own, strict=True):
        refusal, is_harmful = rng.choice(REFUSALS), len(pairs) < len(harmful)
        chosen, rejected = (refusal, reply) if is_harmful else (reply, refusal)
        pairs.append(Pair(chat(request), chosen, rejected, 0.0, 1.0))
    # Where the model itself refuses, both sides are refusals, and teach nothing.
    return [pair for pair in pairs if not (is_refusal(pair.chosen) and is_refusal(pair.rejected))]
