"""Checks requests, and says in one sentence which field cannot be used, what was expected there and what was found."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from edgepatch.server.refusals import Refusal
from edgepatch.server.schemas.base import RequestModel, as_integer
from edgepatch.server.schemas.requests import ChatCompletionRequest, CompletionRequest
from edgepatch.server.schemas.response_requests import ResponseRequest

Model = TypeVar("Model", bound=RequestModel)

EXPECTED = {
    "string_type": "text",
    "string_unicode": "valid Unicode",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "a boolean",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "greater_than": "more than {gt}",
    "string_pattern_mismatch": "text like {pattern}",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
}
"""The kinds of problems that pydantic finds -> what was expected; those that the schemas raise bring it along."""

TAGS = {"wrong_role": "role", "wrong_type": "type"}
"""Kinds of problems with the field that tells one kind of object from others -> that field."""

LENGTHS = ("string_too_short", "string_too_long", "too_short", "too_long", "too_many")
KINDS = {
    dict: "an object",
    list: "a list",
}
MAX_EXCERPT = 60

_building = threading.Lock()


def build_models() -> None:
    """Builds the validators, once; two threads must not do it at the same time."""
    with _building:
        for model in (ChatCompletionRequest, CompletionRequest, ResponseRequest):
            model.model_rebuild()


def checked(model: type[Model], values: dict[str, Any]) -> Model:
    """The request that a body holds.

    Raises:
        Refusal: a field is unknown, missing or cannot be used; the first one is named.
    """
    build_models()
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # There are few, whatever a client sends: an unknown field is looked for first, and lists end with their first problem.
        raise _refusal(error.errors(include_url=False)[0]) from None


def excerpt(value: object) -> str:
    """A value as an error message names it: short, and without what a client might have put there in bulk."""
    if isinstance(value, (dict, list)):
        return f"{KINDS[type(value)]} of {len(value)}"
    text = repr(value)
    return text if len(text) <= MAX_EXCERPT else f"{text[:MAX_EXCERPT]}..."


def _refusal(problem: ErrorDetails) -> Refusal:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    field, expected = context.get("field", ""), EXPECTED.get(kind, problem["msg"])
    if kind in TAGS and isinstance(value, dict):
        field = TAGS[kind]
    elif kind in TAGS:
        expected = "an object"
    path = _path([*problem["loc"], field] if field else problem["loc"])
    if kind == "missing" or (kind in TAGS and field and field not in value):
        return Refusal(400, f"{path}: the field {path} is missing", path, "missing_field")
    if kind == "unknown_field":
        return Refusal(400, f"{path}: unknown field {excerpt(field)}: expected {expected}", path, kind)
    bounds = {name: as_integer(bound) for name, bound in context.items()}  # "at most 2", not "2.0"
    message = f"expected {expected.format(**bounds)}, found {_actual(kind, value[field] if field else value)}"
    return Refusal(400, f"{path}: {message}" if path else message, path, "invalid_value")


def _actual(kind: str, value: Any) -> str:
    if kind == "string_unicode":
        return "an unpaired surrogate"
    if kind in LENGTHS:
        return str(len(value) or "none: it is empty")
    return excerpt(value)


def _path(parts: Any) -> str:
    """Names and places from the body down ("messages.0.role"), without the marks of pydantic's own: tags, and "[key]"."""
    names = [str(part) for part in parts if not (isinstance(part, str) and part[:1] + part[-1:] in ("<>", "[]"))]
    return ".".join(name if len(name) <= MAX_EXCERPT else f"{name[:MAX_EXCERPT]}..." for name in names)
