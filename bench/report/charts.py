"""Pictures of the results: retention, safety over perplexity, bars of one timing test, growth curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgepatch.bench.latency.growth import Curve, model_name
from edgepatch.bench.report.tables import ARM_NAMES, rows_of
from edgepatch.pages.blocks import Row
from edgepatch.pages.charts import NUM_MARKS, Axis, Bar, Bars, Plot, Point, Series, categories
from edgepatch.pages.numbers import format_number

ARMS = ("lora_r1", "lora_r16", "patch", "patch_q4_k_m", "patch_all", "kv")  # each has a mark of its own
OTHER_ARM = NUM_MARKS - 1  # the mark of all other arms
HIGHEST, RETENTION_GOAL, PERPLEXITY_GOAL = 1.5, 0.95, 2.0
SCATTER_COLUMNS = ("torch F32", "llamacpp Q4_K_M")


def retention_plot(rows: Sequence[Row], domain: str) -> Plot:
    """Retention with its interval, a group of marks a column; what was not measured is not drawn."""
    own = [
        row
        for row in rows_of(rows, domain)
        if row["arm"] in ARMS and row["retention"] is not None and row["route"] != "decoded"
    ]
    columns = list(dict.fromkeys(row["column"] for row in own))
    series = [
        Series(
            ARM_NAMES[arm],
            [
                _retention(row, columns.index(row["column"]) + (mark + 1) / (len(ARMS) + 1))
                for row in own
                if row["arm"] == arm
            ],
            mark,
        )
        for mark, arm in enumerate(ARMS)
    ]
    x = categories([column.replace(" ", "\n", 1) for column in columns])
    y = Axis(0, HIGHEST, [(t, f"{t:g}") for t in (0, 0.5, 1, 1.5)], has_grid=True, goal=RETENTION_GOAL)
    caption = f"{domain}: gain there / gain at full precision, seed stored; dashed: {RETENTION_GOAL}"
    return Plot(caption, series, x, y, 1180, 310, note="whiskers: 95 % interval")


def _retention(row: Row, x: float) -> Point:
    low, high = row["retention_low"] or 0.0, row["retention_high"] or HIGHEST  # an end without a value is infinite
    title = f"{ARM_NAMES[row['arm']]} on {row['column']}: {row['retention']:.3f} ({low:.3f} to {high:.3f})"
    return Point(x, row["retention"], (low, high), title)


def scatter_plot(rows: Sequence[Row], domain: str) -> Plot:
    """Score against the change of benign perplexity, at full precision and at Q4_K_M; low and left is best."""
    own = [
        row
        for row in rows_of(rows, domain)
        if row["column"] in SCATTER_COLUMNS
        and row["route"] != "decoded"
        and row["score"] is not None
        and row["perplexity_change"] is not None
    ]
    series = [Series("", [_scored(row)], ARMS.index(row["arm"]) if row["arm"] in ARMS else OTHER_ARM) for row in own]
    changes = [row["perplexity_change"] for row in own]
    least, most = min([0.0, *changes]), max([PERPLEXITY_GOAL, *changes])
    ticks = [(value, f"{value:+.1f} %") for value in (least, 0.0, most)]
    x = Axis(least - 0.5, most + 0.5, ticks, goal=PERPLEXITY_GOAL)
    y = Axis(0, 1, [(t / 4, f"{t / 4:g}") for t in range(5)], has_grid=True)
    caption = f"{domain}: score over change of perplexity (marks as above; dashed: goal)"
    return Plot(caption, series, x, y, 360, 340, left=40)


def _scored(row: Row) -> Point:
    name, change = ARM_NAMES[row["arm"]], row["perplexity_change"]
    title = f"{name} on {row['column']}: score {row['score']:.3f} at {change:+.2f} %"
    return Point(change, row["score"], None, title, "" if row["arm"] in ARMS else name)


def measure_name(row: Row) -> str:
    """What a row measures, with its sizes."""
    sizes = (("n_prompt", "prompt of"), ("n_gen", "generated"), ("n_depth", "behind"))
    parts = [
        f"{name} {row[field]}"
        for field, name in sizes
        if row.get(field) and not (field == "n_gen" and row.get("measure") == "ttft")
    ]
    return ", ".join([str(row.get("measure")), *parts])


def bar_chart(rows: Sequence[Row]) -> Bars:
    """One test, a bar an arm: the median, and a line from the fastest to the slowest repeat. What was not measured says why.

    Args:
        rows: of one model and one test, at least one.
    """
    caption = f"{measure_name(rows[0])} ({model_name(rows[0])}): median, fastest to slowest repeat; shorter is faster"
    return Bars(caption, [_timed_bar(row) for row in rows])


def _timed_bar(row: Row) -> Bar:
    style = "bare" if row["arm"] == "bare" else "patched"
    if row.get("status") != "ok":
        return Bar(str(row["arm"]), None, status(row), style=style)
    text = f"{format_number(row['median_ms'], 1)} ms"
    return Bar(str(row["arm"]), row["median_ms"], text, (row["min_ms"], row["max_ms"]), style)


def status(row: Row) -> str:
    """Why a row holds no figure."""
    return " ".join(str(row[field]) for field in ("status", "reason") if row.get(field))


def growth_chart(curves: Sequence[Curve]) -> Plot:
    """Curves of one quantity, cost and model, an arm each, both axes logarithmic; a point at zero stands at the left edge.

    Args:
        curves: at least one; as many are drawn as there are marks, the table has all.
    """
    drawn = curves[:NUM_MARKS]
    points = [point for curve in drawn for point in curve.points]
    places = sorted({point.x for point in points})
    smallest = next(place for place in places if place > 0)
    edge = smallest / 2 if places[0] == 0 else smallest
    low, high = min(point.low for point in points) * 0.9, max(point.high for point in points) * 1.1
    x = Axis(edge, places[-1], [(place, f"{place:g}") for place in places], drawn[0].quantity, is_log=True)
    y = Axis(low, high, [(tick, f"{tick:g}") for tick in _decades(low, high)], is_log=True, has_grid=True)
    series = [
        Series(
            curve.arm,
            [Point(p.x, p.median, (p.low, p.high), f"{curve.arm}: {p.median:.3g} ms at {p.x:g}") for p in curve.points],
            mark,
            is_joined=True,
        )
        for mark, curve in enumerate(drawn)
    ]
    return Plot(f"{drawn[0].cost} in ms over {drawn[0].quantity} ({drawn[0].model})", series, x, y)


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... between two positive numbers, at most about six."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for e in exponents for m in (1, 2, 5) if low <= (tick := m * 10.0**e) <= high]
    return ticks if len(ticks) < 7 else [tick for tick in ticks if math.log10(tick) % 1 < 1e-9] or ticks[::3]
