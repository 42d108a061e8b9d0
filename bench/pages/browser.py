"""Chromium without a window: pictures of a page, and what a script in it measures."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.processes.programs import run_program

VARIABLE = "EDGEPATCH_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DEADLINE_S = 240
PROBE = Path(__file__).parent / "probe.js"
FACTS = re.compile(r'<script type="application/json" id="facts">(.*?)</script>', re.DOTALL)
FRAME = """<!DOCTYPE html><html style="color-scheme: light dark"><body style="margin: 0">
<script>addEventListener("message", (told) => {{
  const facts = document.createElement("script");
  facts.type = "application/json"; facts.id = "facts"; facts.textContent = told.data.replaceAll("<", "\\u003c");
  document.body.append(facts);
}});</script>
<iframe src="page.html" style="border: 0; width: {width}px; height: {height}px"></iframe></body></html>
"""
"""A window is at least 500 pixels wide; a frame in it is as wide as a phone."""

DARK = {True: "--blink-settings=preferredColorScheme=0", False: "--blink-settings=preferredColorScheme=1"}


@dataclass(frozen=True)
class View:
    """How a page is looked at: columns and rows in pixels, and whether the user prefers dark colours."""

    width: int
    height: int
    is_dark: bool = False

    def __str__(self) -> str:
        return f"{self.width}{'-dark' if self.is_dark else ''}"


def find_browser(named: Path | None = None) -> Path:
    """The browser that is named, else that of ``EDGEPATCH_CHROMIUM``, else the first of ``NAMES`` that is installed.

    Raises:
        InputError: there is none.
    """
    choice = named or os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if choice is None or not Path(choice).is_file():
        raise InputError(
            f"expected Chromium, found {choice or 'none of ' + ', '.join(NAMES)}",
            hint=f"install it, or name its program in {VARIABLE}",
        )
    return Path(choice)


def draw(browser: Path, page: Path, view: View, picture: Path) -> None:
    """Writes what the page looks like as a PNG.

    Raises:
        EdgepatchError: the browser failed.
    """
    _run(browser, view, f"--screenshot={picture.resolve()}", page.resolve().as_uri())
    if not picture.is_file():
        raise EdgepatchError(f"{browser} drew nothing of {page}", hint="start it by hand to see why")


def measure(browser: Path, page: Path, view: View, axe: Path | None = None) -> dict[str, Any]:
    """What ``probe.js`` measures in a copy of the page: its sizes, and with axe-core what keeps people from using it.

    Raises:
        EdgepatchError: the browser failed.
    """
    scripts = [path.read_text("utf-8").replace("</script", "<\\/script") for path in filter(None, (axe, PROBE))]
    probed = page.read_text("utf-8").replace(
        "</body>", "".join(f"<script>{text}</script>" for text in scripts) + "</body>"
    )
    with tempfile.TemporaryDirectory(prefix="edgepatch-") as name:
        frame = Path(name) / "frame.html"
        frame.write_text(FRAME.format(width=view.width, height=view.height), encoding="utf-8")
        frame.with_name("page.html").write_text(probed, encoding="utf-8")
        tree = _run(browser, view, "--virtual-time-budget=60000", "--dump-dom", frame.as_uri())
    told = FACTS.search(tree)
    if told is None:
        raise EdgepatchError(f"{page}: the browser has measured nothing", hint="start it by hand to see why")
    facts: dict[str, Any] = json.loads(told[1])
    return facts


def _run(browser: Path, view: View, *words: str) -> str:
    with tempfile.TemporaryDirectory(prefix="edgepatch-", ignore_cleanup_errors=True) as profile:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}")
        size = f"--window-size={view.width},{view.height}"
        done = run_program([browser, *flags, size, DARK[view.is_dark], *words], deadline_s=DEADLINE_S)
    if done.failure:
        raise EdgepatchError(f"{browser} {done.failure[:300]}", hint="start it by hand to see why")
    return done.output
