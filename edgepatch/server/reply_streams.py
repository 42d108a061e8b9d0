"""Replies that may hold calls of tools: what of a text can be streamed before it is complete, and what remains at its end."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from typing import Any

from edgepatch.text.tool_calls import OPENING, parse_tool_calls

BARE_OPENINGS = ("{", "<|python_tag|>")
"""A call without a frame is the whole reply, and starts with one of these."""


class ToolStream:
    """One reply to a request that offers tools.

    Args:
        names: of the tools.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._text, self._num_delivered = "", 0

    def push(self, text: str) -> str:
        """Takes the next part and returns what is certainly no call."""
        self._text += text
        safe = max(self._num_delivered, _num_safe(self._text))
        delivered, self._num_delivered = self._text[self._num_delivered : safe], safe
        return delivered

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left of the text, and the calls in OpenAI's form."""
        content, calls = parse_tool_calls(self._text, self._names)
        if not calls:
            return self._text[self._num_delivered :], []
        return content.removeprefix(self._text[: self._num_delivered].strip()), [_as_openai(call) for call in calls]


def _num_safe(text: str) -> int:
    """Length of the beginning that belongs to no call, whatever follows."""
    start = text.lstrip()
    if any(opening.startswith(start[: len(opening)]) for opening in BARE_OPENINGS):
        return 0
    if OPENING in text:
        return text.index(OPENING)
    held = next((n for n in range(len(OPENING) - 1, 0, -1) if text.endswith(OPENING[:n])), 0)
    return len(text) - held


def _as_openai(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
