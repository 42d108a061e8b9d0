"""Prompts to make pairs from: a text a line, or JSON Lines with texts or conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.text.messages import Message, plain_messages
from edgepatch.training.pairs.files import PairPrompt
from edgepatch.training.pairs.json_lines import read_lines, read_rows

FIELDS = ("messages", "prompt", "text")
HINT = "expected one prompt a line; in a .jsonl file, objects with messages, prompt or text"


@dataclass(frozen=True)
class PromptList:
    """Prompts, and where each of them stands."""

    prompts: list[PairPrompt]
    places: list[str]


def _prompt(row: Mapping[str, Any]) -> PairPrompt:
    value = next((row[name] for name in FIELDS if row.get(name)), None)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return tuple(plain_messages(value))
    raise InputError(f"expected a text or messages in one of {', '.join(FIELDS)}, found {sorted(row)}", hint=HINT)


def read_prompts(path: Path) -> PromptList:
    """Prompts of a file; one that ends in .jsonl holds JSON Lines.

    Raises:
        InputError: the file is missing, empty or not UTF-8, or a line holds no prompt (its number is named).
    """
    if path.suffix != ".jsonl":
        rows: list[tuple[str, PairPrompt]] = list(read_lines(path, "prompts"))
    else:
        rows = []
        for place, row in read_rows(path, "prompts"):
            try:
                rows.append((place, _prompt(row)))
            except InputError as error:
                raise InputError(f"{place}: {error}", error.hint) from None
    if not rows:
        raise InputError(f"{path} holds no prompts", hint=HINT)
    return PromptList([prompt for _, prompt in rows], [place for place, _ in rows])


def as_conversations(prompt_list: PromptList, chat: bool, system: str) -> PromptList:
    """The prompts in the form that is asked for.

    Args:
        prompt_list: texts, conversations or both.
        chat: makes each text the message of a user.
        system: goes in front of every conversation; "" for none.

    Raises:
        InputError: a conversation does not wait for the assistant, or cannot take the system text.
    """
    prompts: list[PairPrompt] = []
    for prompt, place in zip(prompt_list.prompts, prompt_list.places, strict=True):
        if isinstance(prompt, str) and chat:
            prompt = ({"role": "user", "content": prompt},)
        if isinstance(prompt, str) and system:
            raise InputError(
                f"{place}: a system text needs messages, found plain text", hint="--chat makes a message of each text"
            )
        prompts.append(prompt if isinstance(prompt, str) else _conversation(prompt, system, place))
    return PromptList(prompts, prompt_list.places)


def _conversation(messages: tuple[Message, ...], system: str, place: str) -> tuple[Message, ...]:
    if messages[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{place}: the last message: expected one of the user, found {messages[-1]['role']}",
            hint="leave the reply out",
        )
    if system and messages[0]["role"] == "system":
        raise InputError(
            f"{place}: the conversation has a system text of its own", hint="leave out --system, or the message"
        )
    return ({"role": "system", "content": system}, *messages) if system else messages
