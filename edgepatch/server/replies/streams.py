"""Replies that may hold thoughts and calls of tools: what of a text can be streamed before it is complete, and what remains at its end."""

from __future__ import annotations

import json
import secrets
import string
from typing import Any

from edgepatch.server.replies.formats import ReplyFormat
from edgepatch.text.thoughts import num_held, split_thought
from edgepatch.text.tool_calls import parse_tool_calls

ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""As Mistral's templates want the ids of calls; others take any."""


class ReplyStream:
    """One reply of a conversation.

    Args:
        form: what it may hold.
    """

    def __init__(self, form: ReplyFormat) -> None:
        self._form = form
        self._text, self._num_thought, self._num_said = "", 0, 0

    def push(self, text: str) -> tuple[str, str]:
        """Takes the next part and returns what is certainly thought, and what is certainly said and no call."""
        self._text += text
        thought, said = self._split(False)
        safe = _num_safe(said, self._form) if self._form.tools else len(said)
        parts = thought[self._num_thought :], said[self._num_said : safe]
        self._num_thought, self._num_said = max(self._num_thought, len(thought)), max(self._num_said, safe)
        return parts

    def finish(self) -> tuple[str, str, list[dict[str, Any]]]:
        """What is left of thoughts and text, and the calls in OpenAI's form."""
        thought, said = self._split(True)
        left = thought[self._num_thought :]
        content, calls = parse_tool_calls(said, self._form.tools, self._form.forms) if self._form.tools else (said, [])
        if not calls:
            return left, said[self._num_said :], []
        kept = calls if self._form.most_calls is None else calls[: self._form.most_calls]
        return left, content.removeprefix(said[: self._num_said].strip()), [_as_openai(call) for call in kept]

    def _split(self, is_complete: bool) -> tuple[str, str]:
        form = self._form
        if form.thought is None:
            return "", self._text
        return split_thought(self._text, form.thought, form.is_thinking, is_complete)


def _num_safe(text: str, form: ReplyFormat) -> int:
    """Length of the beginning that belongs to no call, whatever follows."""
    start = text.lstrip()
    if any(opening.startswith(start[: len(opening)]) for opening in form.bare_openings):
        return 0
    places = [place for place in map(text.find, form.markers) if place >= 0]
    return min(places) if places else len(text) - num_held(text, form.markers)


def _as_openai(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    identifier = "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))
    return {"id": identifier, "type": "function", "function": function}
