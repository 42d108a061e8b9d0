"""JSON Schemas as replies are made of them: nothing is written that a schema merely does not forbid, and references go on holding in another place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
COMBINING = (
    "allOf",
    "not",
    "if",
    "dependentSchemas",
    "dependencies",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
)
"""What makes several schemas speak of one object, so that closing one of them closes it to the others."""

ALTERNATIVES = ("anyOf", "oneOf", "$ref")
OPEN = ("additionalProperties", "patternProperties", "minProperties")
"""What says itself which other properties there may be."""

BY_NAME, ONE, MANY = (
    ("properties", "$defs", "definitions"),
    ("items", "contains", "additionalProperties"),
    ("prefixItems", "anyOf", "oneOf"),
)
"""Where schemas stand in a schema."""


def closed(schema: Schema) -> Schema:
    """A schema that allows no properties but those it names, where it says nothing of others.

    A reply that fits it fits the schema as it was. Without this, a small model goes on to properties of its own and finds no end;
    llama.cpp and other engines read schemas in the same way. A schema in which several speak of one object stays as it is.
    """
    return _closed(schema) if all(map(_stands_alone, _inside(schema))) else schema


def moved(schema: Schema, place: str) -> Schema:
    """A schema whose references hold where it stands at a place of another one.

    Args:
        schema: whose references ("#/$defs/Town") begin at its own root.
        place: a JSON pointer to it ("/properties/arguments").
    """
    moved_schema: Schema = _moved(schema, place)
    return moved_schema


def _moved(value: Any, place: str) -> Any:
    if isinstance(value, list):
        return [_moved(entry, place) for entry in value]
    if not isinstance(value, Mapping):
        return value
    return {
        name: f"#{place}{entry[1:]}"
        if name == "$ref" and isinstance(entry, str) and entry.startswith("#")
        else _moved(entry, place)
        for name, entry in value.items()
    }


def _parts(schema: Schema) -> Iterator[tuple[str, Any, Any]]:
    """(keyword, name or place in it, schema) of those directly in a schema."""
    for keyword in BY_NAME:
        if isinstance(entries := schema.get(keyword), Mapping):
            yield from ((keyword, name, entry) for name, entry in entries.items() if isinstance(entry, Mapping))
    for keyword in ONE:
        if isinstance(entry := schema.get(keyword), Mapping):
            yield keyword, None, entry
    for keyword in MANY:
        if isinstance(entries := schema.get(keyword), list):
            yield from ((keyword, place, entry) for place, entry in enumerate(entries) if isinstance(entry, Mapping))


def _inside(schema: Schema) -> Iterator[Schema]:
    yield schema
    for _, _, part in _parts(schema):
        yield from _inside(part)


def _stands_alone(schema: Schema) -> bool:
    combines = any(keyword in schema for keyword in COMBINING)
    return not combines and not ("properties" in schema and any(keyword in schema for keyword in ALTERNATIVES))


def _closed(schema: Schema) -> dict[str, Any]:
    result: dict[str, Any] = dict(schema)
    for keyword, place, part in _parts(schema):
        if place is None:
            result[keyword] = _closed(part)
        else:
            copy = result[keyword] if result[keyword] is not schema[keyword] else schema[keyword].copy()
            copy[place] = _closed(part)
            result[keyword] = copy
    names = schema.get("properties")
    says_nothing = not any(keyword in schema for keyword in OPEN)
    if isinstance(names, Mapping) and says_nothing and set(schema.get("required") or ()) <= set(names):
        result["additionalProperties"] = False
    return result
