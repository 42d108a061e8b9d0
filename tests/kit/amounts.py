"""How many examples a test of many takes: some in every run of the tests, all of them where a long run asks for it."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")
EXAMPLES_VARIABLE = "EDGEPATCH_EXAMPLES"
"""``EDGEPATCH_EXAMPLES=all make test`` takes all; so do the figures F7 and F8 of ``edgepatch bench security``."""

ALL = os.environ.get(EXAMPLES_VARIABLE) == "all"


def examples(some: T, all_of_them: T) -> T:
    """What this run takes: numbers, steps or names. Both are of every kind that there is."""
    return all_of_them if ALL else some
