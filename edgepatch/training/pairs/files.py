"""Preference pairs and their files: JSON Lines with TRL's field names, in each of TRL's forms.

TRL's forms (Dataset formats, "Preference"; huggingface.co/docs/trl/dataset_formats), ``prompt`` explicit or the common
beginning of the two answers:

    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    {"prompt": [{"role": "user", "content": "Sky?"}], "chosen": [{"role": "assistant", "content": "Blue."}], "rejected": [...]}

The scores stand beside them. Where a file came from stands in another (``provenance``), so that TRL and ``datasets`` read
the pairs as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.text.messages import Message, plain_messages
from edgepatch.training.pairs.json_lines import read_rows

PairPrompt = str | tuple[Message, ...]
"""Plain text to be continued, or chat messages to be replied to."""


@dataclass(frozen=True)
class Pair:
    """A preference pair; scores are the filter judge's, from 0 (safe) to 1 (unsafe).

    Attributes:
        prompt: plain text, then ``chosen`` and ``rejected`` are continuations; or chat messages, then they are replies of
            the assistant.
    """

    prompt: PairPrompt
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", tuple(plain_messages(self.prompt)))

    @property
    def key(self) -> str:
        """The same for pairs with the same prompt and answers."""
        return json.dumps([self.prompt, self.chosen, self.rejected], sort_keys=True)


def pair_row(pair: Pair) -> dict[str, Any]:
    """A pair as it stands on its line."""
    scores = {"chosen_score": pair.chosen_score, "rejected_score": pair.rejected_score}
    if isinstance(pair.prompt, str):
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **scores}
    replies = {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return {"prompt": [dict(message) for message in pair.prompt], **replies, **scores}


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """One JSON object a line.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(path, "".join(json.dumps(pair_row(p), ensure_ascii=False) + "\n" for p in pairs).encode("utf-8"))


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value != ""


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole texts: TRL's rule, where the space before an answer belongs to the answer."""
    end = next(
        (i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r), min(len(chosen), len(rejected))
    )
    if chosen[:end].endswith(" "):
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _split_conversation(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """(prompt, chosen, rejected) of two whole conversations, behind the last message that they share."""
    end = next(
        (i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r), min(len(chosen), len(rejected))
    )
    return chosen[:end], chosen[end:], rejected[end:]


def _reply(name: str, messages: object) -> str:
    """The text of a conversation's answer, which is one message of the assistant."""
    if not isinstance(messages, list) or len(messages) != 1:
        actual = f"{len(messages)} messages" if isinstance(messages, list) else type(messages).__name__
        raise InputError(f"{name}: expected a list of one message of the assistant, found {actual}")
    (message,) = plain_messages(messages)
    if message["role"] != "assistant" or "tool_calls" in message:
        raise InputError(
            f"{name}: expected a text of the assistant, found {'a tool call' if 'tool_calls' in message else message['role']}"
        )
    return str(message["content"])


def _is_said_first(prompt: object, chosen: list[Any], rejected: list[Any]) -> bool:
    """Whether a prompt of text only repeats what both conversations hold in front of their answers, as published sets have it."""
    shared, _, _ = _split_conversation(chosen, rejected)
    texts = [message.get("content") for message in shared if isinstance(message, Mapping)]
    return isinstance(prompt, str) and prompt in texts


def _parts(row: Mapping[str, Any]) -> tuple[PairPrompt, str, str]:
    """(prompt, chosen, rejected) of a line in any of TRL's forms."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        if "prompt" not in row or _is_said_first(prompt, chosen, rejected):
            prompt, chosen, rejected = _split_conversation(chosen, rejected)
        if not isinstance(prompt, list) or not prompt:
            raise InputError("prompt: expected messages, as chosen and rejected are messages")
        return tuple(prompt), _reply("chosen", chosen), _reply("rejected", rejected)
    if "prompt" not in row and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_text(chosen, rejected)
    if not (_is_text(prompt) and _is_text(chosen) and _is_text(rejected)):
        raise InputError(
            "prompt, chosen and rejected must be texts that are not empty, or all of them lists of messages"
        )
    return prompt, chosen, rejected


def _score(row: Mapping[str, Any], name: str, default: float) -> float:
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}: expected a number, found {value!r}")
    return float(value)


def parse_pair(row: Mapping[str, Any]) -> Pair:
    """A pair from its line, in any of TRL's forms; without scores it counts as certain (0 and 1).

    Raises:
        InputError: naming the field, or chosen and rejected are the same.
    """
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise InputError(f"expected the fields prompt, chosen and rejected, {missing[0]!r} is missing")
    if row["chosen"] == row["rejected"]:
        raise InputError("chosen and rejected are the same", hint="remove the line")
    prompt, chosen, rejected = _parts(row)
    if not chosen or not rejected:
        raise InputError("chosen and rejected must be texts that are not empty")
    return Pair(prompt, chosen, rejected, _score(row, "chosen_score", 0.0), _score(row, "rejected_score", 1.0))


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a JSON Lines file in any of TRL's forms; scores are optional.

    Raises:
        InputError: the file is missing or empty, or a line is malformed (its number is named).
    """
    return read_placed_pairs(path)[1]


def read_placed_pairs(path: Path) -> tuple[list[str], list[Pair]]:
    """(where each pair stands, pairs); as ``read_pairs``."""
    places, pairs = [], []
    for place, row in read_rows(path, "pairs"):
        try:
            pairs.append(parse_pair(row))
        except InputError as error:
            raise InputError(f"{place}: {error}", error.hint) from None
        places.append(place)
    if not pairs:
        raise InputError(f"{path} holds no pairs", hint="make some with `edgepatch pairs`")
    return places, pairs
