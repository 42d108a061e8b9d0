"""Canonical JSON (RFC 8785, "JCS"): one content, one form, in every language.

Numbers are IEEE 754 doubles, written as ECMAScript writes them: the fewest digits that read back as the same double, and no
".0" behind whole ones. Keys are sorted by their UTF-16 code units.
"""

from __future__ import annotations

import math
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any

from edgepatch.errors import PatchFormatError, UntrustedError
from edgepatch.files import strict_json

MAX_DEPTH = 16
MAX_WHOLE = 2**53 - 1
"""The largest whole number that every JSON reader keeps."""


def canonical_json(value: object, max_depth: int = MAX_DEPTH) -> bytes:
    """The canonical form.

    Args:
        value: None, a bool, text, number, list or tuple, or dict with texts as keys.
        max_depth: levels of nesting.

    Raises:
        PatchFormatError: a value that JSON has not (NaN, an infinity, half a surrogate pair, a key that is no text), a whole
            number beyond ``MAX_WHOLE``, or deeper nesting.
    """
    try:
        return _text(value, max_depth).encode("utf-8")
    except UnicodeEncodeError:
        raise PatchFormatError("JSON: expected Unicode text, found half a surrogate pair") from None


def _text(value: object, levels: int) -> str:
    """The value as text; so many levels of nesting are left to it."""
    if isinstance(value, str):
        return encode_basestring(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return _number(value)
    if levels == 0:
        raise PatchFormatError("JSON: expected fewer levels of nesting")
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        # Code units and code points are in the same order for ASCII, which most keys are.
        keys = sorted(value, key=None if "".join(value).isascii() else lambda key: key.encode("utf-16-be"))
        return "{" + ",".join([f"{encode_basestring(key)}:{_text(value[key], levels - 1)}" for key in keys]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([_text(entry, levels - 1) for entry in value]) + "]"
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
    significand, point = (
        "".join(map(str, digits)),
        len(digits) + int(exponent),
    )  # the value is 0.SIGNIFICAND times 10**point
    return "-" * sign + _place(significand, point)


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
    """The value of a patch's or bundle's JSON, canonical or not.

    Args:
        data: bytes of bounded size; the caller sets the bound.
        what: names them in errors.

    Raises:
        PatchFormatError: no JSON, a key twice in an object, a number that is no double, or nesting deeper than ``MAX_DEPTH``.
    """
    try:
        return strict_json.loads(data, max_depth=MAX_DEPTH, whole=_whole)
    except ValueError as error:
        raise PatchFormatError(f"not an edgepatch file: {what} is no readable JSON: {str(error)[:120]}") from None


def parse_canonical(data: bytes, what: str, max_depth: int = MAX_DEPTH) -> Any:
    """The value of JSON that must be in canonical form: writing it again must give the same bytes.

    Args:
        data: bytes of bounded size; the caller sets the bound.
        what: names them in errors.
        max_depth: levels of nesting.

    Raises:
        UntrustedError: not JSON, or in another form: somebody else than its maker wrote it.
    """
    try:
        value = strict_json.loads(data, max_depth=max_depth, whole=_whole)
        canonical = canonical_json(value, max_depth)
    except (ValueError, PatchFormatError) as error:
        raise UntrustedError(what, "canonical JSON", str(error)[:120]) from None
    if canonical != data:
        place = next(i for i in range(len(data) + 1) if canonical[i : i + 1] != data[i : i + 1])
        raise UntrustedError(what, "canonical JSON (RFC 8785)", f"another form at byte {place}")
    return value


def _whole(text: str) -> int | float:
    """Digits alone are the same number as any other spelling of that double: 10 and 10.0 are one value."""
    if len(text) > 17 or abs(int(text)) > MAX_WHOLE:
        return strict_json.finite(text)
    return int(text)
