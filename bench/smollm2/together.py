"""Pairs and benign texts with which the shipped patches were trained together, from what they had become one by one.

Trained one by one, they lost most of what they do beside the others (`edgepatch train-together`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.bench.lab import corpus
from edgepatch.bench.smollm2.pairs import REFUSAL_TEXT
from edgepatch.bench.smollm2.shipped import DOMAIN_OF
from edgepatch.prompts.sets import evenly
from edgepatch.training.frozen.forward import BenignText
from edgepatch.training.pairs.filtering import key_of
from edgepatch.training.pairs.preferences import Pair, PairPrompt, read_pairs, write_pairs
from edgepatch.training.pairs.prompt_files import read_prompts

PAIRS_OF = {"detox": ("own.jsonl", 480), "fairness": ("gender.jsonl", 320), "harm": ("harm.jsonl", 800)}
"""Patch -> its pairs, and how many of them are read: a step reads eight, and a run ends before it has seen more."""

TYPED_SHARE = 0.12
"""Of the prompts in capitals, and as many in small letters: the answer to a request does not depend on either."""

QUESTION_CHARACTERS, ANSWER_WORDS, NUM_PROBLEMS = 130, 25, 100


def question_texts(data: Path) -> list[str]:
    """Questions with short answers as plain texts, without a chat template.

    A patch whose benign texts were conversations and paragraphs lost 14 points of ARC-Easy, which asks in this form. None of these
    questions is from a set that patches are measured on.
    """
    asked = [(q, a) for q, a in corpus.instruction_split(data)[0] if q.endswith("?") and "\n" not in q]
    short = [(q, a) for q, a in asked if len(q) < QUESTION_CHARACTERS and len(a.split()) <= ANSWER_WORDS]
    problems = evenly(datasets.gsm8k_train(data), NUM_PROBLEMS)
    return [f"Question: {question}\nAnswer: {answer}" for question, answer in [*short, *problems]]


def typed(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, some prompts of which are in capitals or in small letters."""
    rng = random.Random("typed")
    forms = [
        rng.choices((str, str.upper, str.lower), (1 - 2 * TYPED_SHARE, TYPED_SHARE, TYPED_SHARE))[0] for _ in pairs
    ]
    return [replace(pair, prompt=_in_form(pair.prompt, form)) for pair, form in zip(pairs, forms, strict=True)]


def _in_form(prompt: PairPrompt, form: Callable[[str], str]) -> PairPrompt:
    if isinstance(prompt, str):
        return form(prompt)
    return tuple({**message, "content": form(message["content"])} for message in prompt)


def tasks_of(out: Path) -> dict[str, list[Pair]]:
    """Patch -> its pairs. Pronouns stay as they are written: in capitals the answers would be other tokens."""
    pairs = {name: evenly(read_pairs(out / file), count) for name, (file, count) in PAIRS_OF.items()}
    return {name: each if name == "fairness" else typed(each) for name, each in pairs.items()}


def benign_of(data: Path, out: Path) -> list[BenignText]:
    """Texts of every kind that is to stay as it is, each once."""
    files = [out / f"benign-{domain}.jsonl" for domain in DOMAIN_OF.values()]
    texts = [text for file in files for text in read_prompts(file).prompts]
    return list({key_of(text): text for text in [*texts, *answered(out)]}.values()) + question_texts(data)


def answered(out: Path) -> list[BenignText]:
    """Harmless requests and how the bare model begins to answer them.

    A preference is satisfied where the answer is likelier than the refusal by enough; alone, a patch that had been trained until it acts in
    company then declined every third request that looks harmful and is not. That the answer stays as likely as it was is what KL asks for.
    """
    return [
        (*pair.prompt, {"role": "assistant", "content": pair.chosen})
        for pair in read_pairs(out / PAIRS_OF["harm"][0])
        if pair.rejected == REFUSAL_TEXT and not isinstance(pair.prompt, str)
    ]


def write(data: Path, out: Path) -> None:
    """Writes ``together-NAME.jsonl`` and ``benign-together.jsonl``.

    Args:
        data: folder of the public data sets.
        out: pairs and benign texts of the patches, as ``make`` writes them.
    """
    for name, pairs in tasks_of(out).items():
        write_pairs(pairs, out / f"together-{name}.jsonl")
    write_texts(benign_of(data, out), out / "benign-together.jsonl")


def write_texts(texts: Iterable[PairPrompt], file: Path) -> None:
    """Texts and conversations, as ``train --benign`` reads them."""
    rows = [{"text": text} if isinstance(text, str) else {"messages": list(text)} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
