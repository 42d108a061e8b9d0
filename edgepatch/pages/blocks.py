"""What a page holds, as values: only the template knows how each looks in HTML.

A block, a chart or a section that holds nothing is false, and the page leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from edgepatch.pages.charts import Chart
from edgepatch.pages.numbers import format_number

Row = Mapping[str, Any]
LONGEST_FACT = 12  # values: of a longer list a page tells only how many there are
MANY_SECTIONS = 5
VERDICTS = {"met": "met", "passed": "met", "missed": "missed", "failed": "missed"}  # what a cell says -> its style


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        interval: both ends of the interval of the figure in ``text``.
        note: a further line.
        tip: shown where the pointer rests.
        style: a class of the style sheet.
        heat: per cent of colour behind it.
    """

    text: str
    interval: tuple[str, str] | None = None
    note: str = ""
    tip: str = ""
    style: str = ""
    heat: int | None = None


Column = str | Callable[[Row], str | Cell]


@dataclass(frozen=True)
class Table:
    """A table; its first ``num_names`` columns hold names."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    num_names: int = 1
    style: str = ""

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, each text as a cell."""
        return [
            [cell if isinstance(cell, Cell) else Cell(cell, style=VERDICTS.get(cell, "")) for cell in row]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Paragraph:
    """Words, the first of them perhaps strong."""

    kind: ClassVar[str] = "paragraph"
    text: str
    strong: str = ""


@dataclass(frozen=True)
class Code:
    """What is typed into a terminal; nothing where there is no text."""

    kind: ClassVar[str] = "code"
    text: str

    def __bool__(self) -> bool:
        return bool(self.text)


@dataclass(frozen=True)
class Facts:
    """Names and values, as a list."""

    kind: ClassVar[str] = "facts"
    values: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Name and value as text."""
        return [(str(name), _fact(value)) for name, value in self.values.items()]


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_fact(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)} values" if len(value) > LONGEST_FACT else ", ".join(map(_fact, value))
    return str(value)


@dataclass(frozen=True)
class Charts:
    """Charts side by side, as many as the page is wide for."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]

    def __bool__(self) -> bool:
        return any(self.charts)


@dataclass(frozen=True)
class Answers:
    """What the bare and the patched model said: (side, score, texts) of each."""

    kind: ClassVar[str] = "answers"
    sides: Sequence[tuple[str, str, Sequence[str]]]


@dataclass(frozen=True)
class Details:
    """Blocks behind a title, closed until they are asked for."""

    kind: ClassVar[str] = "details"
    title: str
    blocks: Sequence[Block]

    def __bool__(self) -> bool:
        return any(self.blocks)


Block = Table | Paragraph | Code | Facts | Charts | Answers | Details


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    title: str
    blocks: Sequence[Block]

    def __bool__(self) -> bool:
        return any(self.blocks)

    @property
    def anchor(self) -> str:
        """The fragment that links to it."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: of the window.
        sections: below each other.
        heading: the finding; default: the title.
        kicker, lead: a line above the heading, and one below.
        about: what stands on the first screen: which model, how large, what for, by which command, on which machine, when.
        is_wide: for tables that need a landscape page.
    """

    title: str
    sections: Sequence[Section]
    heading: str = ""
    kicker: str = ""
    lead: str = ""
    about: Mapping[str, str] = field(default_factory=dict)
    is_wide: bool = False

    @property
    def contents(self) -> list[Section]:
        """The sections that links stand for: all of a page that is too long to be seen at once, else none."""
        sections = [section for section in self.sections if section]
        return sections if len(sections) >= MANY_SECTIONS else []


# Tables from rows of figures.


def estimate(row: Row, field: str, digits: int = 3, scale: float = 1) -> Cell:
    """A figure with its interval, from ``field``, ``field_low`` and ``field_high``; a dash for what was not measured."""
    ends = [row.get(f"{field}_{end}") for end in ("low", "high")]
    low, high = (format_number(end, digits, scale) for end in ends)
    has_interval = row.get(field) is not None and ends != [None, None]
    return Cell(format_number(row.get(field), digits, scale), (low, high) if has_interval else None)


def figure(field: str, digits: int = 3, scale: float = 1) -> Callable[[Row], Cell]:
    """A column of figures with their intervals."""
    return lambda row: estimate(row, field, digits, scale)


def number(field: str, digits: int = 3) -> Callable[[Row], str]:
    """A column of numbers without intervals."""
    return lambda row: format_number(row.get(field), digits)


def listing(caption: str, rows: Sequence[Row], columns: Mapping[str, Column], num_names: int = 1) -> Table:
    """A table with a line for each row.

    Args:
        caption: above it.
        rows: what is listed.
        columns: head -> the field whose text it shows, or what makes its cell of a row.
        num_names: how many first columns hold names.
    """
    lines = [[str(row[get]) if isinstance(get, str) else get(row) for get in columns.values()] for row in rows]
    return Table(caption, list(columns), lines, num_names)
