"""What a chat template wants of its messages, and how it writes calls of tools: found by rendering probes, in the templates' child."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from edgepatch.text import call_forms
from edgepatch.text.call_forms import ARGUMENTS, NAMES
from edgepatch.text.thoughts import pair_in

Write = Callable[..., str]
"""Text of messages and tools; raises whatever the template raises."""

QUESTION, ANSWER, SYSTEM, RESULT = "Probing question?", "Probing answer.", "Probing system.", "Probing result."
USER = {"role": "user", "content": QUESTION}
LONG_IDS, SHORT_IDS = ("call_probe_one", "call_probe_two"), ("probeOne1", "probeTwo2")
"""As clients make them, and as Mistral's templates want them: nine letters and digits."""

PARAMETERS = {
    "type": "object",
    "properties": {
        "city_key": {"type": "string", "description": "The city."},
        "count_key": {"type": "integer", "description": "The count."},
    },
    "required": ["city_key", "count_key"],
}
MISSHAPEN = ("{'city_key'", '\\"city_key\\"')
"""What arguments become in a template that writes objects as Python does, or text as JSON a second time."""


def examine_here(write: Write, template: str, end_texts: Sequence[str]) -> dict[str, Any]:
    """Traits of a template: the fields of ``templates.Traits``.

    Args:
        write: renders it.
        template: its source.
        end_texts: of the tokens that end a reply.
    """
    style = _call_style(write)
    return {
        "takes_system": _shows(write, [{"role": "system", "content": SYSTEM}, USER], SYSTEM),
        "tools_name": _tools_name(write),
        "fills_tools": not _shows(write, [USER], NAMES[0], [_bare_tool()]),
        "call_style": style,
        "call_forms": _call_forms(write, style, end_texts),
        "thought": pair_in(template),
    }


def _tools_name(write: Write) -> str:
    """Under which name the template takes tools; "" where it has no place for them."""
    if _shows(write, [USER], NAMES[0], _tools()):
        return "tools"
    try:
        shown = NAMES[0] in write([USER], None, True, {"xml_tools": [tool["function"] for tool in _tools()]})
    except Exception:  # as in `_text`
        return ""
    return "xml_tools" if shown else ""


def _tools() -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": name, "description": "A probe.", "parameters": PARAMETERS}}
        for name in NAMES
    ]


def _bare_tool() -> dict[str, Any]:
    return {"type": "function", "function": {"name": NAMES[0]}}


def _shows(write: Write, messages: Any, text: str, tools: Any = None) -> bool:
    return text in _text(write, messages, tools)


def _text(write: Write, messages: Any, tools: Any = None, opens_turn: bool = False) -> str:
    try:
        return write(messages, tools, opens_turn)
    except Exception:  # a template is a program of its own: what it refuses it does not show
        return ""


def _calls(style: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The assistant's turn with so many calls, and their results."""
    ids = SHORT_IDS if style["has_short_ids"] else LONG_IDS
    calls = [
        {
            "id": identifier,
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(values) if style["arguments_as_text"] else values},
        }
        for identifier, name, values in zip(ids[:count], NAMES, ARGUMENTS, strict=False)
    ]
    turn = {"role": "assistant", "content": None if style["content_is_null"] else "", "tool_calls": calls}
    results = [
        {"role": "tool", "tool_call_id": i, "name": n, "content": RESULT} for i, n in zip(ids, NAMES, strict=True)
    ]
    return [turn, *results[:count]]


def _call_style(write: Write) -> dict[str, bool] | None:
    """How calls must be given for the template to write them: the first way that shows them whole."""
    for short, as_text, is_null in itertools.product((False, True), repeat=3):
        style = {"has_short_ids": short, "arguments_as_text": as_text, "content_is_null": is_null}
        text = _text(write, [USER, *_calls(style, 1)], _tools())
        start = text.rfind(QUESTION)
        said = text[start + len(QUESTION) :]
        if (
            NAMES[0] in said
            and ARGUMENTS[0]["city_key"] in said
            and not any(wrong in said for wrong in MISSHAPEN)
            and "None" not in said
        ):
            return style
    return None


def _call_forms(write: Write, style: dict[str, bool] | None, end_texts: Sequence[str]) -> list[dict[str, Any]]:
    """How the template writes calls, which is how the model was taught to: two of them, and one where that ends otherwise."""
    if style is None:
        return []
    forms: list[dict[str, Any]] = []
    opening = _after_question(_text(write, [USER], _tools(), True))
    closing = _text(write, [USER, {"role": "assistant", "content": ANSWER}], _tools()).rpartition(ANSWER)[2]
    for count in (2, 1):
        turn, *results = _calls(style, count)
        said = _after_question(_text(write, [USER, turn], _tools())) or _before_result(
            _after_question(_text(write, [USER, turn, *results], _tools()))
        )
        ids = SHORT_IDS if style["has_short_ids"] else LONG_IDS
        form = call_forms.derive(said, opening, closing, end_texts, ids)
        if form is not None and not any(form["end"] == other["end"] for other in forms):
            forms.append(form)
    return forms


def _after_question(text: str) -> str:
    return text.rpartition(QUESTION)[2] if QUESTION in text else ""


def _before_result(text: str) -> str:
    return text.partition(RESULT)[0]
