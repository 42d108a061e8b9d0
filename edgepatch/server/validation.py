"""The part of JSON Schema that the request schemas use, so that what is published is what is checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Schema = Mapping[str, Any]

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}
MAX_SHOWN = 60
NESTED_FIT = 2


@dataclass(frozen=True)
class Problem:
    """The first thing that is wrong with a value.

    Attributes:
        path: where it lies ("messages.0.role").
        message: expected and found.
        code: "unknown_field", "missing_field" or "invalid_value".
        kind: a wrong "type" or "tag" (a ``const``) says that another alternative was meant; anything else is a wrong "value".
    """

    path: str
    message: str
    code: str = "invalid_value"
    kind: Literal["type", "tag", "value"] = "value"


def shown(value: object) -> str:
    """A value as an error message names it: short, and without what a client might have put there in bulk."""
    if isinstance(value, (dict, list)):
        return f"{NAMES[type(value)]} of {len(value)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def first_problem(value: object, schema: Schema, path: str = "") -> Problem | None:
    """What is wrong with a value, or ``None``."""
    return next(_problems(value, schema, path), None)


def _matches(value: object, name: str) -> bool:
    if name in ("integer", "number") and isinstance(value, bool):
        return False
    if name == "integer" and isinstance(value, float):
        return value.is_integer()  # JSON has one kind of number: 1.0 is an integer
    return isinstance(value, TYPES[name])


def _problems(value: object, schema: Schema, path: str) -> Iterator[Problem]:
    if "anyOf" in schema:
        yield from _of_alternatives(value, schema["anyOf"], path)
        return
    if "const" in schema and value != schema["const"]:
        yield Problem(path, f"expected {schema['const']!r}, found {shown(value)}", kind="tag")
    if "enum" in schema and value not in schema["enum"]:
        wanted = ", ".join(repr(v) for v in schema["enum"] if v is not None)
        yield Problem(path, f"expected one of {wanted}, found {shown(value)}")
    names = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if names and not any(_matches(value, name) for name in names):
        yield Problem(
            path, f"expected {' or '.join(n for n in names if n != 'null')}, found {shown(value)}", kind="type"
        )
    elif isinstance(value, dict):
        yield from _of_object(value, schema, path)
    elif isinstance(value, list):
        yield from _of_list(value, schema, path)
    elif isinstance(value, str):
        yield from _of_text(value, schema, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from _of_number(value, schema, path)


def _of_alternatives(value: object, schemas: list[Schema], path: str) -> Iterator[Problem]:
    problems = [first_problem(value, schema, path) for schema in schemas]
    found = [problem for problem in problems if problem is not None]
    if len(found) < len(schemas):
        return
    best = max(_fit(problem, path) for problem in found)
    meant = [problem for problem in found if _fit(problem, path) == best]
    if best >= NESTED_FIT:
        yield meant[0]
        return
    wanted = dict.fromkeys(p.message.removeprefix("expected ").split(", found ")[0] for p in meant)
    last = meant[0].message.split(", found ")[-1]
    yield Problem(meant[0].path, f"expected {' or '.join(wanted)}, found {last}", kind=meant[0].kind)


def _fit(problem: Problem, path: str) -> int:
    """How near a value comes to the alternative in which it has this problem."""
    depth = problem.path.count(".") - path.count(".") + (not path and bool(problem.path))
    if problem.kind == "type":
        return NESTED_FIT if depth else 0
    return 1 if problem.kind == "tag" and depth <= 1 else NESTED_FIT + 1


def _of_object(value: dict[str, object], schema: Schema, path: str) -> Iterator[Problem]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    tags = [name for name in properties if "const" in properties[name]]
    for name in [*tags, *(n for n in value if n not in tags)]:
        inner = f"{path}.{name}" if path else name
        if name in properties:
            if name in value:
                yield from _problems(value[name], properties[name], inner)
            continue
        if others is False:
            yield Problem(
                inner, f"unknown field {shown(name)}: expected one of {', '.join(properties)}", "unknown_field"
            )
            continue
        pattern = schema.get("propertyNames", {}).get("pattern")
        if pattern and not re.search(pattern, name):
            yield Problem(inner, f"expected a name like {pattern}, found {shown(name)}")
        if isinstance(others, Mapping):
            yield from _problems(value[name], others, inner)
    for name in schema.get("required", ()):
        if name not in value:
            inner = f"{path}.{name}" if path else name
            yield Problem(inner, f"the field {inner} is missing", "missing_field")
    if len(value) > schema.get("maxProperties", math.inf):
        yield Problem(path, f"expected at most {schema['maxProperties']} entries, found {len(value)}")


def _of_list(value: list[object], schema: Schema, path: str) -> Iterator[Problem]:
    yield from _of_length(len(value), "Items", "entries", schema, path)
    for i, entry in enumerate(value if "items" in schema else ()):
        yield from _problems(entry, schema["items"], f"{path}.{i}" if path else str(i))


def _of_length(length: int, suffix: str, unit: str, schema: Schema, path: str) -> Iterator[Problem]:
    least, most = schema.get(f"min{suffix}", 0), schema.get(f"max{suffix}", math.inf)
    if length < least:
        yield Problem(path, f"expected at least {least} {unit}, found {length or 'none: it is empty'}")
    if length > most:
        yield Problem(path, f"expected at most {most} {unit}, found {length}")


def _of_text(value: str, schema: Schema, path: str) -> Iterator[Problem]:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        yield Problem(path, "expected valid Unicode, found an unpaired surrogate")
    yield from _of_length(len(value), "Length", "characters", schema, path)
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield Problem(path, f"expected text like {schema['pattern']}, found {shown(value)}")


def _of_number(value: float, schema: Schema, path: str) -> Iterator[Problem]:
    if not math.isfinite(value):
        yield Problem(path, f"expected a finite number, found {value}")
    least, most, above = (schema.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
    if least is not None and value < least:
        yield Problem(path, f"expected at least {least}, found {value}")
    if most is not None and value > most:
        yield Problem(path, f"expected at most {most}, found {value}")
    if above is not None and value <= above:
        yield Problem(path, f"expected more than {above}, found {value}")
