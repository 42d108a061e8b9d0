"""Pages of the committed results: what can be read off the HTML, and with a browser what it makes of them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import edgepatch
from edgepatch.bench.pages import browser, run
from edgepatch.bench.report.tables import judged
from edgepatch.errors import InputError

RESULTS = Path(edgepatch.__file__).parent / "bench" / "results"
KINDS = ("report", "evidence", "own", "safety", "curves")
STYLE = (Path(edgepatch.__file__).parent / "pages" / "style.css").read_text("utf-8")
NARROWEST_PX = 390 - 2 * 2 * 0.8 * 16 - 2
"""What a phone leaves between the paddings of the page and of a section."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    return run.write_pages(RESULTS, tmp_path_factory.mktemp("pages"))


def test_every_kind_of_page_is_made(pages):
    assert tuple(sorted(pages)) == tuple(sorted(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_screen_says_the_answer_and_of_what_it_is(pages, kind):
    page = pages[kind].read_text("utf-8")
    answers = {
        "report": "The patch keeps at least 9",
        "evidence": "The patch keeps at least 9",
        "own": "The patch cut expected maximum toxicity",
        "safety": "It ",
        "curves": "SFT loss fell: ",
    }
    assert f"<h1>{answers[kind]}" in page and 'name="viewport"' in page
    about = page[page.index('<dl class="about">') : page.index("</dl>")]
    names = {"made for"} if kind == "curves" else {"model", "command", "machine", "made"}
    assert names <= set(re.findall(r"<dt>([^<]*)</dt>", about))
    if kind in ("report", "evidence", "own"):
        assert "built by this project to be unsafe" in about
    if kind != "curves":
        assert "lower is safer" in about and page.index("<h1>") < page.index("<nav") < page.index("<section")


@pytest.mark.parametrize("kind", ("report", "evidence"))
def test_goals_stand_behind_what_they_judge_and_say_by_how_much(pages, kind):
    page = pages[kind].read_text("utf-8")
    assert page.index('id="goals"') > max(page.index("retention"), page.index("<table"))
    missed = re.findall(r'<td class="missed">missed<small>([^<]*)</small>', page)
    assert len(missed) > 20 and any("at least 0.95 was wanted" in words for words in missed)


@pytest.mark.parametrize(
    ("verdict", "wanted", "reached", "words"),
    [
        ("met", ">= 0.95", "1.0", ""),
        ("missed", ">= 0.95", "0.310 [0.200, 0.400]", "by 0.64: 0.310 where at least 0.95 was wanted"),
        ("missed", "<= 50", "103.4", "by 53.4: 103.4 where at most 50 was wanted"),
        ("missed", "<= +2 %", "3.5 [1.0, 6.0]", "by 1.5: 3.5 where at most +2 was wanted"),
        (
            "missed",
            ">= 0.95, lower end of the interval >= 0.9",
            "1.062 [0.885, 1.295]",
            "the figure reaches it, its interval begins at 0.885",
        ),
        ("missed", ">= 0.95", "\u2013", "not measured"),
        ("missed", "no crash", "3 crashes", ""),
    ],
)
def test_a_missed_goal_in_words(verdict, wanted, reached, words):
    assert judged(verdict, wanted, reached).note == words and judged(verdict, wanted, reached).style == verdict


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_pictures_can_be_read_on_a_phone(pages, kind):
    smallest = min(map(float, re.findall(r"svg[^{]*\{[^}]*font(?:-size)?: ([\d.]+)px", STYLE)))
    pictures = re.findall(
        r'<svg viewBox="0 0 (\d+) \d+" role="img"[^>]* style="([^"]*)"', pages[kind].read_text("utf-8")
    )
    assert pictures
    for width, style in pictures:
        least = re.search(r"min-width: ([\d.]+)px", style)
        drawn = max(NARROWEST_PX, float(least[1]) if least else 0)
        assert smallest * drawn / int(width) >= run.LEAST_TEXT_PX, (width, style)


def test_tables_show_that_they_scroll():
    assert re.search(r"\.wide \{ overflow-x: auto; background:\s+linear-gradient.*?scroll", STYLE, re.DOTALL)


def test_without_a_browser_the_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(browser.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InputError, match="expected Chromium") as caught:
        browser.find_browser()
    assert browser.VARIABLE in str(caught.value.hint)


@pytest.mark.skipif(
    browser.VARIABLE not in os.environ, reason=f"{browser.VARIABLE} names no Chromium to draw pages with"
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_shows_the_page(pages, kind, tmp_path):
    view = run.View(390, 844, is_dark=kind == "safety")
    browser.draw(browser.find_browser(), pages[kind], view, tmp_path / "page.png")
    facts = browser.measure(browser.find_browser(), pages[kind], view)
    assert facts["width"] == 390 and run.judge(facts, view) == []
    assert facts["has_contents"] or facts["height"] <= run.LONG_PX
