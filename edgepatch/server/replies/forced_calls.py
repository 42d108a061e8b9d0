"""Constraints under which a reply is exactly one call, valid against its schema, in the form that the model was taught."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgepatch.decoding.constraints import JSON_OPTIONS, Constraint
from edgepatch.decoding.json_schemas import closed, moved
from edgepatch.text.call_forms import HERMES, IDENTIFIER, CallForm

Functions = Mapping[str, Mapping[str, Any]]
"""Name -> JSON Schema of the arguments."""

PLAIN_TEXT = r"/[^<]*/"
"""A text between markers, all of which begin with "<"."""


def force_call(
    functions: Functions, forms: Sequence[CallForm], special: Mapping[str, int], thought_end: str = ""
) -> Constraint:
    """The constraint of one call of one of some functions.

    Args:
        functions: those that may be called.
        forms: how the model writes calls; where none of them can be forced, the call is written as Hermes does.
        special: ids of special tokens, which have no text of their own.
        thought_end: marker that closes the thought in which the reply begins; empty where it begins in none.
    """
    form = next((form for form in forms if _can_force(form, functions)), HERMES)
    rules = _Rules(special)
    calls = [rules.call(form, name, schema) for name, schema in functions.items()]
    if form.kind == "json" and form.is_list:
        calls = [f'"[" ({" | ".join(calls)}) "]"']
    body = f"{rules.text(_literal(form.begin))} ({' | '.join(calls)}) {rules.text(_literal(form.end))}"
    return Constraint("lark", f"start: {_thought(rules, thought_end)}{body}\n" + "\n".join(rules.lines))


def after_thought(schema: str, special: Mapping[str, int], thought_end: str, lead: str = "") -> Constraint:
    """JSON that follows a schema, once the thought in which the reply begins is closed, with markers in front of it."""
    rules = _Rules(special)
    body = f"{rules.text(lead)} {rules.json(json.loads(schema))}"
    return Constraint("lark", f"start: {_thought(rules, thought_end)}{body}\n" + "\n".join(rules.lines))


def _thought(rules: _Rules, end: str) -> str:
    if not end:
        return ""
    if end in rules.special:
        rules.lines.append("thought: /(?s:.)*/")
        return f"thought {rules.text(end)} "
    rules.lines.append(f"thought[lazy]: /(?s:.)*{_escaped(end)}\\s*/")
    return "thought "


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _can_force(form: CallForm, functions: Functions) -> bool:
    if form.kind == "pairs":
        return IDENTIFIER not in "".join(form.pair) and all(map(_has_plain_texts, functions.values()))
    return form.kind in ("json", "name_json")


def _has_plain_texts(schema: Mapping[str, Any]) -> bool:
    """Whether every argument is one of those that can be forced between markers."""
    closed = {"type", "properties", "required", "additionalProperties", "description", "title", "$schema", "strict"}
    properties = schema.get("properties") or {}
    return (
        set(schema) <= closed
        and all(isinstance(value, Mapping) for value in properties.values())
        and set(schema.get("required") or ()) <= set(properties)
        and all(
            isinstance(value.get("type"), str)
            and (value["type"] != "string" or set(value) <= {"type", "description", "title", "default", "enum"})
            for value in properties.values()
        )
    )


def _literal(text: str) -> str:
    """A marker as it is written, a call's own id in it the same for all."""
    return text.replace(f":{IDENTIFIER}", ":0").replace(IDENTIFIER, "call00001")


class _Rules:
    """Rules of one grammar in llguidance's own syntax.

    Args:
        special: ids of special tokens.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = special
        self.lines: list[str] = []
        present = sorted((name for name in special if name), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, present))})") if present else None

    def text(self, literal: str) -> str:
        """A marker: special tokens by their ids, the rest as text."""
        parts = self._cut.split(literal) if self._cut else [literal]
        return " ".join(
            f"<[{self.special[part]}]>" if part in self.special else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def json(self, schema: Mapping[str, Any]) -> str:
        """A rule for a JSON value."""
        name = f"value_{len(self.lines)}"
        options = {"x-guidance": JSON_OPTIONS}
        self.lines.append(f"{name}: %json {json.dumps({**closed(schema), **options}, ensure_ascii=False)}")
        return name

    def call(self, form: CallForm, name: str, schema: Mapping[str, Any]) -> str:
        """One call of one function."""
        arguments = {"type": "object", **schema}
        if form.kind == "name_json":
            return f"{self.text(name + _literal(form.separator))} {self.json(arguments)}"
        if form.kind == "pairs":
            return f"{self.text(name)} {self._pairs(form, arguments)}"
        name_key, arguments_key = form.keys if form.keys[0] else ("", name)
        fields: dict[str, Any] = {name_key: {"const": name}} if name_key else {}
        fields[arguments_key] = moved(arguments, f"/properties/{arguments_key}")
        return self.json(
            {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        )

    def _pairs(self, form: CallForm, schema: Mapping[str, Any]) -> str:
        before, middle, behind = form.pair
        parts = [self.text(form.after_name)] if form.after_name else []
        for key, value in (schema.get("properties") or {}).items():
            pair = f"{self.text(before + key + middle)} {self._value(value)} {self.text(behind)}"
            parts.append(pair if key in (schema.get("required") or ()) else f"({pair})?")
        return " ".join(parts)

    def _value(self, schema: Mapping[str, Any]) -> str:
        if schema["type"] != "string":
            return self.json(schema)
        if schema.get("enum"):
            return "(" + " | ".join(json.dumps(str(value), ensure_ascii=False) for value in schema["enum"]) + ")"
        return PLAIN_TEXT
