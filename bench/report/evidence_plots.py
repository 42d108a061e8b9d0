"""Pictures of the evidence matrix, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgepatch.pages import format_number

Row = Mapping[str, Any]

ARM_NAMES = {
    "bare": "bare M",
    "safe_prompt": "M, safety instruction",
    "reference": "M'",
    "lora_r1": "LoRA r=1",
    "lora_r16": "LoRA r=16",
    "patch": "patch",
    "patch_q4_k_m": "patch for Q4_K_M",
    "patch_all": "patch for all",
    "kv": "trained K/V",
    "composed": "trained apart",
    "joint": "trained together",
}
SERIES = ("lora_r1", "lora_r16", "patch", "patch_q4_k_m", "patch_all", "kv")
WIDTH, LEFT, TOP, HEIGHT = 1180, 60, 30, 220
HIGHEST, GOAL = 1.5, 0.95
SIDE = 360


def scaled(value: float | None, digits: int = 3, scale: float = 1) -> str:
    """A number in another unit; a dash where there is none, as at the end of an interval that has no end."""
    return format_number(None if value is None else scale * value, digits)


def mark(index: int, x: float, y: float, title: str) -> str:
    """A mark whose shape, not its colour alone, tells the series."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill-opacity="0" stroke-width="2"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6Z"/>',
        f'<path d="M{x - 5:.1f} {y + 4:.1f}h10l-5 -9Z"/>',
        f'<path d="M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9Z"/>',
        f'<path stroke-width="2.5" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>',
        f'<path stroke-width="2.5" d="M{x - 6:.1f} {y:.1f}h12m-6 -6v12"/>',
    )
    return f'<g class="mark c{index}"><title>{escape(title)}</title>{shapes[index]}</g>'


def _legend(names: Sequence[str]) -> str:
    entries = (
        f'<span><svg viewBox="0 0 14 14" aria-hidden="true" style="display:inline;width:1em">{mark(i, 7, 7, name)}</svg> {escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="key">{"".join(entries)}<span class="soft">whiskers: 95 % interval</span></div>'


def _height_of(value: float) -> float:
    return TOP + HEIGHT * (1 - min(max(value, 0.0), HIGHEST) / HIGHEST)


def _retention_mark(row: Row, x: float) -> str:
    ends = (row["retention_low"] or 0.0, row["retention_high"] or HIGHEST)  # an end without a value is infinite
    low, high = map(_height_of, ends)
    index = SERIES.index(row["arm"])
    told = f"{ARM_NAMES[row['arm']]}, {row['column']}: {row['retention']:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
    whisker = f'<path class="mark c{index}" stroke-width="1.5" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
    return whisker + mark(index, x, _height_of(row["retention"]), told)


def retention_plot(rows: Sequence[Row], domain: str) -> str:
    """Retention with its interval, a group of marks a column; what was not measured is not drawn."""
    own = [
        r
        for r in rows
        if r["domain"] == domain and r["arm"] in SERIES and r["retention"] is not None and r["route"] != "decoded"
    ]
    if not own:
        return ""
    columns = list(dict.fromkeys(row["column"] for row in own))
    step = (WIDTH - LEFT) / len(columns)
    ticks = "".join(
        f'<path class="grid" d="M{LEFT} {_height_of(t):.1f}H{WIDTH}"/><text class="soft" x="{LEFT - 8}" y="{_height_of(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in (0, 0.5, 1, 1.5)
    )
    labels = "".join(
        f'<text class="soft" x="{LEFT + step * (i + 0.5):.1f}" y="{TOP + HEIGHT + 18 + 15 * j}" text-anchor="middle">{escape(word)}</text>'
        for i, column in enumerate(columns)
        for j, word in enumerate(column.split(" ", 1))
    )
    places = {row["arm"]: (SERIES.index(row["arm"]) + 1) / (len(SERIES) + 1) for row in own}
    marks = "".join(
        _retention_mark(row, LEFT + step * (columns.index(row["column"]) + places[row["arm"]])) for row in own
    )
    told = "; ".join(f"{ARM_NAMES[r['arm']]} on {r['column']} {r['retention']:.2f}" for r in own)
    return (
        f"<figure><figcaption>{escape(domain)}: gain there / gain at full precision, seed stored; dashed: {GOAL}</figcaption>"
        f"{_legend([ARM_NAMES[arm] for arm in SERIES])}"
        f'<svg viewBox="0 0 {WIDTH} {TOP + HEIGHT + 45}" role="img" aria-label="{escape(told)}">{ticks}'
        f'<path class="goal" d="M{LEFT} {_height_of(GOAL):.1f}H{WIDTH}"/>{labels}{marks}</svg></figure>'
    )


def _points(rows: Sequence[Row], domain: str) -> list[Row]:
    columns = ("torch F32", "llamacpp Q4_K_M")
    own = [r for r in rows if r["domain"] == domain and r["column"] in columns and r["route"] != "decoded"]
    return [r for r in own if r["score"] is not None and r["perplexity_change"] is not None]


def scatter_plot(rows: Sequence[Row], domain: str) -> str:
    """Score against the change of benign perplexity, at full precision and at Q4_K_M; low and left is best."""
    points = _points(rows, domain)
    if not points:
        return ""
    changes = [float(row["perplexity_change"]) for row in points]
    low, high = min(0.0, *changes) - 0.5, max(2.0, *changes) + 0.5

    def x(change: float) -> float:
        return 34 + (SIDE - 44) * (change - low) / (high - low)

    def y(score: float) -> float:
        return 10 + (SIDE - 60) * (1 - score)

    ticks = "".join(
        f'<path class="grid" d="M34 {y(t / 4):.1f}H{SIDE - 10}"/><text class="soft" x="28" y="{y(t / 4) + 4:.1f}" text-anchor="end">{t / 4:g}</text>'
        for t in range(5)
    )
    marks = []
    for row in points:
        place = f"{ARM_NAMES[row['arm']]}, {row['column']}"
        title = (
            f"{place}: score {format_number(row['score'])}, perplexity {format_number(row['perplexity_change'], 2)} %"
        )
        index = SERIES.index(row["arm"]) if row["arm"] in SERIES else 6
        marks.append(mark(index, x(row["perplexity_change"]), y(row["score"]), title))
        if index == 6:
            right = x(row["perplexity_change"]) > SIDE / 2
            anchor, shift = ("end", -8) if right else ("start", 8)
            marks.append(
                f'<text class="soft" text-anchor="{anchor}" x="{x(row["perplexity_change"]) + shift:.1f}" y="{y(row["score"]) + 4:.1f}">{escape(ARM_NAMES[row["arm"]])}</text>'
            )
    told = "; ".join(
        f"{ARM_NAMES[r['arm']]} on {r['column']}: score {r['score']:.2f} at {r['perplexity_change']:+.1f} %"
        for r in points
    )
    axis = "".join(
        f'<text class="soft" x="{x(v):.1f}" y="{SIDE - 30}" text-anchor="middle">{v:+.1f} %</text>'
        for v in (low + 0.5, 0.0, high - 0.5)
    )
    return (
        f"<figure><figcaption>{escape(domain)}: score over change of perplexity (marks as above; dashed: goal)</figcaption>"
        f'<svg viewBox="0 0 {SIDE} {SIDE - 20}" role="img" aria-label="{escape(told)}">{ticks}'
        f'<path class="goal" d="M{x(2):.1f} 10V{SIDE - 50}"/>{axis}{"".join(marks)}</svg></figure>'
    )
