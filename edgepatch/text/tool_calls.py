"""Calls of tools in what a model wrote: read in the forms of ``call_forms``. A text that is not exactly one of these is a text.

Nothing inside a closed thought is a call, and a call is never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgepatch.text.call_bodies import Tools, opening_pattern, pattern, read_body
from edgepatch.text.call_forms import GENERAL, CallForm
from edgepatch.text.thoughts import without_closed

MAX_TEXT = 256 * 1024
MAX_CALLS = 64


def parse_tool_calls(
    text: str, tools: Mapping[str, Any] | Collection[str] | None = None, forms: Sequence[CallForm] = GENERAL
) -> tuple[str, list[dict[str, Any]]]:
    """Splits a reply into what it says and what it calls.

    Args:
        text: the whole reply.
        tools: those that were offered, by name, with the JSON Schema of their arguments where values are written without quotes; a
            call of any other makes the reply a text. ``None`` allows all.
        forms: how calls may be written; the first that fits counts.

    Returns:
        The text without the calls, stripped where there are any, and the calls: ``{"name": str, "arguments": dict}`` each. No calls
        and the text as it is, where any part of it breaks the form.
    """
    if len(text) > MAX_TEXT:
        return text, []
    schemas = None if tools is None else dict(tools) if isinstance(tools, Mapping) else {name: {} for name in tools}
    visible = without_closed(text)
    for form in forms:
        parts = _read(visible, form, schemas)
        if parts is not None and 0 < len(parts[1]) <= MAX_CALLS and all(_fits(call, schemas) for call in parts[1]):
            content = "".join(text[start:end] for start, end in parts[0]).strip()
            return content, [{"name": name, "arguments": arguments} for name, arguments in parts[1]]
    return text, []


def _fits(call: tuple[str, Any], tools: Tools | None) -> bool:
    name, arguments = call
    return isinstance(name, str) and bool(name) and isinstance(arguments, dict) and (tools is None or name in tools)


def _read(text: str, form: CallForm, tools: Tools | None) -> tuple[list[tuple[int, int]], list[tuple[str, Any]]] | None:
    """Where the text around the calls lies, and the calls; ``None`` where any part breaks the form."""
    spans, calls, place = [], [], 0
    begin, end = opening_pattern(form), pattern(form.end)
    while opening := (begin.match if not form.begin.strip() else begin.search)(text, place):
        section = _read_section(text, opening.end(), form, tools)
        closing = section and end.match(text, section[1])
        if not section or not closing:
            return None
        spans.append((place, opening.end() - len(opening[0].lstrip())))
        calls += section[0]
        place = closing.start() + len(closing[0].rstrip())
        if not form.end.strip() or not form.begin.strip():
            if text[place:].strip():
                return None
            break
    spans.append((place, len(text)))
    around = "".join(text[start:stop] for start, stop in spans)
    markers = (marker for marker in (form.marker, form.end.strip()) if marker)
    return None if any(marker in around for marker in markers) else (spans, calls)


def _read_section(
    text: str, place: int, form: CallForm, tools: Tools | None
) -> tuple[list[tuple[str, Any]], int] | None:
    calls: list[tuple[str, Any]] = []
    end = place
    while len(calls) <= MAX_CALLS and (body := read_body(form, text, place, tools)):
        calls, end = [*calls, *body[0]], body[1]
        more = pattern(form.between).match(text, end) if form.between is not None else None
        if more is None:
            break
        place = more.end()
    return (calls, end) if calls else None
