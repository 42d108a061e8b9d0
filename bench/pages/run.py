"""Each kind of page, made of the results that are there, looked at in Chromium at three widths, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepatch.bench.pages.browser import View, draw, measure
from edgepatch.bench.report import evidence_page, matrix_page, overview, own_model
from edgepatch.bench.report.files import read_results
from edgepatch.errors import InputError
from edgepatch.files.strict_json import read_json
from edgepatch.files.writing import write_atomically
from edgepatch.processes.programs import run_program
from edgepatch.progress import Progress, silent
from edgepatch.training.config import History
from edgepatch.training.page import write_training_page

AXE = "axe-core@4.14.1"
LEAST_TEXT_PX = 11.0
LONG_PX = 5000
"""From this height on a page has a table of contents."""

WIDTHS = (390, 800, 1280)
FIRST_SCREEN = {390: 844, 800: 1000, 1280: 800}
Row = dict[str, Any]


def write_pages(results: Path, folder: Path) -> dict[str, Path]:
    """Writes a page of each kind whose results are there.

    Args:
        results: holds the JSON files that measurements left.
        folder: for the pages.

    Returns:
        Kind -> file.

    Raises:
        InputError: none is there, or one cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, tuple[Path, Callable[[Mapping[str, Any]], str]]] = {
        "evidence": (results / "evidence.json", evidence_page.render_page),
        "own": (results / "own" / "results.json", matrix_page.render_html),
        "safety": (results / "smollm2.json", own_model.render_page),
    }
    pages = {"report": overview.render_html(read_results(results))}
    pages |= {kind: render(read_json(path)) for kind, (path, render) in makers.items() if path.is_file()}
    files = {kind: folder / f"{kind}.html" for kind in pages}
    for kind, text in pages.items():
        write_atomically(files[kind], text.encode())
    if makers["own"][0].is_file():
        files["curves"] = folder / "curves.html"
        _write_curves(read_json(makers["own"][0]), files["curves"])
    return files


def _write_curves(document: Mapping[str, Any], path: Path) -> None:
    """The page of the training that an own report was measured after."""
    training = document["training"]
    names = History.__dataclass_fields__
    history = History(**{name: training[name] for name in names if isinstance(training.get(name), list)})
    record = {name: value for name, value in training.items() if name not in names}
    write_training_page(history, record, document["patch"]["name"], path)


def fetch_axe(folder: Path) -> Path:
    """axe-core's script, taken from npm's registry into a folder where it is not there.

    Raises:
        InputError: npm is not installed, or finds no such package.
    """
    script = folder / "package" / "axe.min.js"
    if not script.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for command in (["npm", "pack", AXE], ["tar", "xzf", f"{AXE.replace('@', '-')}.tgz"]):
            failure = run_program(command, deadline_s=120, folder=folder).failure
            if failure:
                raise InputError(f"{' '.join(command)} {failure}", hint="name the script itself with --axe")
    return script


def views() -> Iterator[View]:
    """A phone, a tablet, a desktop; each in the light and in the dark."""
    for width in WIDTHS:
        yield View(width, FIRST_SCREEN[width])
        yield View(width, FIRST_SCREEN[width], is_dark=True)


def judge(facts: Row, view: View) -> list[str]:
    """What a page does not keep, in words."""
    text, about = facts["smallest_text_px"], facts["about_ends_at"]
    checks = {
        f"it is {facts['overflow']} px wider than the window": facts["overflow"] <= 0,
        f"the smallest text of a picture has {text} px": text is None or text >= LEAST_TEXT_PX,
        f"{facts['height']} px without a table of contents": facts["height"] <= LONG_PX or facts["has_contents"],
        f"tables that scroll without a sign of it: {facts['uncued']}": not facts["uncued"],
        f"what it is about ends at {about} px": about is not None and about <= view.height,
    }
    return [words for words, holds in checks.items() if not holds] + list(facts.get("violations", ()))


def run(
    results: Path,
    out: Path,
    browser: Path,
    axe: Path | None,
    only: Sequence[str] = (),
    progress: Progress = silent,
) -> list[Row]:
    """Writes pages, pictures and ``pages.json``.

    Args:
        results: holds the JSON files that measurements left.
        out: folder to write to.
        browser: Chromium.
        axe: axe-core's script; ``None`` leaves that check out.
        only: kinds to look at; none for all.
        progress: is told how far it is.

    Returns:
        A row a page and view, each with its ``problems``.

    Raises:
        InputError: results cannot be read.
        EdgepatchError: the browser failed.
    """
    rows: list[Row] = []
    pages = write_pages(results, out)
    unknown = next((kind for kind in only if kind not in pages), None)
    if unknown is not None:
        raise InputError(f"--only: expected one of {', '.join(pages)}, found {unknown}")
    looks = [(kind, page, view) for kind, page in pages.items() if not only or kind in only for view in views()]
    for done, (kind, page, view) in enumerate(looks, 1):
        draw(browser, page, view, out / f"{kind}-{view}.png")
        facts = measure(browser, page, view, axe)
        rows.append({"page": kind, "view": str(view), **facts, "problems": judge(facts, view)})
        progress("pages", done, len(looks))
    write_atomically(out / "pages.json", (json.dumps(rows, indent=1) + "\n").encode())
    return rows
