"""Schemas as replies are made of them: closed where they say nothing, and at home in another place."""

import json

import pytest

from edgepatch.decoding.constraints import Constraint, compile_here
from edgepatch.decoding.json_schemas import closed, moved

TOWN = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
SHUT = {**TOWN, "additionalProperties": False}
CLOSED = {
    "an object": (TOWN, SHUT),
    "in lists and definitions": (
        {"type": "array", "items": {"$ref": "#/$defs/Town"}, "$defs": {"Town": TOWN}},
        {"type": "array", "items": {"$ref": "#/$defs/Town"}, "$defs": {"Town": SHUT}},
    ),
    "one of several": ({"anyOf": [TOWN, {"type": "null"}]}, {"anyOf": [SHUT, {"type": "null"}]}),
    "inside an open one": (
        {"type": "object", "properties": {"town": TOWN}, "additionalProperties": {"items": TOWN}},
        {"type": "object", "properties": {"town": SHUT}, "additionalProperties": {"items": SHUT}},
    ),
}
UNCHANGED = {
    "any object": {"type": "object"},
    "says so": {**TOWN, "additionalProperties": True},
    "by pattern": {**TOWN, "patternProperties": {"^x": {}}},
    "required beyond": {**TOWN, "required": ["name", "size"]},
    "at least": {**TOWN, "minProperties": 2},
    "all of": {"allOf": [TOWN, {"type": "object", "properties": {"size": {}}, "required": ["size"]}]},
    "all of, elsewhere": {
        "items": {"$ref": "#/$defs/T"},
        "$defs": {"T": TOWN, "U": {"allOf": [{"$ref": "#/$defs/T"}, {}]}},
    },
    "beside alternatives": {**TOWN, "anyOf": [{"properties": {"size": {}}, "required": ["size"]}, {}]},
    "beside a reference": {**TOWN, "$ref": "#/$defs/T", "$defs": {"T": {"properties": {"size": {}}}}},
    "values, not schemas": {"const": TOWN, "enum": [TOWN], "default": TOWN},
}


@pytest.mark.parametrize("kind", CLOSED)
def test_what_says_nothing_of_others_is_closed(kind):
    schema, expected = CLOSED[kind]
    before = json.dumps(schema)
    assert closed(schema) == expected
    assert json.dumps(schema) == before


@pytest.mark.parametrize("kind", UNCHANGED)
def test_what_says_itself_or_is_said_of_by_several_stays(kind):
    assert closed(UNCHANGED[kind]) == UNCHANGED[kind]


def test_references_hold_in_another_place():
    inner = {"type": "object", "properties": {"to": {"$ref": "#/$defs/T"}}, "$defs": {"T": {"enum": ["a"]}}}
    outer = {"type": "object", "properties": {"f": moved(inner, "/properties/f")}, "required": ["f"]}
    assert outer["properties"]["f"]["properties"]["to"] == {"$ref": "#/properties/f/$defs/T"}
    compile_here({"kind": "json_schema", "definition": Constraint("json_schema", json.dumps(outer)).definition})
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}, "$ref": {"type": "string"}}}
    assert moved(tree, "/x")["properties"] == {"next": {"$ref": "#/x"}, "$ref": {"type": "string"}}
