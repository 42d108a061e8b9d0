"""All results on one page: ``edgepatch bench report``.

A file that is missing has a section that says so, with the command that makes it; it never is an empty picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgepatch.bench.lab import LAB_IN_WORDS
from edgepatch.bench.report import sections as parts
from edgepatch.bench.report.evidence_page import answer as evidence_answer
from edgepatch.bench.report.files import RESULT_FILES, Document, ResultFile, latency_runs, reading
from edgepatch.pages.blocks import Block, Code, Details, Facts, Page, Paragraph, Row, Section, Table
from edgepatch.pages.rendering import render

Results = Mapping[str, Document]

TITLE = "edgepatch: what a patch gives, and what it costs"
DATES = ("created", "date")
# Fields of result files that tell on what and under which load they were made.
ENVIRONMENT = ("environment", "software", "platform", "cpu", "server", "load", "load_average", "meta")


def goals(results: Results) -> list[list[str]]:
    """Every goal of every file: of, goal, on, wanted, reached, verdict."""
    rows: list[list[str]] = []
    for name, document in results.items():
        judge = parts.GOALS.get("latency.json" if name.startswith("latency-") else name)
        if judge is not None:
            with reading(name):
                rows += judge(document)
    return rows


def _sections(results: Results, file: ResultFile) -> list[Section]:
    """Of one file; of the latency bench, of all its runs."""
    runs = latency_runs(results)
    if not (runs if file.name == "latency.json" else file.name in results):
        text = f"Not measured: there is no {file.name}. This command makes it:"
        return [Section(file.title, [Paragraph(text), Code(file.command)])]
    rows = [row for run in runs.values() for row in run["rows"]]
    if file.name != "latency.json":
        with reading(file.name):
            return _other_sections(results[file.name], file, rows)
    sections = []
    for name, run in runs.items():
        with reading(name):
            sections.append(Section(f"Latency: {parts.run_name(run)}", parts.latency(run)))
    with reading(", ".join(runs)):
        return [*sections, Section("Growth", parts.growth(rows))]


def _other_sections(document: Document, file: ResultFile, rows: Sequence[Row]) -> list[Section]:
    if file.name == "machine.json":
        return [Section(file.title, parts.limits(document, rows))]
    further = [Section("Retention", parts.retention(document))] if file.name == "evidence.json" else []
    return [Section(file.title, parts.PARTS[file.name](document)), *further]


def _provenance(results: Results) -> list[Block]:
    commands = {file.name: file.command for file in RESULT_FILES}
    rows, details = [], []
    for name, document in results.items():
        meta = document.get("meta", {})
        command = document.get("command") or meta.get("command") or commands[name]
        date = next((str(document[field]) for field in DATES if field in document), str(meta.get("date", "\u2013")))
        rows.append([name, date, command])
        details.append(Details(name, [Facts({field: document[field] for field in ENVIRONMENT if field in document})]))
    absent = [[file.name, "not there", file.command] for file in RESULT_FILES if file.name not in results]
    return [Table("What made each file", ("file", "made", "command"), [*rows, *absent], 3), *details]


def sections(results: Results) -> list[Section]:
    """The page's sections.

    Args:
        results: name -> document.

    Raises:
        InputError: a document lacks what its section shows.
    """
    rows = goals(results)
    files = [section for file in RESULT_FILES for section in _sections(results, file)]
    return [
        *files,
        Section("Goals", parts.goal_tables(rows) if rows else [Paragraph("No file that holds a goal is there.")]),
        Section("Environment and commands", _provenance(results)),
    ]


def headline(results: Results) -> str:
    """How many goals are met, and what is missing."""
    rows = goals(results)
    absent = [file.name for file in RESULT_FILES if file.name not in results]
    text = f"{sum(goal[-1] == 'met' for goal in rows)} of {len(rows)} goals are met."
    return f"{text} Not measured: {', '.join(absent)}." if absent else text


def render_html(results: Results) -> str:
    """The page.

    Raises:
        InputError: as ``sections``.
    """
    return render(
        Page(TITLE, sections(results), answer(results) or TITLE, "", headline(results), _about(results), is_wide=True)
    )


def answer(results: Results) -> str:
    """What a patch gives and costs, of the files that are there."""
    told = []
    if "evidence.json" in results:
        with reading("evidence.json"):
            told.append(evidence_answer(results["evidence.json"]))
    if "latency.json" in results:
        with reading("latency.json"):
            told.append(_cost(results["latency.json"]))
    return " ".join(filter(None, told))


def _cost(document: Document) -> str:
    names = {"ttft_patched_over_bare": "to the first token", "decode_patched_over_bare": "of the decode rate"}
    ratios = {words: document["ratios"][name]["value"] for name, words in names.items() if name in document["ratios"]}
    changes = " and ".join(f"{100 * (value - 1):+.1f} % {words}" for words, value in ratios.items())
    return f"It costs {changes} on {parts.run_name(document)}." if changes else ""


def _about(results: Results) -> dict[str, str]:
    """What stands on the first screen; a figure of several files stands with each of them."""
    environments = [document["environment"] for document in results.values() if document.get("environment")]
    machines = dict.fromkeys(str(environment["cpu"]) for environment in environments if environment.get("cpu"))
    dates = sorted(str(document["created"]) for document in results.values() if document.get("created"))
    return {
        "model": f"safety: {LAB_IN_WORDS}; speed: random weights of the shapes that the sections name",
        "measured": "toxicity, gender and harm: lower is safer; times and memory: less is better; rates: more is better",
        "command": "edgepatch bench report",
        "machine": ", ".join(machines),
        "made": " to ".join(dict.fromkeys((dates[0][:10], dates[-1][:10]))) if dates else "",
    }
