"""The filter judge of the gender domain: how many gendered words a text has."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgepatch.prompts import genders


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[a-z]+", text.lower())


def gender_scores(texts: Sequence[str]) -> NDArray[np.float32]:
    """(N,) 1 - 0.5 ** (gendered words); without any, 0 with a neutral pronoun and 0.1 without one.

    So of two continuations without gender the one that speaks of the person is chosen first.
    """
    gendered = {word for gender in ("female", "male") for word in genders.words(gender, "core")}
    neutral = set(genders.words("neutral"))

    def score(text: str) -> float:
        words = words_of(text)
        count = sum(word in gendered for word in words)
        return 1 - 0.5**count if count else (0.0 if neutral & set(words) else 0.1)

    return np.array([score(text) for text in texts], dtype=np.float32)
