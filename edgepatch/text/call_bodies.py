"""The bodies of calls: each reader takes a text and a place, and returns the calls there and where they end, or ``None``."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from edgepatch.text.call_forms import BRACE_QUOTE, IDENTIFIER, CallForm

Tools = Mapping[str, Mapping[str, Any]]
"""Name -> JSON Schema of the arguments."""

Calls = list[tuple[str, Any]]
MORE_KEYS = {"type", "id", "index", "tool_call_id"}
MAX_EXPRESSION = 16 * 1024
MAX_PAIRS = 128


def read_body(form: CallForm, text: str, place: int, tools: Tools | None) -> tuple[Calls, int] | None:
    """The calls of one body.

    Args:
        form: how they are written.
        text: the whole reply.
        place: where the body begins.
        tools: those that were offered; ``None`` where any name will do.
    """
    return {
        "json": _read_json,
        "name_json": _read_name_json,
        "pairs": _read_pairs,
        "python": _read_python,
        "braces": _read_braces,
        "channels": _read_channels,
    }[form.kind](form, text, place, tools)


@cache
def pattern(literal: str) -> re.Pattern[str]:
    """Finds a marker, however it is set in blanks; a call's own id may be any."""
    parts = re.split(f"({IDENTIFIER}|\\s+)", literal.strip())
    written = (r"[\w.:-]{0,100}" if p == IDENTIFIER else r"\s*" if p.isspace() else re.escape(p) for p in parts)
    return re.compile(rf"\s*{''.join(written)}\s*")


def opening_pattern(form: CallForm) -> re.Pattern[str]:
    """Finds the beginning of a call."""
    return _RECEIVER if form.kind == "channels" else pattern(form.begin)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a field appears twice")
    return dict(pairs)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_refuse)


def _decoded(text: str, place: int) -> tuple[Any, int] | None:
    try:
        return _DECODER.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None


def _after_blanks(text: str, place: int) -> int:
    return place + len(text[place:]) - len(text[place:].lstrip())


def _read_json(form: CallForm, text: str, place: int, tools: Tools | None) -> tuple[Calls, int] | None:
    decoded = _decoded(text, _after_blanks(text, place))
    if decoded is None:
        return None
    value, end = decoded
    entries = value if isinstance(value, list) else [value]
    if not entries or (isinstance(value, list) and not form.is_list):
        return None
    calls = [_named(form, entry) for entry in entries]
    complete = [call for call in calls if call is not None]
    return (complete, end) if len(complete) == len(calls) else None


def _named(form: CallForm, entry: Any) -> tuple[str, Any] | None:
    if not isinstance(entry, dict) or entry.get("type", "function") != "function":
        return None
    name, arguments = form.keys
    if not name:
        return next(iter(entry.items())) if len(entry) == 1 else None
    fits = name in entry and arguments in entry and set(entry) - MORE_KEYS <= {name, arguments}
    return (entry[name], entry[arguments]) if fits else None


def _name_at(text: str, place: int, tools: Tools | None) -> tuple[str, int] | None:
    match = re.compile(r"\s*([A-Za-z0-9_-]{1,64})").match(text, place)
    if match is None or (tools is not None and match[1] not in tools):
        return None
    return match[1], match.end()


def _read_name_json(form: CallForm, text: str, place: int, tools: Tools | None) -> tuple[Calls, int] | None:
    named = _name_at(text, place, tools)
    separator = named and pattern(form.separator).match(text, named[1])
    decoded = separator and _decoded(text, separator.end())
    return ([(named[0], decoded[0])], decoded[1]) if named and decoded else None


_RECEIVER = re.compile(r"(?:<\|channel\|>(?:\w+\s+)?)?\s*to=functions\.")


def _read_channels(form: CallForm, text: str, place: int, tools: Tools | None) -> tuple[Calls, int] | None:
    named = _name_at(text, place, tools)
    header = named and re.compile(r"[^{}]*?<\|message\|>\s*").match(text, named[1])
    decoded = header and _decoded(text, header.end())
    return ([(named[0], decoded[0])], decoded[1]) if named and decoded else None


def _read_pairs(form: CallForm, text: str, place: int, tools: Tools | None) -> tuple[Calls, int] | None:
    named = _name_at(text, place, tools)
    start = named and pattern(form.after_name).match(text, named[1])
    if not named or not start:
        return None
    name, end = named[0], start.end() if form.after_name.strip() else named[1]
    before, middle, behind = map(pattern, form.pair)
    properties = ((tools or {}).get(name) or {}).get("properties") or {}
    arguments: dict[str, Any] = {}
    while len(arguments) <= MAX_PAIRS and (opening := before.match(text, end)):
        between = middle.search(text, opening.end())
        closing = between and behind.search(text, between.end())
        if not between or not closing or (key := text[opening.end() : between.start()].strip()) in arguments:
            return None
        arguments[key] = _typed(text[between.end() : closing.start()], properties.get(key))
        end = closing.end()
    return [(name, arguments)], end


def _typed(text: str, schema: Any) -> Any:
    """A value that was written without quotes: text where the tool wants text, else whatever JSON it is."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string":
        return text
    decoded = _decoded(text.strip(), 0)
    if decoded is not None and decoded[1] == len(text.strip()):
        return decoded[0]
    try:
        return _literal(ast.parse(text.strip(), mode="eval").body) if len(text) <= MAX_EXPRESSION else text
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _read_python(form: CallForm, text: str, place: int, tools: Tools | None) -> tuple[Calls, int] | None:
    closing = pattern(form.end).search(text, place) if form.end.strip() else None
    end = closing.start() if closing else len(text)
    source = text[place:end].strip()
    if not 0 < len(source) <= MAX_EXPRESSION:
        return None
    try:
        tree = ast.parse(source, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        calls = [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return (calls, end) if calls else None


def _python_call(node: ast.expr) -> tuple[str, Any]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("no call with named arguments")
    return node.func.id, {_key(word): _literal(word.value) for word in node.keywords}


def _key(word: ast.keyword) -> str:
    if word.arg is None:
        raise ValueError("an argument has no name")
    return word.arg


def _literal(node: ast.expr) -> Any:
    """A constant as JSON knows it; models write true and True."""
    if isinstance(node, ast.Name):
        return (
            {"true": True, "false": False, "null": None}[node.id] if node.id in ("true", "false", "null") else _fail()
        )
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(entry) for entry in node.elts]
    if isinstance(node, ast.Dict):
        return {_text(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    return value if value is None or isinstance(value, str | bool | int | float) else _fail()


def _text(node: ast.expr | None) -> str:
    value = ast.literal_eval(node) if node is not None else None
    return value if isinstance(value, str) else _fail()


def _fail() -> Any:
    raise ValueError("no JSON value")


def _read_braces(form: CallForm, text: str, place: int, tools: Tools | None) -> tuple[Calls, int] | None:
    named = _name_at(text, place, tools)
    if named is None or not text.startswith("{", named[1]):
        return None
    # Texts between marks become JSON texts, bare keys get quotes; then the object is JSON.
    pieces = text[named[1] :].split(BRACE_QUOTE)
    written, length = "", 0
    for number, piece in enumerate(pieces):
        length += len(BRACE_QUOTE) if number else 0
        if number % 2:
            written, length = written + json.dumps(piece), length + len(piece)
            continue
        for end in (match.end() for match in re.finditer("}", piece)):
            decoded = _decoded(written + _with_quoted_keys(piece[:end]), 0)
            if decoded is not None:
                return [(named[0], decoded[0])], named[1] + length + end
        written, length = written + _with_quoted_keys(piece), length + len(piece)
    return None


def _with_quoted_keys(text: str) -> str:
    return re.sub(r"([{,]\s*)([\w-]+)\s*:", r'\1"\2":', text)
