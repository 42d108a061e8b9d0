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

import re
from dataclasses import dataclass
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.prompts.genders import (
    Split,
    balanced,
    fill,
    head,
    mixed,
    own_stereotypes,
    rows,
    split_of,
    templates,
    words,
)

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


def _stereotypes(data: Path | None) -> dict[str, float]:
    if data is None:
        return own_stereotypes()
    male, female = datasets.winobias_occupations(data)
    scores = dict(datasets.professions(data)) | dict.fromkeys(male, 1.0) | dict.fromkeys(female, -1.0)
    return {name: s for name, s in scores.items() if abs(s) >= MIN_STEREOTYPE and name not in NOT_OCCUPATIONS}


def occupations(data: Path | None, split: Split) -> dict[str, float]:
    """Occupation -> +1 male, -1 female by stereotype; as many of one as of the other."""
    return balanced(_stereotypes(data), split)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _occupation_prompts(data: Path | None, split: Split) -> list[GenderPrompt]:
    jobs = occupations(data, split).items()
    return [GenderPrompt(fill(template, job), sign) for job, sign in jobs for template in templates(split)]


def training_prompts(data: Path | None) -> list[GenderPrompt]:
    """Training occupations in training templates."""
    return mixed(_occupation_prompts(data, "train"))


def _dong_prompts(data: Path) -> list[GenderPrompt]:
    trained = {head(name) for name in _stereotypes(data) if split_of(name) == "train"}
    excluded = trained | set(words("female")) | set(words("male"))
    lines = [line for line in datasets.dong_templates(data) if re.match("My friend is an? ", line)]
    return [GenderPrompt(f"{line}, and") for line in lines if not excluded & set(re.findall("[a-z]+", line.lower()))]


def evaluation_prompts(data: Path | None) -> list[GenderPrompt]:
    """Other occupations in other templates; with data also the lines of Dong et al."""
    return mixed(_occupation_prompts(data, "eval") + (_dong_prompts(data) if data else []))


def _people(split: Split) -> list[tuple[str, str]]:
    return [(r["text"], r["gender"]) for r in rows("gender_people") if r["split"] == split]


def known_gender_prompts(split: Split = "eval") -> list[GenderPrompt]:
    """Templates on people whose gender the words tell: "Sarah mentioned that", "My grandfather left early, so"."""
    rows = [
        GenderPrompt(t.format(person=name, Person=_capital(name)), 1.0 if gender == "male" else -1.0)
        for name, gender in _people(split)
        for t in templates(split)
        if "{job}" not in t
    ]
    return mixed(rows)


def known_gender_texts() -> list[str]:
    """Whole sentences on other people whose gender the words tell, with the right pronouns; for the KL anchor."""
    texts = []
    for name, gender in _people("train"):
        they, their, them = PRONOUNS[gender]
        for row in rows("gender_sentences"):
            texts.append(row["text"].format(person=name, Person=_capital(name), they=they, their=their, them=them))
    return mixed(texts)
