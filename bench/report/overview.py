"""All results on one page: ``edgepatch bench report``; report.html and report.md from the JSON files that are there.

The page needs no network and no script. A file that is missing has a section that says so, with the command that makes it; it never is
an empty picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from edgepatch.bench.report import sections as parts
from edgepatch.bench.report.evidence_page import PAGE_STYLE
from edgepatch.bench.report.files import RESULT_FILES, Document, ResultFile, latency_runs
from edgepatch.bench.report.parts import Block, Section, code, paragraph, table
from edgepatch.errors import InputError
from edgepatch.pages import STYLE, facts
from edgepatch.patch.file import write_atomically

TITLE = "edgepatch: what a patch gives, and what it costs"
OWN_STYLE = """
:root { --c0: #6a48e0; --c1: #1f66b3; --c3: #66730f; --c4: #b8326a; }
@media (prefers-color-scheme: dark) { :root { --c0: #a08cff; --c1: #6cb0ff; --c3: #b5c52f; --c4: #ff82ad; } }
@media print { :root { --c0: #6a48e0; --c1: #1f66b3; --c3: #66730f; --c4: #b8326a; } details { display: block; } nav, .skip { display: none; } }
svg .c0 { color: var(--c0); } svg .c1 { color: var(--c1); } svg .c3 { color: var(--c3); } svg .c4 { color: var(--c4); }
svg .curve { stroke: currentColor; }
table.heat td { background: color-mix(in srgb, var(--bare) calc(var(--heat) * .6%), transparent); } table.heat td small { opacity: 1; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1.4rem; margin: .8rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; } a { color: var(--patched); }
.skip { position: absolute; left: -999px; } .skip:focus { left: 1rem; top: 1rem; background: var(--card); padding: .5rem; }
#goals td { white-space: normal; } figure { break-inside: avoid; } h2 { scroll-margin-top: 1rem; }
"""
DATES = ("created", "date")
ENVIRONMENT = ("environment", "software", "platform", "cpu", "server", "load", "load_average", "meta")
"""Fields of result files that tell on what and under which load they were made."""


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Tells which file is not as it should be: one that another version wrote."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{name}: expected the fields of this version, found {type(error).__name__}: {error}", hint="make it again"
        ) from error


def missing(file: ResultFile) -> list[Block]:
    """What stands in the place of a file that is not there."""
    return [paragraph(f"Not measured: there is no {file.name}. This command makes it:"), code(file.command)]


def goals(results: Mapping[str, Document]) -> list[list[str]]:
    """Every goal of every file: of, goal, on, wanted, reached, verdict."""
    found: list[list[str]] = []
    for name, document in results.items():
        judge = parts.GOALS.get("latency.json" if name.startswith("latency-") else name)
        if judge is not None:
            with _reading(name):
                found += judge(document)
    return found


def _goals(results: Mapping[str, Document]) -> Section:
    found = goals(results)
    missed, met = ([goal for goal in found if goal[-1] == verdict] for verdict in ("missed", "met"))
    blocks = [table(f"{len(missed)} goals that are missed, or not measured", parts.GOAL_HEAD, missed, 3)]
    shown = table(f"{len(met)} goals that are met", parts.GOAL_HEAD, met, 3)
    blocks.append(
        Block(f"<details><summary>{len(met)} goals that are met</summary>{shown.html}</details>", shown.markdown)
        if met
        else shown
    )
    return Section("Goals", tuple(blocks if found else [paragraph("No file that holds a goal is there.")]))


def _speed(results: Mapping[str, Document], file: ResultFile) -> list[Section]:
    runs = latency_runs(results)
    if not runs:
        return [Section("Latency", tuple(missing(file))), Section("Growth", tuple(missing(file)))]
    sections = []
    for name, run in runs.items():
        with _reading(name):
            sections.append(Section(f"Latency: {parts.run_name(run)}", tuple(parts.latency(run))))
    with _reading(", ".join(runs)):
        sections.append(Section("Growth", tuple(parts.growth(all_rows(results)))))
    return sections


def all_rows(results: Mapping[str, Document]) -> list[Mapping[str, Any]]:
    """The rows of every run of the latency bench."""
    return [row for run in latency_runs(results).values() for row in run["rows"]]


def _part(results: Mapping[str, Document], file: ResultFile) -> list[Section]:
    if file.name == "latency.json":
        return _speed(results, file)
    document = results.get(file.name)
    if document is None:
        return [Section(file.title, tuple(missing(file)))]
    with _reading(file.name):
        if file.name == "machine.json":
            return [Section(file.title, tuple(parts.limits(document, all_rows(results))))]
        sections = [Section(file.title, tuple(parts.PARTS[file.name](document)))]
        if file.name == "evidence.json":
            sections.append(Section("Retention", tuple(parts.retention(document))))
        return sections


def _provenance(results: Mapping[str, Document]) -> Section:
    known = {file.name: file.command for file in RESULT_FILES}
    lines, details = [], []
    for name, document in results.items():
        meta = document.get("meta", {})
        command = document.get("command") or meta.get("command") or known[name]
        lines.append(
            [name, next((str(document[f]) for f in DATES if f in document), str(meta.get("date", "\u2013"))), command]
        )
        found = {field: document[field] for field in ENVIRONMENT if field in document}
        details.append(Block(f"<details><summary>{escape(name)}</summary>{facts(found)}</details>" if found else ""))
    absent = [[file.name, "not there", file.command] for file in RESULT_FILES if file.name not in results]
    return Section(
        "Environment and commands",
        (table("What made each file", ("file", "made", "command"), [*lines, *absent], 3), *details),
    )


def sections(results: Mapping[str, Document]) -> list[Section]:
    """The page's sections.

    Args:
        results: name -> document.

    Raises:
        InputError: a document lacks what its section shows.
    """
    return [
        _goals(results),
        *(section for file in RESULT_FILES for section in _part(results, file)),
        _provenance(results),
    ]


def headline(results: Mapping[str, Document]) -> str:
    """How many goals are met, and what is missing."""
    found = goals(results)
    absent = [file.name for file in RESULT_FILES if file.name not in results]
    text = f"{sum(goal[-1] == 'met' for goal in found)} of {len(found)} goals are met."
    return f"{text} Not measured: {', '.join(absent)}." if absent else text


def render_html(results: Mapping[str, Document]) -> str:
    """The page: no script, no reference to another file.

    Raises:
        InputError: as ``sections``.
    """
    made = sections(results)
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in made)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{STYLE}{PAGE_STYLE}{OWN_STYLE}</style></head><body>"
        f'<a class="skip" href="#goals">Skip to the results</a><main><h1>{TITLE}</h1><p>{escape(headline(results))}</p>'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>{"".join(section.html for section in made)}</main></body></html>\n'
    )


def render_markdown(results: Mapping[str, Document]) -> str:
    """The same as Markdown, with tables in the place of pictures.

    Raises:
        InputError: as ``sections``.
    """
    made = [f"# {TITLE}", "Made by `edgepatch bench report`; the pictures are in report.html.", headline(results)]
    return "\n\n".join([*made, *(section.markdown for section in sections(results))]) + "\n"


def write_overview(results: Mapping[str, Document], page: Path) -> Path:
    """Writes the page, and the same as Markdown beside it.

    Args:
        results: name -> document.
        page: the HTML file.

    Returns:
        The Markdown file.

    Raises:
        InputError: as ``sections``, the page is to be named as Markdown, or a file cannot be written.
    """
    text = page.with_suffix(".md")
    if text == page:
        raise InputError(
            f"--out: expected the name of an HTML file, found {page}", hint="the Markdown file is written beside it"
        )
    html, markdown = render_html(results), render_markdown(results)
    write_atomically(page, html.encode())
    write_atomically(text, markdown.encode())
    return text
