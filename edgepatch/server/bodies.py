"""From a request's bytes to a JSON object that any two programs read alike."""

from __future__ import annotations

import json
from typing import Any

from edgepatch.files.strict_json import finite
from edgepatch.server.refusals import Refusal

MAX_DEPTH = 64
"""Of a body: far below what makes the programs behind us run out of stack."""

MAX_DIGITS = 20
"""Of a whole number: the largest that any field takes has 19."""


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a request's body holds.

    Raises:
        Refusal: the body is no JSON object, or one that no two programs read alike.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=finite,
            object_pairs_hook=_with_plain_names,
        )
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise Refusal(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if _is_deep(value, MAX_DEPTH):
        raise Refusal(
            400, f"the body: expected at most {MAX_DEPTH} levels, found more deeply nested ones", code="invalid_json"
        )
    if not isinstance(value, dict):
        raise Refusal(400, f"the body: expected a JSON object, found {type(value).__name__}", code="invalid_json")
    return value


def _is_deep(value: object, left: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left < 0 or any(_is_deep(entry, left - 1) for entry in inner if isinstance(entry, (dict, list)))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"expected whole numbers of at most {MAX_DIGITS} digits, found {len(text)}")
    return int(text)


def _with_plain_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field appears twice")
    return values
