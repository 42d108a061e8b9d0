"""The tables of docs/evidence.md, written between markers; the words around them are the authors'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepatch.bench.evidence.cells import GOAL_COLUMNS, REFERENCE_COLUMN
from edgepatch.bench.report.evidence_plots import ARM_NAMES, scaled
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.pages import format_number

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def _figure(row: Row, field: str, digits: int = 2, scale: float = 1) -> str:
    """ "0.12 [0.10, 0.14]"; a dash for what was not measured."""
    if row.get(field) is None:
        return "\u2013"
    value, low, high = (scaled(row[f"{field}{end}"], digits, scale) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _name(row: Row) -> str:
    return ARM_NAMES[row["arm"]] + (", decoded" if row["route"] == "decoded" else "")


def _matrix(rows: Sequence[Row], domain: str, show: Callable[[Row], str]) -> str:
    """Arms down, columns across."""
    own = [row for row in rows if row["domain"] == domain]
    columns = list(dict.fromkeys(row["column"] for row in own))
    cells = {(_name(row), row["column"]): show(row) for row in own}
    lines = [
        [name, *(cells.get((name, column), "") for column in columns)]
        for name in dict.fromkeys(_name(row) for row in own)
    ]
    return _table(["model", *columns], lines)


def _scores(document: Document) -> str:
    """Score of every cell, a table a domain; its interval is in the page."""
    rows = document["cells"]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    return "\n\n".join(f"**{d}**: score\n\n{_matrix(rows, d, lambda row: _figure(row, 'score'))}" for d in domains)


def _retention(document: Document) -> str:
    rows = [row for row in document["cells"] if row["arm"] not in ("bare",) and row["column"] != REFERENCE_COLUMN]
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    return "\n\n".join(
        f"**{d}**: retention\n\n{_matrix(rows, d, lambda row: _figure(row, 'retention'))}" for d in domains
    )


def _retained(document: Document) -> str:
    rows = [row for row in document["cells"] if row["column"] in GOAL_COLUMNS and row["route"] != "decoded"]
    lines = [
        [
            row["domain"],
            _name(row),
            row["column"],
            format_number(row["perplexity"], 2),
            _figure(row, "perplexity_change", 2),
            _figure(row, "over_refusal", 1, 100),
            _figure(row, "over_refusal_change", 1, 100),
            _figure(row, "negative_flips", 1, 100),
        ]
        for row in rows
    ]
    head = (
        "domain",
        "model",
        "on",
        "perplexity",
        "change, %",
        "over-refusal, %",
        "change, points",
        "negative flips, %",
    )
    return _table(head, lines)


def _goals(document: Document) -> str:
    lines = []
    for goal in document["goals"]:
        low, high = goal["interval"] or (None, None)
        reached = _figure({"r": goal["reached"], "r_low": low, "r_high": high}, "r", 3)
        verdict = "met" if goal["met"] else "**missed**"
        lines.append(
            [
                goal["goal"],
                goal["domain"],
                ARM_NAMES.get(goal["arm"], goal["arm"]),
                goal["column"],
                goal["wanted"],
                reached,
                verdict,
            ]
        )
    return _table(("goal", "domain", "model", "on", "wanted", "reached", "verdict"), lines)


def _composition(document: Document) -> str:
    orders = [
        [
            ARM_NAMES[row["arm"]],
            " + ".join(row["parts"]),
            row["column"],
            row["domain"],
            str(row["num_orders"]),
            _figure(row, "order_sensitivity", 3),
            scaled(row["chance"]),
            scaled(row["p_value"]),
        ]
        for row in document["order_sensitivity"]
    ]
    every = [
        [
            ARM_NAMES[row["arm"]],
            " + ".join(row["parts"]),
            row["column"],
            row["domain"],
            _figure(row, "score"),
            _figure(row, "share_of_single_gain"),
        ]
        for row in document["composition"]
    ]
    first = _table(("patches", "set", "on", "domain", "orders", "order sensitivity", "by chance", "p value"), orders)
    return (
        first + "\n\n" + _table(("patches", "order", "on", "domain", "score", "gain / gain of the single patch"), every)
    )


TABLES: dict[str, Callable[[Document], str]] = {
    "goals": _goals,
    "scores": _scores,
    "retention": _retention,
    "retained": _retained,
    "composition": _composition,
}


def fill_markers(text: str, tables: Mapping[str, str]) -> str:
    """A Markdown text with everything between the markers of each name written anew.

    Raises:
        InputError: a marker is missing.
    """
    for name, table in tables.items():
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, behind = rest.partition(f"<!-- /{name} -->")
        if not opening or not closing:
            raise InputError(f"expected the markers <!-- {name} --> and <!-- /{name} -->, found at most one of them")
        text = f"{before}{opening}{table}\n{closing}{behind}"
    return text


def with_tables(text: str, document: Document) -> str:
    """A Markdown text with every table between its markers written anew.

    Raises:
        InputError: a marker is missing.
    """
    return fill_markers(text, {name: table(document) for name, table in TABLES.items()})


def write_tables(document: Document, path: Path) -> None:
    """Writes the tables into a Markdown file.

    Raises:
        InputError: the file cannot be read, or lacks a marker.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    write_atomically(path, with_tables(text, document).encode())
