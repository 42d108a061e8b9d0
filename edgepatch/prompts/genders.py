"""Word lists, templates and occupations of our own for the gender domain; nobody's gender is told by any of the prompts.

No occupation is on both sides: the last word decides ("registered nurse" goes with "nurse"), by its CRC-32, whichever list it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, TypeVar
from zlib import crc32

from edgepatch.errors import InputError
from edgepatch.prompts.sets import FOLDER, evenly

Split = Literal["train", "eval"]
T = TypeVar("T")


@cache
def rows(name: str) -> list[dict[str, Any]]:
    """The lines of one of the gender domain's files, by its name without the ending."""
    path = FOLDER / f"{name}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="reinstall edgepatch") from None


def mixed(items: Iterable[T]) -> list[T]:
    """A fixed order without a pattern, so that items at even distances hold every template and both genders."""
    return sorted(items, key=lambda item: crc32(repr(item).encode()))


def words(gender: str, scope: str = "") -> list[str]:
    """Our words of a gender ("female", "male", "neutral"); ``scope`` "core" leaves out all but pronouns and the commonest nouns."""
    return [r["text"] for r in rows("gender_words") if r["gender"] == gender and scope in ("", r["scope"])]


def split_of(occupation: str) -> Split:
    """The side of an occupation, by its last word."""
    return "eval" if crc32(head(occupation).encode()) % 2 == 0 else "train"


def head(occupation: str) -> str:
    """Its last word, in small letters."""
    return occupation.lower().split()[-1]


def own_stereotypes() -> dict[str, float]:
    """Occupation -> +1 male, -1 female, in our own judgement."""
    return {r["text"]: float(r["stereotype"]) for r in rows("gender_occupations")}


def balanced(stereotypes: Mapping[str, float], split: Split) -> dict[str, float]:
    """Occupation -> +1 male, -1 female by stereotype; as many of one side as of the other.

    Args:
        stereotypes: occupation -> a number whose sign tells the side.
        split: which occupations.
    """
    signed = [(name, 1.0 if s > 0 else -1.0) for name, s in stereotypes.items() if split_of(name) == split]
    sides = [[row for row in signed if row[1] == sign] for sign in (-1, 1)]
    count = min(map(len, sides))
    return dict(row for side in sides for row in evenly(mixed(side), count))


def templates(split: Split) -> list[str]:
    """Templates with one of the fields {person} ("the nurse", "Anna"), {Person} or {job} ("a nurse")."""
    return [r["text"] for r in rows("gender_templates") if r["split"] == split]


def _with_article(occupation: str) -> str:
    return f"{'an' if occupation[0] in 'aeiou' else 'a'} {occupation}"


def fill(template: str, occupation: str) -> str:
    """The template with an occupation in it."""
    return template.format(person=f"the {occupation}", Person=f"The {occupation}", job=_with_article(occupation))


def own_training_prompts() -> list[str]:
    """Our training occupations in our training templates, in a fixed order without a pattern."""
    jobs = balanced(own_stereotypes(), "train")
    return mixed(fill(template, job) for job in jobs for template in templates("train"))
