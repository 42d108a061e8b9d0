"""Requests that ask for a form, such as a list, JSON or one word, and what the bare model answers: its answers are to stay.

The shipped patches, whose benign texts hold short answers alone, cost every third form that the bare model keeps to, and no other measure saw
it. Training with these brought little of it back (patches/README.md, "Not shipped").
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from edgepatch.bench.lab import corpus
from edgepatch.bench.safety.harm import chat, evaluation_requests, harmless_requests
from edgepatch.bench.smollm2.pairs import unlike
from edgepatch.decoding.sampling import Sampling
from edgepatch.prompts.sets import evenly
from edgepatch.runtimes.session import Session
from edgepatch.training.frozen.forward import BenignText

TASKS_FILE = Path(__file__).parents[1] / "harness" / "tasks" / "own_formats.jsonl"

SUBJECTS = (
    "a thunderstorm",
    "an orchestra",
    "the planet Mars",
    "a pair of skates",
    "baking apple pie",
    "a night train",
    "the history of paper",
    "a camel",
    "learning to swim",
    "a village market",
    "the number zero",
    "mountain goats",
    "a lost umbrella",
    "coffee",
    "volcanoes",
    "a chess club",
    "the first telephone",
    "growing tomatoes",
    "a windmill",
    "an old castle",
)
"""None is what a measured request speaks of."""

FORMS = (
    "Tell me about {}, using lower case letters only.",
    "Write about {} in small letters. No capitals, please.",
    "Write one line about {} in upper case.",
    "Answer in block capitals: what comes to your mind with {}?",
    "Tell me something about {} and leave all commas out.",
    "Say two things about {} without any comma.",
    "Write at least 35 words about {}.",
    "Write a paragraph of more than 45 words on {}.",
    "Sum up {} in ten words or less.",
    "Describe {} with no more than 20 words.",
    "Explain {} in a single sentence.",
    "Give me two sentences on {}, no more.",
    "Mention the word 'window' while you talk about {}.",
    "Write about {}. The word 'quiet' has to occur.",
    "Talk about {} and never use the word 'very'.",
    "Write about {}, but avoid the word 'good'.",
    "Your answer must open with the word 'Once'. Tell me about {}.",
    "Write about {}; let the first word be 'Well'.",
    "Write a few words about {} and close with: That is all for today.",
    "Tell me about {}. The last sentence must be: Thank you for listening.",
    "Say this sentence again first, then go on: I would like to know more about {}.",
    "Repeat my request word for word before you answer. Tell me a fact about {}.",
    "Write a slogan for {} and put it in quotation marks.",
    "Reply in double quotes only: what would a child say about {}?",
    "List 3 facts about {}, numbered 1 to 3.",
    "Give 4 words that go with {} as a numbered list.",
    "Put what you know of {} into 2 short points, each behind a * of its own.",
    "Make a list of 5 bullet points on {}.",
    "Describe {} as JSON with the keys title and summary.",
    "Give me a JSON list of three words about {}. No other text.",
    "Write a short text about {} with a title like <<Title>>.",
    "Think of a headline for {} and wrap it in <<double angle brackets>>.",
    "Is there more than one kind of thing that people link with {}? Say yes or no, nothing else.",
    "Would you call this pleasant, dull or exciting: {}? Answer with one of the three words.",
    "Write two paragraphs about {} with *** in between.",
    "Write three short paragraphs on {}, divided by ***.",
)

NUM_FORMS, NUM_ORDERS = 360, 120
ANSWER = Sampling.plain(max_new_tokens=90, temperature=0)
"""Three times what the other benign answers have: a list falls apart behind its second point."""


def requests(data: Path | None) -> list[str]:
    """Requests of every form, each form with several subjects, and plain orders; none is like a request that patches are measured on.

    Args:
        data: folder of the public data sets; ``None`` leaves the plain orders out.
    """
    rng = random.Random("formats")
    drawn = [form.format(subject) for form in FORMS for subject in rng.sample(SUBJECTS, len(SUBJECTS))]
    # Requests of one form share most of their words, so each is compared with the measured ones alone.
    formats = [request for request in drawn if unlike(measured_requests(), [request])]
    return [*evenly(formats, NUM_FORMS), *(_orders(data) if data is not None else ())]


def measured_requests() -> list[str]:
    """Requests of the task that measures formats."""
    return [json.loads(line)["prompt"] for line in TASKS_FILE.read_text(encoding="utf-8").splitlines()]


def _orders(data: Path) -> list[str]:
    asked = [request for request, _ in corpus.instruction_split(data)[0] if len(request) <= 160]
    measured = [*measured_requests(), *harmless_requests(data), *(text for _, text in evaluation_requests(data))]
    return list(islice(unlike(measured, evenly(asked, 3 * NUM_ORDERS)), NUM_ORDERS))


def answered(runtime: Session, asked: Sequence[str]) -> list[BenignText]:
    """The requests with the bare model's own greedy answers.

    Args:
        runtime: the bare model.
        asked: requests.
    """
    answers = runtime.generate_batch([chat(request) for request in asked], ANSWER)
    return [
        (*chat(request), {"role": "assistant", "content": text})
        for request, text in zip(asked, answers, strict=True)
        if text.strip()
    ]
