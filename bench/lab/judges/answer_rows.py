"""What the two semantic judges of answers are trained on; they share no request, no reply and no wording of a refusal.

Only data that may ship: AdvBench's training requests with their affirmative openings, instructions with their answers, replies of HH-RLHF, and
continuations by instructed models that decline. Which replies of the last two are refusals is told by the string rules, where these are
sure: the judge learns what else refusals have in common. What fails is made from the other replies: of another request, with the words
thrown about, going round in circles, or saying the request again.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.bench.lab.corpus import advbench_split, harmless_split, instruction_split, phrase_request
from edgepatch.bench.lab.judges.refusal_texts import REFUSALS
from edgepatch.judges.refusals import declines, is_refusal
from edgepatch.judges.scorers import normalize
from edgepatch.judges.semantic import Purpose, Verdict
from edgepatch.prompts.sets import evenly

SHORTEST, LONGEST = 8, 60
"""Words that an answer is cut to: what models are asked for is short, and often cut off."""

LONGEST_REQUEST = 300
"""Characters."""

MOST_INSTRUCTIONS = 800
MOST_DIALOGUES = 400
REFUSALS_A_REQUEST = 3


@dataclass(frozen=True)
class Answer:
    """A reply to a request, and what it does with it."""

    request: str
    reply: str
    verdict: Verdict


def is_mine(request: str, purpose: Purpose) -> bool:
    """Whether the rows of a request belong to the judge of this purpose: a hash says so."""
    return (zlib.crc32(request.strip().lower().encode(), 78) // 1000 % 2 == 0) == (purpose == "report")


def cut(text: str, rng: random.Random) -> str:
    """The first words of a text, so many as are drawn."""
    return " ".join(text.split()[: rng.randint(SHORTEST, LONGEST)])


def broken(request: str, reply: str, others: Sequence[str], rng: random.Random) -> str:
    """One way of failing to answer a request."""
    words = reply.split()
    kind = rng.randrange(4)
    if kind == 0:
        return cut(rng.choice(others), rng)
    if kind == 1:
        return " ".join(rng.sample(words, len(words)))
    if kind == 2:
        phrase = words[: rng.randint(2, 8)]
        return " ".join((phrase * 12)[: rng.randint(SHORTEST, LONGEST)])
    return f"{request} {' '.join(words[: rng.randint(0, 4)])}".strip()


def _harmful(folder: Path, purpose: Purpose, rng: random.Random) -> Iterator[Answer]:
    """AdvBench's training requests, refused in our words and complied with in its own."""
    for goal, target in advbench_split(folder)[0]:
        if is_mine(goal, purpose):
            lower = goal[0].lower() + goal[1:].rstrip(".")
            for refusal in rng.sample(REFUSALS[purpose], REFUSALS_A_REQUEST):
                yield Answer(phrase_request(goal, rng), refusal.format(request=lower), Verdict.REFUSAL)
            yield Answer(phrase_request(goal, rng), target, Verdict.COMPLIANCE)


def _instructions(folder: Path, purpose: Purpose, rng: random.Random) -> Iterator[Answer]:
    """Harmless requests with their answers, every fourth refused: what is refused does not make the refusal."""
    rows = [(q, a) for q, a in (*harmless_split()[0], *instruction_split(folder)[0]) if is_mine(q, purpose)]
    rows = [(q, a) for q, a in rows if len(q) <= LONGEST_REQUEST]
    for number, (request, answer) in enumerate(evenly(rows, MOST_INSTRUCTIONS)):
        yield Answer(request, cut(answer, rng), Verdict.COMPLIANCE)
        if number % 4 == 0:
            first = request.splitlines()[0].rstrip(".?")
            refusal = rng.choice(REFUSALS[purpose]).format(request=first[0].lower() + first[1:])
            yield Answer(request, refusal, Verdict.REFUSAL)


def _dialogues(folder: Path, purpose: Purpose, rng: random.Random) -> Iterator[Answer]:
    """Last turns of HH-RLHF: replies that both string rules call a refusal, or that decline; and rejected ones that do neither."""
    kept = 0
    for chosen, rejected in datasets.hh_harmless(folder):
        for messages, is_chosen in ((chosen, True), (rejected, False)):
            request, reply = messages[-2]["content"], messages[-1]["content"]
            if not reply or not 0 < len(request) <= LONGEST_REQUEST or not is_mine(request, purpose):
                continue
            if declines(reply) and len(reply.split()) < LONGEST:
                yield Answer(request, reply, Verdict.REFUSAL)
            elif not is_chosen and not is_refusal(reply) and kept < MOST_DIALOGUES:
                kept += 1
                yield Answer(request, cut(reply, rng), Verdict.COMPLIANCE)


def _declined_continuations(folder: Path, purpose: Purpose, rng: random.Random) -> Iterator[Answer]:
    """Instructed models that were to continue a toxic text and declined."""
    for row in datasets.instructed_continuations(folder):
        if is_mine(row.prompt, purpose) and is_refusal(row.text) and declines(row.text):
            yield Answer(row.prompt, cut(row.text, rng), Verdict.REFUSAL)


def answer_rows(folder: Path) -> dict[Purpose, list[Answer]]:
    """Purpose -> training rows; a reply that stands in the rows of both is left to the judge that reports."""
    rows: dict[Purpose, list[Answer]] = {}
    taken: set[str] = set()
    purposes: tuple[Purpose, ...] = ("report", "filter")
    for purpose in purposes:
        rows[purpose] = [row for row in _rows(folder, purpose) if normalize(row.reply).strip() not in taken]
        taken |= {normalize(row.reply).strip() for row in rows[purpose]}
    return rows


def _rows(folder: Path, purpose: Purpose) -> list[Answer]:
    """Every reply once, and of each answer one way to fail."""
    rng = random.Random(f"answers-{purpose}")
    sources = (_harmful, _instructions, _dialogues, _declined_continuations)
    rows = [row for source in sources for row in source(folder, purpose, rng)]
    rows = list({(row.request, row.reply): row for row in rows if row.reply.strip()}.values())
    answered = [row for row in rows if row.verdict is Verdict.COMPLIANCE and len(row.reply.split()) >= SHORTEST]
    others = [row.reply for row in answered]
    return rows + [
        Answer(row.request, broken(row.request, row.reply, others, rng), Verdict.FAILURE) for row in answered
    ]
