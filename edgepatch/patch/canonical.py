"""Canonical JSON (RFC 8785, "JCS"): one content, one form, in every language.

Numbers are IEEE 754 doubles, written as ECMAScript writes them: the fewest digits that read back as the same double, and no
".0" behind whole ones. Keys are sorted by their UTF-16 code units.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from edgepatch.errors import PatchFormatError

MAX_DEPTH = 16
MAX_WHOLE = 2**53 - 1
"""The largest whole number that every JSON reader keeps."""


def canonical_json(value: object) -> bytes:
    """The canonical form.

    Raises:
        PatchFormatError: a value that JSON has not (NaN, an infinity, half a surrogate pair, a key that is no text), a whole
            number beyond ``MAX_WHOLE``, or nesting deeper than ``MAX_DEPTH``.
    """
    try:
        return _text(value, 0).encode("utf-8")
    except UnicodeEncodeError:
        raise PatchFormatError("JSON: expected Unicode text, found half a surrogate pair") from None


def _text(value: object, depth: int) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (int, float)):
        return _number(value)
    if depth == MAX_DEPTH:
        raise PatchFormatError(f"JSON: expected at most {MAX_DEPTH} levels of nesting")
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{_text(key, 0)}:{_text(value[key], depth + 1)}" for key in keys) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(entry, depth + 1) for entry in value) + "]"
    raise PatchFormatError(f"JSON: expected texts, numbers, lists and objects with texts as keys, found {value!r:.80}")


def _number(value: int | float) -> str:
    """Source: ECMA-262, Number::toString, which RFC 8785 section 3.2.2.3 cites."""
    if isinstance(value, int):
        if abs(value) > MAX_WHOLE:
            raise PatchFormatError(
                f"JSON: expected whole numbers up to {MAX_WHOLE}, found {value:#x}"[:120], "write it as a text"
            )
        return str(int(value))
    if not math.isfinite(value):
        raise PatchFormatError(f"JSON: expected finite numbers, found {value}")
    if value == 0:
        return "0"  # also of minus zero
    sign, digits, exponent = Decimal(float.__repr__(value)).normalize().as_tuple()
    shown, point = "".join(map(str, digits)), len(digits) + int(exponent)  # the value is 0.SHOWN times 10**point
    return "-" * sign + _place(shown, point)


def _place(digits: str, point: int) -> str:
    if len(digits) <= point <= 21:
        return digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return "0." + "0" * -point + digits
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{digits[0]}{fraction}e{point - 1:+d}"


# Reading.


def parse_json(data: bytes, what: str) -> Any:
    """The value of bounded JSON in UTF-8, canonical or not.

    Args:
        data: bytes of bounded size; the caller sets the bound.
        what: names them in errors.

    Raises:
        PatchFormatError: no JSON, a key twice in an object, a number that is no double, or nesting deeper than ``MAX_DEPTH``.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
        )
    except PatchFormatError as error:
        raise PatchFormatError(f"{what}: {error}") from None
    except (ValueError, RecursionError):
        raise PatchFormatError(f"not an edgepatch file: {what} is no readable JSON") from None
    if _depth(value) > MAX_DEPTH:
        raise PatchFormatError(f"{what}: expected at most {MAX_DEPTH} levels of nesting")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise PatchFormatError("a key appears twice")
    return dict(pairs)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise PatchFormatError(f"expected finite numbers, found {text:.40}")
    return float(text)


def _whole(text: str) -> int | float:
    """Digits alone are the same number as any other spelling of that double: 10 and 10.0 are one value."""
    if len(text) > 17 or abs(int(text)) > MAX_WHOLE:
        return _finite(text)
    return int(text)


def _depth(value: Any) -> int:
    """Levels of nesting; without recursion, because a file says how deep it is."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, (dict, list))]:
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth
