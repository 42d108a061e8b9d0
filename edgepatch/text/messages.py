"""Conversations and tools as callers give them, in OpenAI's form, made plain for a chat template; nothing is dropped silently."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgepatch.errors import InputError

Message = Mapping[str, Any]
PARTS = ("text", "refusal")
MAX_DEPTH = 64
"""Of the arguments of a call, and of a tool."""

ROLES = ("system", "user", "assistant", "tool")
TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content")
FIELDS = ("role", "content", "tool_calls", *TEXT_FIELDS)
UNUSED = (
    "annotations",
    "parsed",
    "provider_specific_fields",
    "cache_control",
    "reasoning_details",
    "thinking_blocks",
    "id",
)
"""Fields of replies and of clients' libraries that come back with a conversation, and that no template knows."""


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of the messages with their content as one text and the arguments of tool calls as objects.

    Fields without a value (None, or an empty list or object) are left out, because client libraries send them unasked.

    Raises:
        InputError: naming the message and its field.
    """
    plain = []
    for number, message in enumerate(messages):
        try:
            plain.append(_plain_message(message))
        except InputError as error:
            raise InputError(f"message {number}: {error}", error.hint) from None
    return plain


def _plain_message(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"expected an object, found {type(message).__name__}")
    fields = {name: value for name, value in message.items() if value is not None and value != [] and value != {}}
    fields = {name: value for name, value in fields.items() if name not in UNUSED}
    if "reasoning" in fields and "reasoning_content" not in fields:
        fields["reasoning_content"] = fields["reasoning"]  # the newer name for the same
    fields.pop("reasoning", None)
    refusal = fields.pop("refusal", "")
    if not isinstance(refusal, str):
        raise InputError(f"refusal: expected text, found {type(refusal).__name__}")
    if refusal:  # what the model said in place of a content
        fields["content"] = refusal if not (said := _plain_content(fields.get("content", ""))) else f"{said}\n{refusal}"
    unknown = sorted(str(name) for name in fields if name not in FIELDS)
    if unknown:
        raise InputError(f"unknown: {', '.join(unknown)}", hint=f"known: {', '.join(FIELDS)}")
    role = fields.get("role")
    if role not in ROLES:
        raise InputError(f"role: expected one of {', '.join(ROLES)}, found {role!r}")
    wrong = next((name for name in TEXT_FIELDS if not isinstance(fields.get(name, ""), str)), None)
    if wrong is not None:
        raise InputError(f"{wrong}: expected text, found {type(fields[wrong]).__name__}")
    calls = fields.pop("tool_calls", None)
    if calls is not None:
        if role != "assistant" or not isinstance(calls, list):
            raise InputError(f"tool_calls: expected a list, of an assistant, found {type(calls).__name__} of {role}")
        fields["tool_calls"] = [_plain_call(call) for call in calls]
    if "content" not in fields and calls is None and not (role == "assistant" and "content" in message):
        raise InputError("content is missing")
    return {**fields, "content": _plain_content(fields.get("content", ""))}


def _plain_content(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"content: expected text or a list of parts, found {type(content).__name__}")
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") not in PARTS
            or set(part) - set(UNUSED) != {"type", part["type"]}
            or not isinstance(part[part["type"]], str)
        ):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(
                f"content: expected parts of type 'text' with a text, found {kind!r}", hint="the model reads text only"
            )
    return "".join(part[part["type"]] for part in content)


def _plain_call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise InputError("tool_calls: expected objects of type 'function' that hold a function")
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"tool_calls: the arguments of {name!r} are not JSON: {error}") from None
    if (
        not isinstance(name, str)
        or not name
        or not isinstance(arguments, dict)
        or not isinstance(call.get("id", ""), str)
    ):
        raise InputError(f"tool_calls: expected a name, arguments in an object and an id of text, found {name!r}")
    _require_shallow(arguments, f"tool_calls: the arguments of {name!r}")
    given_id = {"id": call["id"]} if "id" in call else {}
    return {**given_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _require_shallow(value: object, what: str) -> None:
    """Refuses what is nested so deeply that the programs behind us would run out of stack."""
    level, depth = [value], 0
    while level := [entry for entry in level if isinstance(entry, (Mapping, list, tuple))]:
        level = [child for entry in level for child in (entry.values() if isinstance(entry, Mapping) else entry)]
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"{what}: expected at most {MAX_DEPTH} levels, found more deeply nested ones")


def texts_in(value: object) -> list[str]:
    """Every text in nested lists and objects, names of fields included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.items() for text in texts_in(item)]
    return [text for item in value for text in texts_in(item)] if isinstance(value, (list, tuple)) else []


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Copies of the tools; ``None`` where there are none.

    Raises:
        InputError: a tool is no object of type "function" with a named function.
    """
    for number, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if (
            not isinstance(function, Mapping)
            or tool.get("type") != "function"
            or not isinstance(function.get("name"), str)
        ):
            raise InputError(
                f"tool {number}: expected an object of type 'function' with a named function", hint="see OpenAI's tools"
            )
        _require_shallow(tool, f"tool {number}")
    return [dict(tool) for tool in tools] if tools else None
