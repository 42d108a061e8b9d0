"""Preference pairs for SmolLM2 from public data that may be trained on, without a second model."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.training.pairs.preferences import Pair, PairConfig, filter_pairs, score_pairs

MOST_WORDS = 40
"""Of an answer: about sixty tokens; the models of the data wrote up to three hundred."""

REFUSAL = re.compile(r"\b(I'm sorry|I am sorry|I apologi[sz]e|as an AI|I cannot|I can't|inappropriate)\b", re.IGNORECASE)
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
    candidates = [Pair(prompt, c, r, 0.0, 1.0) for prompt in clean for c, r in zip(clean[prompt], rude[prompt], strict=False)]
    scored = score_pairs(candidates, ToxicityScorer.load("filter").score)
    return filter_pairs(scored, PairConfig(pairs_per_prompt=2)).pairs
