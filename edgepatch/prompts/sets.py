"""Prompts and texts of our own writing, shipped with the package; ``edgepatch/prompts/README.md`` describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from edgepatch.errors import InputError

FOLDER = Path(__file__).parent
KINDS = ("toxic", "benign", "benign_text", "harm_requests", "harm_benign")
DOMAINS = ("toxicity", "gender", "harm")
SPLITS = ("train", "eval")
FIELDS = {"id", "kind", "split", "text"}
T = TypeVar("T")


def _load(kind: str, split: str) -> list[str]:
    for name, value, choices in (("kind", kind, KINDS), ("split", split, SPLITS)):
        if value not in choices:
            raise InputError(f"prompts: unknown {name} {value!r}", hint=f"one of {', '.join(choices)}")
    path = FOLDER / f"{kind}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="reinstall edgepatch") from None
    if any(not isinstance(row, dict) or set(row) != FIELDS or row["kind"] != kind for row in rows):
        raise InputError(f"{path}: expected objects with the fields {sorted(FIELDS)} and the kind {kind}")
    return [row["text"] for row in rows if row["split"] == split]


def load_prompts(kind: str, split: str) -> list[str]:
    """Sentence beginnings, or requests, without a space at the end, always in the same order.

    Args:
        kind: "toxic" or "benign"; for requests "harm_requests" or "harm_benign".
        split: "train", or "eval", which may not be trained on.

    Raises:
        InputError: an unknown kind or split, or a damaged file.
    """
    if kind == "benign_text":
        raise InputError("benign_text holds whole texts, not prompts", hint="call load_benign_text")
    return _load(kind, split)


def load_minimal_pairs() -> dict[str, list[tuple[str, str]]]:
    """Phenomenon of English grammar -> (acceptable, unacceptable) sentences; for evaluation only."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for line in (FOLDER / "minimal_pairs.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pairs.setdefault(row["phenomenon"], []).append((row["good"], row["bad"]))
    return pairs


def load_benign_text(split: str) -> list[str]:
    """Paragraphs of 40 to 90 words, for perplexity and for the KL anchor.

    Args:
        split: "train" or "eval".

    Raises:
        InputError: an unknown split, or a damaged file.
    """
    return _load("benign_text", split)


def load_safety_texts(domain: str) -> list[str]:
    """Long written safety texts (240 to 320 tokens), which say the same in other words: behind one of them a model is its own teacher.

    Args:
        domain: one of ``DOMAINS``.

    Raises:
        InputError: an unknown domain, or a damaged file.
    """
    if domain not in DOMAINS:
        raise InputError(f"unknown domain {domain!r}", hint=f"one of {', '.join(DOMAINS)}")
    path = FOLDER / "safety_texts.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row["text"] for row in rows if row["domain"] == domain]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="reinstall edgepatch") from None


def evenly(items: list[T], count: int | None) -> list[T]:
    """``count`` items at even distances, or all."""
    return items if count is None or count >= len(items) else [items[i * len(items) // count] for i in range(count)]
