"""Calls of tools in what a model wrote, in the two forms that small open models were trained on.

Hermes and Qwen write ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, once for each call and with text around them;
Llama 3.1 writes one bare JSON object ``{"name": ..., "parameters": {...}}`` and nothing else. A text that is not exactly one of these
is a text: a call is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from edgepatch.files import strict_json

MAX_TEXT = 256 * 1024
MAX_CALLS = 64
OPENING, CLOSING = "<tool_call>", "</tool_call>"
_BLOCK = re.compile(f"{OPENING}(.*?){CLOSING}", re.DOTALL)


def parse_tool_calls(text: str, names: Collection[str] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Splits a reply into what it says and what it calls.

    Args:
        text: the whole reply.
        names: of the tools that were offered; a call of any other makes the reply a text. ``None`` allows all.

    Returns:
        The text without the calls, stripped where there are any, and the calls: ``{"name": str, "arguments": dict}`` each. No calls
        and the text as it is, where any part of it breaks the form.
    """
    if len(text) > MAX_TEXT:
        return text, []
    if OPENING in text:
        bodies, content = _BLOCK.findall(text), _BLOCK.sub("", text).strip()
        if OPENING in content or CLOSING in content:
            return text, []
    else:
        bodies, content = [text.strip().removeprefix("<|python_tag|>")], ""
    if not 0 < len(bodies) <= MAX_CALLS:
        return text, []
    calls = [_call(body, names) for body in bodies]
    complete = [call for call in calls if call is not None]
    return (content, complete) if len(complete) == len(calls) else (text, [])


def _call(body: str, names: Collection[str] | None) -> dict[str, Any] | None:
    """The call that a JSON object describes, or ``None`` where it describes none."""
    body = body.strip()
    if not body.startswith("{"):
        return None
    try:
        value = strict_json.loads(body.encode())
    except ValueError:
        return None
    keys = set(value) - {"name", "type"}
    if (
        "name" not in value
        or value.get("type", "function") != "function"
        or keys not in ({"arguments"}, {"parameters"})
    ):
        return None
    name, arguments = value["name"], value[keys.pop()]
    fits = isinstance(name, str) and name and isinstance(arguments, dict) and (names is None or name in names)
    return {"name": name, "arguments": arguments} if fits else None
