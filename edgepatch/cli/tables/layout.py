"""Tables as plain lines of the terminal's width.

Words are never broken, nor commands between backticks, so that names, digests and commands can be copied; what is longer than a line
stands on one of its own.
What does not fit side by side is told one below the other, and nothing is padded at the end of a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

GAP = 2
INDENT = 2
LEAST_TEXT = 16
"""Columns of running text are not made narrower: a word a line is no text."""

WORD = re.compile(r"\S*`[^`\n]*`\S*|\S+")
NUMBER = re.compile(r"[-+<>~]?[\d.,]+( ?[%\w/]+)?")
BOLD = Style(bold=True)
Row = Sequence[str]
Column = tuple[str, Row]
Line = list[Segment]


@dataclass(frozen=True)
class TableLines:
    """What rich prints as these lines, for whatever width the terminal has."""

    make: Callable[[int], list[Line]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.make(options.max_width):
            yield from line
            yield Segment.line()


def facts(rows: Sequence[tuple[str, str]]) -> TableLines:
    """Names in front of their values."""
    return TableLines(lambda width: _facts(rows, width))


def paragraph(text: str) -> TableLines:
    """Running text."""
    return TableLines(lambda width: [[Segment(line)] for line in _wrapped(text, width)])


def grid(names: Row, rows: Sequence[Row], droppable: Sequence[str] = ()) -> TableLines:
    """Rows below the names of their columns; empty columns are left out.

    Where the terminal is too narrow for that, the droppable columns go, the first one first; then each row is told as facts.
    """
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]
    columns = {i: (names[i], [row[i] for row in rows]) for i in kept}
    dropped = [[names.index(name) for name in droppable[:count]] for count in range(len(droppable) + 1)]
    choices = [[column for i, column in columns.items() if i not in left_out] for left_out in dropped]
    return TableLines(
        lambda width: (
            next(filter(None, (_grid(choice, width) for choice in choices)), None) or _records(choices[0], width)
        )
    )


def _facts(rows: Sequence[tuple[str, str]], width: int) -> list[Line]:
    room = max((cell_len(name) for name, _ in rows), default=0) + GAP
    lines: list[Line] = []
    for name, value in rows:
        is_beside = _longest_word(value) <= width - room
        parts = _wrapped(value, width - (room if is_beside else INDENT))
        if not is_beside:
            lines.append([Segment(name, BOLD)])
            lines += [[Segment(" " * INDENT + part)] for part in parts]
            continue
        lines.append(_line([(name, room - GAP, BOLD), (parts[0], 0, None)]))
        lines += [_line([("", room - GAP, None), (part, 0, None)]) for part in parts[1:]]
    return lines


def _grid(columns: Sequence[Column], width: int) -> list[Line] | None:
    """Columns side by side; ``None`` where they do not fit."""
    widths = _widths(columns, width)
    if widths is None:
        return None
    is_right = [all(NUMBER.fullmatch(entry) for entry in entries if entry) for _, entries in columns]
    lines = list(_row([name for name, _ in columns], widths, is_right, BOLD))
    for row in zip(*(entries for _, entries in columns), strict=True):
        lines += _row(row, widths, is_right, None)
    return lines


def _records(columns: Sequence[Column], width: int) -> list[Line]:
    lines: list[Line] = []
    for row in zip(*(entries for _, entries in columns), strict=True):
        told = [(name or "#", entry) for (name, _), entry in zip(columns, row, strict=True) if entry]
        lines += [*([[]] if lines else []), *_facts(told, width)]
    return lines


def _widths(columns: Sequence[Column], width: int) -> list[int] | None:
    """Of the columns: as wide as they are, or text narrowed until all fit; ``None`` where they do not."""
    widths = [max(map(cell_len, (name, *entries))) for name, entries in columns]
    least = [max(_longest_word(name), *map(_least, entries)) for name, entries in columns]
    excess = sum(widths) + GAP * (len(widths) - 1) - width
    while excess > 0:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
        if widths[widest] == least[widest]:
            return None
        widths[widest] -= 1
        excess -= 1
    return widths


def _least(entry: str) -> int:
    return max(min(cell_len(entry), LEAST_TEXT), _longest_word(entry))


def _row(entries: Row, widths: Sequence[int], is_right: Sequence[bool], style: Style | None) -> Iterator[Line]:
    columns = [_wrapped(entry, width) for entry, width in zip(entries, widths, strict=True)]
    for i in range(max(map(len, columns))):
        parts = [column[i] if i < len(column) else "" for column in columns]
        aligned = [
            " " * (width - cell_len(part)) * right + part
            for part, width, right in zip(parts, widths, is_right, strict=True)
        ]
        yield _line([(part, width, style) for part, width in zip(aligned, widths, strict=True)])


def _line(parts: Sequence[tuple[str, int, Style | None]]) -> Line:
    """(text, width, style) side by side, without blanks at the end."""
    line: Line = []
    for text, width, style in parts:
        line.append(Segment(text + " " * (width - cell_len(text) + GAP), style))
    while line and not line[-1].text.strip():
        line.pop()
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []


def _longest_word(text: str) -> int:
    return max(map(cell_len, WORD.findall(text)), default=0)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of whole words."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in WORD.findall(paragraph):
            if line and cell_len(line) + 1 + cell_len(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    return lines
