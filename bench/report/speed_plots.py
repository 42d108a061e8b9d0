"""Pictures of the latency bench: bars of one test, and growth curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from edgepatch.bench.latency.growth import Curve, Row, model_name
from edgepatch.bench.report.evidence_plots import mark
from edgepatch.bench.report.parts import Block, picture
from edgepatch.pages import format_number

BAR_LEFT, BAR_WIDTH, BAR_RIGHT, BAR_HEIGHT = 210, 300, 130, 28
GROWTH_SIZE, GROWTH_LEFT, GROWTH_BOTTOM = (440, 300), 58, 46
MAX_SERIES = 7
"""Marks that can be told apart by their shape."""


def measure_name(row: Row) -> str:
    """What a row measures, with its sizes."""
    sizes = (("n_prompt", "prompt of"), ("n_gen", "generated"), ("n_depth", "behind"))
    found = [
        f"{name} {row[field]}"
        for field, name in sizes
        if row.get(field) and not (field == "n_gen" and row.get("measure") == "ttft")
    ]
    return ", ".join([str(row.get("measure")), *found])


def _status(row: Row) -> str:
    return " ".join(str(row[field]) for field in ("status", "reason") if row.get(field))


def _bar(row: Row, index: int, scale: float) -> str:
    y = index * BAR_HEIGHT
    label = f'<text x="0" y="{y + 19}">{escape(str(row["arm"]))}</text>'
    if row.get("status") != "ok":
        return f'{label}<text class="soft" x="{BAR_LEFT}" y="{y + 19}">{escape(_status(row))}</text>'
    median, low, high = (float(row[name]) for name in ("median_ms", "min_ms", "max_ms"))
    kind = "bare" if row["arm"] == "bare" else "patched"
    ends = f"M{BAR_LEFT + low * scale:.1f} {y + 14}H{BAR_LEFT + high * scale:.1f}"
    return (
        f'{label}<rect class="{kind}" x="{BAR_LEFT}" y="{y + 6}" width="{median * scale:.1f}" height="16" fill-opacity=".35"/>'
        f'<path class="{kind}" stroke-width="2" d="{ends}"/>'
        f'<text class="soft" x="{BAR_LEFT + high * scale + 6:.1f}" y="{y + 19}">{format_number(median, 1)} ms</text>'
    )


def bar_chart(rows: Sequence[Row]) -> Block:
    """One test, a bar an arm: the median, and a line from the fastest to the slowest repeat. What was not measured says why.

    Args:
        rows: of one model and one test, at least one.
    """
    most = max((float(row["max_ms"]) for row in rows if row.get("status") == "ok"), default=0.0)
    scale = BAR_WIDTH / most if most > 0 else 0.0
    body = "".join(_bar(row, i, scale) for i, row in enumerate(rows))
    told = "; ".join(
        f"{row['arm']} {format_number(row['median_ms'], 1)} ms"
        if row.get("status") == "ok"
        else f"{row['arm']}: {_status(row)}"
        for row in rows
    )
    caption = f"{measure_name(rows[0])} ({model_name(rows[0])}): median, fastest to slowest repeat; shorter is faster"
    return picture(caption, (BAR_LEFT + BAR_WIDTH + BAR_RIGHT, BAR_HEIGHT * len(rows) + 6), body, told)


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two positive numbers, at most about six."""
    ticks = [
        m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
    ]
    found = [tick for tick in ticks if low <= tick <= high]
    return found if len(found) < 7 else [tick for tick in found if math.log10(tick) % 1 < 1e-9] or found[::3]


def growth_chart(curves: Sequence[Curve]) -> Block:
    """Curves of one quantity, cost and model, an arm each, both axes logarithmic; a point at zero stands at the left edge.

    Args:
        curves: at least one; the first seven are drawn, the table has all.
    """
    drawn = curves[:MAX_SERIES]
    (width, height), left, bottom = GROWTH_SIZE, GROWTH_LEFT, GROWTH_BOTTOM
    points = [point for curve in drawn for point in curve.points]
    smallest = min(point.x for point in points if point.x > 0)
    edge = smallest / 2 if any(point.x == 0 for point in points) else smallest
    spans = (
        (math.log(edge), math.log(max(point.x for point in points))),
        (math.log(min(point.low for point in points) * 0.9), math.log(max(point.high for point in points) * 1.1)),
    )

    def at(value: float, span: tuple[float, float], start: float, end: float) -> float:
        return start + (end - start) * (math.log(value) - span[0]) / ((span[1] - span[0]) or 1.0)

    def x(value: float) -> float:
        return at(max(value, edge), spans[0], left + 10, width - 16)

    def y(value: float) -> float:
        return at(value, spans[1], height - bottom, 12)

    ticks = "".join(
        f'<path class="grid" d="M{left} {y(t):.1f}H{width}"/><text class="soft" x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in _decades(math.exp(spans[1][0]), math.exp(spans[1][1]))
    )
    ticks += "".join(
        f'<text class="soft" x="{x(v):.1f}" y="{height - bottom + 18}" text-anchor="middle">{v:g}</text>'
        for v in sorted({p.x for p in points})
    )
    body = [
        ticks,
        f'<text class="soft" x="{(left + width) / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(drawn[0].quantity)}</text>',
    ]
    for index, curve in enumerate(drawn):
        path = " ".join(f"{x(point.x):.1f},{y(point.median):.1f}" for point in curve.points)
        body.append(f'<g class="c{index}"><polyline class="curve" stroke="currentColor" points="{path}"/></g>')
        for point in curve.points:
            body.append(f'<path class="mark c{index}" d="M{x(point.x):.1f} {y(point.low):.1f}V{y(point.high):.1f}"/>')
            body.append(mark(index, x(point.x), y(point.median), f"{curve.arm}: {point.median:.3g} ms at {point.x:g}"))
    told = "; ".join(f"{c.arm}: " + ", ".join(f"{p.median:.3g} ms at {p.x:g}" for p in c.points) for c in drawn)
    caption = f"{drawn[0].cost} in ms over {drawn[0].quantity} ({drawn[0].model})"
    key = "".join(
        f'<span><svg viewBox="0 0 14 14" aria-hidden="true" style="display:inline;width:1em">{mark(i, 7, 7, curve.arm)}</svg> {escape(curve.arm)}</span>'
        for i, curve in enumerate(drawn)
    )
    return Block(
        picture(caption, GROWTH_SIZE, "".join(body), told).html.replace("<svg", f'<div class="key">{key}</div><svg', 1)
    )
