"""Prompts and word lists of the gender domain: occupations in templates, and people whose gender the text tells.

Occupation prompts are the product of an occupation list and our own templates: "The {x} said that", "My friend is {a x}, and".
With data, the occupations are those of debiaswe (Bolukbasi et al. 2016) with a stereotype of at least 0.3 that do not name a
gender by definition, and WinoBias's 40; without, they are ours (``edgepatch/prompts``). The lists hold two to five times as many
stereotypically male occupations, so both sides are cut to the same number: a model that always says "he" is right in half of them.

No occupation is on both sides: the last word decides ("registered nurse" goes with "nurse"), by its CRC-32, whichever list it
comes from. No template is on both sides either. With data, evaluation adds the lines "My friend is a ..." of Dong et al. 2024, in
their form ("My friend is a marine biologist, and"), less those that name a training occupation or a gender. BOLD's profession
prompts are not used: they are encyclopaedia sentences about a trade, behind which no word for a person follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from zlib import crc32

import numpy as np

from edgepatch.bench import datasets
from edgepatch.errors import InputError
from edgepatch.prompts.sets import FOLDER, evenly

Split = Literal["train", "eval"]
T = TypeVar("T")

MIN_STEREOTYPE = 0.3
NOT_OCCUPATIONS = frozenset(
    {
        "adventurer",
        "assassin",
        "boss",
        "collector",
        "crusader",
        "gangster",
        "hooker",
        "major leaguer",
        "mobster",
        "prisoner",
        "saint",
        "soft spoken",
        "tycoon",
        "warrior",
    }
)
PRONOUNS = {"male": ("he", "his", "him"), "female": ("she", "her", "her")}


@dataclass(frozen=True)
class GenderPrompt:
    """A sentence beginning; ``gender`` is +1 male, -1 female (stereotyped, or known from the text), 0 where there is none."""

    text: str
    gender: float = 0.0


@cache
def _rows(name: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{name}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="reinstall edgepatch") from None


def _mixed(rows: Iterable[T]) -> list[T]:
    """A fixed order without a pattern, so that items at even distances hold every template and both genders."""
    return sorted(rows, key=lambda row: crc32(repr(row).encode()))


def words(gender: str, scope: str = "") -> list[str]:
    """Our words of a gender ("female", "male", "neutral"); ``scope`` "core" leaves out all but pronouns and the commonest nouns."""
    return [r["text"] for r in _rows("gender_words") if r["gender"] == gender and scope in ("", r["scope"])]


def split_of(occupation: str) -> Split:
    """The side of an occupation, by its last word."""
    return "eval" if crc32(_head(occupation).encode()) % 2 == 0 else "train"


def _head(occupation: str) -> str:
    return occupation.lower().split()[-1]


def _stereotypes(data: Path | None) -> dict[str, float]:
    if data is None:
        return {r["text"]: float(r["stereotype"]) for r in _rows("gender_occupations")}
    male, female = datasets.winobias_occupations(data)
    scores = dict(datasets.professions(data)) | dict.fromkeys(male, 1.0) | dict.fromkeys(female, -1.0)
    return {name: s for name, s in scores.items() if abs(s) >= MIN_STEREOTYPE and name not in NOT_OCCUPATIONS}


def occupations(data: Path | None, split: Split) -> dict[str, float]:
    """Occupation -> +1 male, -1 female by stereotype; as many of one as of the other."""
    rows = [(name, float(np.sign(s))) for name, s in _stereotypes(data).items() if split_of(name) == split]
    sides = [[r for r in rows if r[1] == sign] for sign in (-1, 1)]
    count = min(map(len, sides))
    return dict(row for side in sides for row in evenly(_mixed(side), count))


def templates(split: Split) -> list[str]:
    """Templates with one of the fields {person} ("the nurse", "Anna"), {Person} or {job} ("a nurse")."""
    return [r["text"] for r in _rows("gender_templates") if r["split"] == split]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _with_article(occupation: str) -> str:
    return f"{'an' if occupation[0] in 'aeiou' else 'a'} {occupation}"


def fill(template: str, occupation: str) -> str:
    """The template with an occupation in it."""
    return template.format(person=f"the {occupation}", Person=f"The {occupation}", job=_with_article(occupation))


def _occupation_prompts(data: Path | None, split: Split) -> list[GenderPrompt]:
    jobs = occupations(data, split).items()
    return [GenderPrompt(fill(template, job), sign) for job, sign in jobs for template in templates(split)]


def training_prompts(data: Path | None) -> list[GenderPrompt]:
    """Training occupations in training templates."""
    return _mixed(_occupation_prompts(data, "train"))


def _dong_prompts(data: Path) -> list[GenderPrompt]:
    trained = {_head(name) for name in _stereotypes(data) if split_of(name) == "train"}
    excluded = trained | set(words("female")) | set(words("male"))
    lines = [line for line in datasets.dong_templates(data) if re.match("My friend is an? ", line)]
    return [GenderPrompt(f"{line}, and") for line in lines if not excluded & set(re.findall("[a-z]+", line.lower()))]


def evaluation_prompts(data: Path | None) -> list[GenderPrompt]:
    """Other occupations in other templates; with data also the lines of Dong et al."""
    return _mixed(_occupation_prompts(data, "eval") + (_dong_prompts(data) if data else []))


def _people(split: Split) -> list[tuple[str, str]]:
    return [(r["text"], r["gender"]) for r in _rows("gender_people") if r["split"] == split]


def known_gender_prompts() -> list[GenderPrompt]:
    """Evaluation templates on people whose gender the words tell: "Sarah mentioned that", "My grandfather left early, so"."""
    rows = [
        GenderPrompt(t.format(person=name, Person=_capital(name)), 1.0 if gender == "male" else -1.0)
        for name, gender in _people("eval")
        for t in templates("eval")
        if "{job}" not in t
    ]
    return _mixed(rows)


def known_gender_texts() -> list[str]:
    """Whole sentences on other people whose gender the words tell, with the right pronouns; for the KL anchor."""
    texts = []
    for name, gender in _people("train"):
        they, their, them = PRONOUNS[gender]
        for row in _rows("gender_sentences"):
            texts.append(row["text"].format(person=name, Person=_capital(name), they=they, their=their, them=them))
    return _mixed(texts)
