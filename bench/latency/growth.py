"""How cost grows: curves from the rows of the latency bench, and the exponent of each, with the range that its repeats allow."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, Any]


class Point(NamedTuple):
    """Milliseconds (median, least, most of the repeats) at ``x``."""

    x: float
    median: float
    low: float
    high: float


class Exponent(NamedTuple):
    """The slope in a double logarithmic plot, and its range when every point lies anywhere within its repeats."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The cost of one arm of one model over one quantity.

    Attributes:
        quantity: what ``x`` is.
        cost: what is measured.
        model: its shape and type.
        arm: the way to run it.
        points: by growing x; at least two.
        base: what is there without the quantity, taken off before the exponent is fitted.
    """

    quantity: str
    cost: str
    model: str
    arm: str
    points: tuple[Point, ...]
    base: float = 0.0


def exponent(points: Sequence[Point], base: float = 0.0) -> Exponent | None:
    """Least squares in logarithms. None for fewer than two points, or where the repeats reach down to the base: that is noise.

    Args:
        points: x above zero.
        base: milliseconds taken off.
    """
    if len(points) < 2 or any(point.x <= 0 or point.low <= base for point in points):
        return None
    x = np.log([point.x for point in points])
    weights = (x - x.mean()) / float(((x - x.mean()) ** 2).sum())
    median, low, high = (
        np.log(np.array([getattr(p, name) for p in points]) - base) for name in ("median", "low", "high")
    )
    steepest, flattest = np.where(weights > 0, high, low), np.where(weights > 0, low, high)
    return Exponent(float(weights @ median), float(weights @ flattest), float(weights @ steepest))


def model_name(row: Row) -> str:
    """Model, type and runtime of a row, as shown."""
    names = [row.get("shape") or row.get("model_type"), row.get("quantization"), row.get("runtime")]
    is_plain = row.get("flash_attn") is not None and not row["flash_attn"]
    return " ".join(str(name) for name in [*names, "no flash attention" if is_plain else ""] if name)


def timed(rows: Sequence[Row], measure: str) -> list[Row]:
    """The rows of a measure that hold a time."""
    return [
        row
        for row in rows
        if row.get("measure") == measure and row.get("status") == "ok" and row.get("median_ms") is not None
    ]


def _point(row: Row, x: float, num_tokens: int = 1) -> Point:
    return Point(x, *(float(row[name]) / num_tokens for name in ("median_ms", "min_ms", "max_ms")))


def _grouped(rows: Sequence[Row], key: Callable[[Row], tuple[Any, ...]]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _over_prompts(rows: Sequence[Row]) -> list[Curve]:
    groups = _grouped(timed(rows, "ttft"), lambda row: (model_name(row), row["arm"]))
    return [
        Curve(
            "prompt tokens",
            "time to first token",
            model,
            arm,
            tuple(sorted(_point(row, row["n_prompt"]) for row in own)),
        )
        for (model, arm), own in groups.items()
    ]


def _over_depths(rows: Sequence[Row]) -> list[Curve]:
    groups = _grouped(timed(rows, "decode"), lambda row: (model_name(row), row["arm"]))
    curves = []
    for (model, arm), own in groups.items():
        points = sorted(_point(row, row["n_depth"], row["n_gen"]) for row in own)
        base = points[0].median if points[0].x == 0 else 0.0
        curves.append(Curve("positions of context", "time of one token", model, arm, tuple(points), base))
    return curves


def _test(row: Row) -> tuple[Any, ...]:
    return row["measure"], row.get("n_prompt"), row.get("n_gen"), row.get("n_depth")


def _cost(test: tuple[Any, ...]) -> str:
    name, *sizes = test
    words = (f"{word} {size}" for word, size in zip(("prompt of", "generated", "behind"), sizes, strict=True) if size)
    return ", ".join([name, *words])


def _over_sizes(rows: Sequence[Row]) -> list[Curve]:
    """Every test of an arm on models of several sizes, of one type on one runtime."""
    groups = _grouped(rows, lambda row: (_test(row), f"{row.get('quantization')} {row.get('runtime')}", row["arm"]))
    return [
        _by_field("parameters, billions", _cost(test), model, arm, own, "model_n_params", 1e9)
        for (test, model, arm), own in groups.items()
    ]


def _over_field(rows: Sequence[Row], field: str, quantity: str) -> list[Curve]:
    """Every test with other values of a field, beside the bare model's time, which is taken off."""
    curves = []
    for (test, model), group in _grouped(rows, lambda row: (_test(row), model_name(row))).items():
        bare = next((float(row["median_ms"]) for row in group if row["arm"] == "bare"), 0.0)
        arms = _grouped(
            [row for row in group if row.get(field)],
            lambda row: (re.sub(r"\d+", "N", row["arm"]) if field == "n_prefix" else "patch",),
        )
        curves += [_by_field(quantity, _cost(test), model, arm, own, field, base=bare) for (arm,), own in arms.items()]
    return curves


def _by_field(
    quantity: str, cost: str, model: str, arm: str, rows: Sequence[Row], field: str, unit: float = 1, base: float = 0.0
) -> Curve:
    points = {row[field]: _point(row, row[field] / unit) for row in rows if row.get(field)}
    return Curve(quantity, cost, model, arm, tuple(points[x] for x in sorted(points)), base)


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Every curve of two points or more: over the prompt, the context, P, the number of patches, the size of the model."""
    whole = [row for measure in dict.fromkeys(str(row.get("measure")) for row in rows) for row in timed(rows, measure)]
    drawn = [
        *_over_prompts(rows),
        *_over_depths(rows),
        *_over_field(whole, "num_virtual_tokens", "virtual tokens (P)"),
        *_over_field(whole, "num_patches", "stacked patches"),
        *_over_field(whole, "n_prefix", "tokens of a text in front"),
        *_over_sizes(whole),
    ]
    return [curve for curve in drawn if len({point.x for point in curve.points}) > 1]


def fitted(curve: Curve) -> Exponent | None:
    """The exponent of a curve, without the point that is its base."""
    return exponent([point for point in curve.points if point.x > 0], curve.base)


def exponent_rows(curves: Sequence[Curve]) -> list[list[str]]:
    """quantity, cost, model, arm, points, exponent and its range; what cannot be told from noise says so."""
    rows = []
    for curve in curves:
        points = ", ".join(f"{point.x:g}: {point.median:.3g} ms" for point in curve.points)
        fit = fitted(curve)
        exponent = (
            "not above noise"
            if fit is None or not math.isfinite(fit.value)
            else f"{fit.value:.2f} [{fit.low:.2f}, {fit.high:.2f}]"
        )
        rows.append([curve.quantity, curve.cost, curve.model, curve.arm, points, exponent])
    return rows


EXPONENT_HEAD = ("grows with", "cost", "model", "arm", "measured", "exponent [range over the repeats]")
