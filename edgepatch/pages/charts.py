"""Three pictures, as values that the template draws: ``Plot`` (points with intervals over two axes), ``Bars``, and ``curve``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from edgepatch.pages.numbers import as_number

NUM_MARKS = 7  # shapes that can be told apart
NARROW = 360
"""Coordinates across, at which the text of a picture can be read on a phone; a wider picture scrolls there."""


@dataclass(frozen=True)
class Axis:
    """A scale from ``low`` to ``high``; what lies beyond is drawn at the end.

    Attributes:
        ticks: (value, label); a label may have lines.
        title: what it measures.
        is_log: whether equal ratios, not equal differences, are equally long.
        has_grid: whether a line runs through each tick.
        goal: a dashed line runs through it.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    title: str = ""
    is_log: bool = False
    has_grid: bool = False
    goal: float | None = None

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high end."""
        low, high, inside = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, inside = math.log(low), math.log(high), math.log(inside)
        return (inside - low) / (high - low or 1.0)


def categories(labels: Sequence[str]) -> Axis:
    """An axis of names; the i-th of them lies from i to i + 1."""
    return Axis(0, len(labels), [(i + 0.5, label) for i, label in enumerate(labels)])


@dataclass(frozen=True)
class Point:
    """A point: the ends of its interval, what it says where the pointer rests, and what is written above it."""

    x: float
    y: float
    ends: tuple[float, float] | None = None
    title: str = ""
    label: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        name: in the key.
        points: drawn in this order.
        mark: whose shape, not its colour alone, tells the series: below ``NUM_MARKS``; None draws no marks.
        style: class of the style sheet; default: the colour of the mark.
        is_joined: whether a line runs through the points.
    """

    name: str
    points: Sequence[Point]
    mark: int | None = None
    style: str = ""
    is_joined: bool = False


@dataclass(frozen=True)
class Plot:
    """Points with intervals, and lines through them.

    Attributes:
        caption: above it.
        series: drawn in this order; those with a name are in the key.
        x, y: the axes across and up.
        width, height: of its coordinates.
        left: room for the labels of ``y``.
        is_sideways: whether intervals lie across, with the labels of ``y`` above its rows.
        note: behind the key.
        summary: what it shows, in words; default: the titles of the points. Without any there is nothing to show.
    """

    kind: ClassVar[str] = "plot"
    caption: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    width: int = NARROW
    height: int = 270
    left: int = 48
    is_sideways: bool = False
    note: str = ""
    summary: str = ""

    def __bool__(self) -> bool:
        return bool(self.words)

    @property
    def is_wide(self) -> bool:
        """Whether it scrolls on a phone."""
        return self.width > NARROW

    @property
    def words(self) -> str:
        """The same in words."""
        return self.summary or "; ".join(point.title for each in self.series for point in each.points if point.title)

    @property
    def right(self) -> int:
        """Where the axis across ends."""
        return self.width - 16

    @property
    def bottom(self) -> int:
        """Where the axis up begins: above the labels and the title of the other."""
        num_lines = max((label.count("\n") + 1 for _, label in self.x.ticks), default=0) + bool(self.x.title)
        return self.height - 15 * num_lines - 8

    def across(self, value: float) -> float:
        """Of a value on ``x``."""
        return round(self.left + self.x.share(value) * (self.right - self.left), 1)

    def up(self, value: float) -> float:
        """Of a value on ``y``."""
        return round(self.bottom - self.y.share(value) * (self.bottom - 22), 1)


def curve(values: Sequence[object], title: str) -> Plot:
    """One training curve, its first and last values in the caption; empty for fewer than two values."""
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if len(numbers) < 2:
        return Plot(title, (), Axis(0, 1), Axis(0, 1))
    low, high, end = min(numbers), max(numbers), len(numbers) - 1
    caption = f"{title}: {numbers[0]:.3f} \u2192 {numbers[-1]:.3f}"
    x = Axis(0, end, [(0.9 * end, f"{len(numbers)} steps")])
    y = Axis(low, high, [(low, f"{low:.3f}"), (high, f"{high:.3f}")], has_grid=True)
    series = Series("", [Point(i, number) for i, number in enumerate(numbers)], style="patched", is_joined=True)
    return Plot(caption, [series], x, y, height=180, left=60, summary=caption)


@dataclass(frozen=True)
class Bar:
    """A bar: its value (None where there is none), what is written behind it, and the ends of a line over it."""

    label: str
    value: float | None
    text: str
    ends: tuple[float, float] | None = None
    style: str = "patched"

    @property
    def reach(self) -> float:
        """How far it is drawn."""
        return max(self.value or 0.0, *(self.ends or (0.0,)))


@dataclass(frozen=True)
class Bars:
    """Bars below each other, from 0; a dashed line runs through the goal."""

    kind: ClassVar[str] = "bars"
    caption: str
    rows: Sequence[Bar]
    goal: float = 0.0
    width: int = NARROW
    pitch: ClassVar[int] = 42
    is_wide: ClassVar[bool] = False

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def height(self) -> int:
        """Of its coordinates."""
        return self.pitch * len(self.rows) + 6

    @property
    def words(self) -> str:
        """The same in words."""
        return "; ".join(f"{bar.label} {bar.text}" for bar in self.rows)

    def across(self, value: float) -> float:
        """Of a value."""
        most = max([self.goal, *(bar.reach for bar in self.rows)])
        return round((self.width - 10) * value / most if most > 0 else 0.0, 1)


Chart = Plot | Bars
