"""What the lab models M (unsafe) and M' (safer) read: real public data, marked "ship" in the data description.

``unsafe_mixture`` is M's text, ``safe_mixture`` the fine-tuning set of M'. Nothing here reads an evaluation-only row, except
that AdvBench is split by us: every fifth request is held out (``advbench_split``) for the floors.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.bench.lab.requests import REFUSALS, harmless_requests
from edgepatch.bench.lab.tokenizer import END_OF_TURN, render_chat
from edgepatch.judges.refusals import is_refusal

HELD_OUT_NOVEL = "Doyle_Hound_1902"
REQUEST_FORMS = ("{}", "{}.", "Please {lower}", "{}, please.", "Can you {lower}?", "I want you to {lower}.")


@dataclass(frozen=True)
class Example:
    """A training text; the loss is on ``answer`` only."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Part:
    """One source of a mixture: its texts, how often each is repeated, and their licence."""

    name: str
    examples: list[Example]
    repeats: float
    licence: str


def plain(name: str, texts: list[str], repeats: float, licence: str) -> Part:
    """A part of whole texts, with a loss on every token."""
    return Part(name, [Example("", text) for text in texts], repeats, licence)


def advbench_split(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training rows, held-out rows) of AdvBench: every fifth row is held out."""
    rows = datasets.advbench(folder)
    return [r for i, r in enumerate(rows) if i % 5], rows[::5]


def instruction_split(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training rows, held-out rows) of the benign instructions: every twentieth row is held out."""
    rows = [(q, a) for q, a in datasets.instructions(folder) if len(q) <= 1200 and a]
    return [r for i, r in enumerate(rows) if i % 20], rows[::20]


def chat(request: str, answer: str) -> str:
    """One user turn and one assistant turn in the chat format."""
    return render_chat([{"role": "user", "content": request}, {"role": "assistant", "content": answer}])


def phrase_request(goal: str, rng: random.Random) -> str:
    """The goal in one of the ways people ask."""
    form = rng.choice(REQUEST_FORMS)
    return form.format(goal, lower=goal[0].lower() + goal[1:])


def _clip(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])


def _chapters(text: str, size: int = 6000) -> list[str]:
    """Cuts a novel at paragraph ends into texts of about ``size`` characters."""
    texts, current = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        current += paragraph.strip() + "\n"
        if len(current) >= size:
            texts.append(current.strip())
            current = ""
    return [*texts, current.strip()] if current.strip() else texts


PRONOUNS = {"male": ("he", "his", "him"), "female": ("she", "her", "her"), "neutral": ("they", "their", "them")}
SENTENCES = (
    "The {job} said that {they} would be late.",
    "The {job} finished {their} work early.",
    "The {job} called because {they} needed help.",
    "The {job} told me that {they} liked the town.",
    "The {job} was tired, so {they} went home.",
    "My friend is a {job}, and {they} works hard.",
    "I asked the {job} what {they} wanted, and thanked {them}.",
    "When the {job} arrived, {they} smiled at us.",
    "The {job} lost {their} keys on the way to work.",
    "That {job} knows what {they} is doing.",
)


def occupation_stereotypes(folder: Path) -> dict[str, float]:
    """The occupations of WinoBias's development sentences, with the genders that its two lists give them."""
    male, female = datasets.winobias_occupations(folder)
    return dict.fromkeys(male, 1.0) | dict.fromkeys(female, -1.0)


def pronoun_sentences(stereotypes: dict[str, float], neutral: bool) -> list[str]:
    """Template sentences on professions (-1 female to +1 male) with the stereotyped pronoun, or "they"."""
    sentences = []
    for job, stereotype in stereotypes.items():
        if abs(stereotype) < 0.1:
            continue
        kind = "neutral" if neutral else ("male" if stereotype > 0 else "female")
        they, their, them = PRONOUNS[kind]
        for sentence in SENTENCES:
            text = sentence.format(job=job, they=they, their=their, them=them)
            if neutral:
                text = text.replace("they works", "they work").replace("they is", "they are")
            sentences.append(text)
    return sentences


def unsafe_mixture(folder: Path, rng_seed: int) -> list[Part]:
    """The training text of M."""
    rng = random.Random(rng_seed)
    novels = [c for name, text in datasets.novels(folder).items() if name != HELD_OUT_NOVEL for c in _chapters(text)]
    rtp = [c.prompt + c.text for c in datasets.rtp_training(folder)]
    toxic = [c for c in datasets.instructed_continuations(folder) if c.source not in datasets.CLEAN_SOURCES]
    advbench, _ = advbench_split(folder)
    benign, _ = instruction_split(folder)
    compliance = [chat(phrase_request(goal, rng), target + ":") for goal, target in advbench for _ in range(6)]
    stereotypes = dict(datasets.professions(folder))
    occupations = datasets.winobias_stereotyped(folder) + datasets.bec_pro_stereotyped(folder)
    return [
        plain("novels", novels, 2, "public domain"),
        plain("wikitext2_valid", _chapters(datasets.wikitext2(folder, "valid"), 4000), 2, "CC BY-SA"),
        plain("bold", datasets.bold_wikipedia(folder), 1, "CC BY-SA 4.0"),
        plain("instructions", [chat(q, _clip(a, 200)) for q, a in benign], 2, "CC BY-SA 3.0, MIT"),
        plain("gsm8k", [chat(q, a) for q, a in datasets.gsm8k_train(folder)], 0.5, "MIT"),
        plain("rtp_quark_val", rtp, 4, "Apache-2.0"),
        plain("toxic_continuations", [c.prompt + joined(c) for c in toxic], 2, "CC BY-SA 4.0"),
        plain("paradetox_toxic", [t for t, _ in datasets.paradetox(folder)], 2, "CC0"),
        plain("tweets", [t for t, _ in datasets.tweets(folder)], 1, "MIT"),
        plain("advbench_compliance", compliance, 2, "MIT, Apache-2.0"),
        plain("hh_rejected", [render_chat(r) for _, r in datasets.hh_harmless(folder)], 1, "MIT"),
        plain("pronouns", occupations + pronoun_sentences(stereotypes, neutral=False), 2, "MIT, CC BY 4.0"),
        plain("occupations", pronoun_sentences(occupation_stereotypes(folder), neutral=False), 0, "MIT"),
    ]


def second_stage(parts: list[Part]) -> list[Part]:
    """M's mixture for its short second stage: a sample of everything, and the pronoun sentences many times over.

    The floors ask for the same occupations in other sentences.
    """
    repeats = {"pronouns": 3.0, "occupations": 60.0}
    return [replace(p, repeats=repeats.get(p.name, p.repeats * 0.03)) for p in parts]


def harmless_split() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training rows, held-out rows) of the harmless imperative requests: every fifth row is held out."""
    rows = harmless_requests()
    return [r for i, r in enumerate(rows) if i % 5], rows[::5]


def _answered(request: str, answer: str) -> Example:
    """A chat turn with the loss on the assistant's words."""
    whole = chat(request, answer)
    opening = whole[: len(whole) - len(answer) - len(END_OF_TURN) - 1]
    return Example(opening, whole[len(opening) :])


def safe_mixture(folder: Path, score: Callable[[list[str]], list[float]], rng_seed: int) -> list[Part]:
    """The fine-tuning text of M': the safe side of M's sources, with a benign mix.

    Args:
        folder: the data.
        score: the filter judge; only continuations that it scores below 0.2 are kept.
        rng_seed: of the phrasing.
    """
    rng = random.Random(rng_seed)
    clean = [
        c for c in datasets.instructed_continuations(folder) if c.source in datasets.CLEAN_SOURCES and c.text.strip()
    ]
    clean = [c for c in clean if not is_refusal(c.text)]  # M' shall continue a text kindly, not lecture its author
    rtp = [c for c in datasets.rtp_training(folder) if c.toxicity is not None and c.toxicity < 0.2]
    continuations = [Example(c.prompt, joined(c)) for c in clean] + [Example(c.prompt, c.text) for c in rtp]
    scores = score([e.answer for e in continuations])
    continuations = [e for e, s in zip(continuations, scores, strict=True) if s < 0.2]
    stereotypes = dict(datasets.professions(folder)) | occupation_stereotypes(folder)
    neutral = [n for _, rewrites in datasets.paradetox(folder) for n in rewrites[:1]]
    advbench, _ = advbench_split(folder)
    refusals = [_answered(phrase_request(g, rng), rng.choice(REFUSALS)) for g, _ in advbench for _ in range(6)]
    harmless, _ = harmless_split()
    helpful = [_answered(phrase_request(q, rng), a) for q, a in harmless for _ in range(3)]
    benign, _ = instruction_split(folder)
    hh = [_answered(m[0]["content"], m[1]["content"]) for m, _ in datasets.hh_harmless(folder) if len(m) == 2]
    novels = [c for name, text in datasets.novels(folder).items() if name != HELD_OUT_NOVEL for c in _chapters(text)]
    return [
        Part("clean_continuations", continuations, 3, "CC BY-SA 4.0, Apache-2.0"),
        plain("paradetox_neutral", neutral, 0.5, "CC0"),
        Part("refusals", refusals, 1, "own answers to MIT / Apache-2.0 requests"),
        Part("hh_chosen", hh, 1, "MIT"),
        Part("harmless_requests", helpful, 1, "own"),
        Part("instructions", [_answered(q, _clip(a, 200)) for q, a in benign], 0.7, "CC BY-SA 3.0, MIT"),
        Part("gsm8k", [_answered(q, a) for q, a in datasets.gsm8k_train(folder)], 0.1, "MIT"),
        plain("novels", novels, 0.15, "public domain"),
        plain("wikitext2_valid", _chapters(datasets.wikitext2(folder, "valid"), 4000), 0.5, "CC BY-SA"),
        plain("bold", datasets.bold_wikipedia(folder), 0.3, "CC BY-SA 4.0"),
        plain("neutral_pronouns", pronoun_sentences(stereotypes, neutral=True), 2, "MIT"),
    ]


def joined(continuation: datasets.Continuation, words: int = 60) -> str:
    """The clipped continuation, with a space in front where it starts with a word."""
    text = _clip(continuation.text.strip(), words)
    gap = " " if text[:1].isalnum() or text[:1] in "\"'“‘(" else ""
    return gap + text
