"""The one reader of JSON that somebody else wrote: a key twice, NaN, an infinity, deep nesting and a large file are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.files.reading import read_bounded

MAX_DEPTH = 64
MAX_BYTES = 256 * 2**20


def loads(
    data: bytes, *, max_depth: int = MAX_DEPTH, whole: Callable[[str], int | float] = int, infinite: bool = False
) -> Any:
    """The value of JSON in UTF-8.

    Args:
        data: bytes of bounded size; the caller sets the bound.
        max_depth: levels of nesting.
        whole: reads a number without point or exponent.
        infinite: take the words ``NaN`` and ``Infinity``, which Transformers writes into configs.

    Raises:
        ValueError: it is not JSON (the place is named), a key appears twice in an object (the key is named), a number is no
            double, or it is nested deeper.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=float if infinite else finite,
            parse_float=finite,
            parse_int=whole,
        )
    except RecursionError:
        raise ValueError(f"expected at most {max_depth} levels of nesting") from None
    if _depth(value) > max_depth:
        raise ValueError(f"expected at most {max_depth} levels of nesting")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"a key appears twice: {twice!r:.80}")
    return values


def finite(text: str) -> float:
    """A number as a double.

    Raises:
        ValueError: it is none, or beyond all doubles.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, found {text:.40}")
    return value


def _depth(value: Any) -> int:
    """Levels of nesting; without recursion, because a file says how deep it is."""
    depth, level = 0, [value]
    while level := [entry for entry in level if isinstance(entry, (dict, list))]:
        level = [child for entry in level for child in (entry.values() if isinstance(entry, dict) else entry)]
        depth += 1
    return depth


def read_json(
    path: Path,
    limit: int = MAX_BYTES,
    *,
    what: str = "file",
    hint: str = "get the file again from its maker",
    infinite: bool = False,
) -> dict[str, Any]:
    """The JSON object in a file; a byte order mark in front, which some editors write, is passed over.

    Args:
        path: the file.
        limit: bytes that it may have.
        what: names it in errors ("config").
        hint: what to do where it cannot be used.
        infinite: as of ``loads``.

    Raises:
        InputError: it cannot be read, is larger, or holds no JSON object; the place in it is named.
    """
    data = read_bounded(path, limit, what, hint=hint).removeprefix(b"\xef\xbb\xbf")
    try:
        value = loads(data, infinite=infinite)
    except ValueError as error:
        raise InputError(f"{path} ({what}) is damaged, or no JSON: {error}", hint) from None
    if not isinstance(value, dict):
        raise InputError(f"{path} ({what}) is damaged: expected a JSON object, found {type(value).__name__}", hint)
    return value
