"""Numbers as pages and tables write them."""

from __future__ import annotations

import math


def as_number(value: object) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def format_number(value: object, digits: int = 3, scale: float = 1) -> str:
    """A number with fixed digits, in a unit ``scale`` times smaller; a dash for what was not measured."""
    number = as_number(value)
    return "\u2013" if number is None else f"{number * scale:,.{digits}f}"
