"""Reads multiple-choice items from the folder of public data sets, for the task files that name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from edgepatch.bench import datasets
from edgepatch.errors import InputError


def arc(part: Literal["Easy", "Challenge"], **_: Any) -> dict[str, Any]:
    """The one split of a task of AI2's Reasoning Challenge.

    Args:
        part: which of its two.

    Raises:
        InputError: there is no data folder, or it lacks the file.
    """
    return _split(datasets.arc(_folder(), part))


def openbookqa(**_: Any) -> dict[str, Any]:
    """The one split of OpenBookQA's task; errors as of ``arc``."""
    return _split(datasets.openbookqa(_folder()))


def blimp(pairs_per_paradigm: int, **_: Any) -> dict[str, Any]:
    """The one split of BLiMP's task; the acceptable sentence comes first. Errors as of ``arc``.

    Args:
        pairs_per_paradigm: so many first pairs of each.
    """
    paradigms = datasets.blimp(_folder()).values()
    return _split([datasets.Choice("", pair, 0) for pairs in paradigms for pair in pairs[:pairs_per_paradigm]])


def _folder() -> Path:
    folder = datasets.data_folder()
    if folder is None:
        raise InputError("this task reads public data", hint=f"name their folder in {datasets.DATA_VARIABLE}")
    return folder


def _split(items: Sequence[datasets.Choice]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list([asdict(item) for item in items])}
