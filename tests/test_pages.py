"""The kit of pages: blocks and charts as values, and the HTML that the template makes of them."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest

from edgepatch.errors import MissingExtraError
from edgepatch.pages import rendering
from edgepatch.pages.blocks import (
    MANY_SECTIONS,
    Answers,
    Cell,
    Charts,
    Code,
    Details,
    Facts,
    Page,
    Paragraph,
    Section,
    Table,
    estimate,
)
from edgepatch.pages.charts import NARROW, NUM_MARKS, Axis, Bar, Bars, Plot, Point, Series, categories, curve

EVIL = "\"'><script>&x</script>"


class Whole(HTMLParser):
    """Fails where a tag is not closed; keeps names of tags and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.texts += [value or "" for name, value in attrs if name not in ("id", "href")]  # made of a title's letters
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def every_block(text: str) -> list[Section]:
    """Every kind of block with the text everywhere that a text can stand."""
    cell = Cell(text, (text, text), note=text, tip=text, heat=5)
    axis = Axis(0, 1, [(0.5, text)], text, has_grid=True, goal=0.5)
    series = Series(text, [Point(0.2, 0.8, (0.7, 0.9), text, text)], mark=0)
    blocks = [
        Paragraph(text, text),
        Code(text),
        Facts({text: {text: [text]}}),
        Table(text, [text, text], [[cell, cell]]),
        Charts([Plot(text, [series], axis, axis, note=text), Bars(text, [Bar(text, None, text)])]),
        Answers([("bare", text, [text, ""])]),
    ]
    return [Section(text, [*blocks, Details(text, blocks)])]


def test_every_text_is_escaped_wherever_it_stands():
    page = rendering.render(Page(EVIL, every_block(EVIL), EVIL, EVIL, EVIL, {EVIL: EVIL}))
    plain = rendering.render(Page("word", every_block("word"), "word", "word", "word", {"word": "word"}))
    read, expected = Whole(page), Whole(plain)
    assert "<script" not in page and read.tags == expected.tags
    assert sum(text.count(EVIL) for text in read.texts) == sum(text.count("word") for text in expected.texts) > 50
    assert "(empty)" in page and not re.search(r"https?://|@import|url\(", page)


def test_what_holds_nothing_is_left_out():
    nothing = [
        Table("caption", ["head"], []),
        Code(""),
        Facts({}),
        Charts([curve([1.0], "loss"), Bars("none", [])]),
        Details("closed", [Facts({})]),
    ]
    page = rendering.render(Page("title", [Section("gone", nothing), Section("here", [*nothing, Paragraph("words")])]))
    tags = Whole(page).tags
    assert (
        "gone" not in page and tags.count("section") == 1 and not {"table", "pre", "dl", "svg", "details"} & set(tags)
    )


def test_many_sections_have_contents_and_what_a_page_is_about_stands_in_front():
    sections = [Section(f"Part {i}", [Paragraph("words")]) for i in range(MANY_SECTIONS)]
    page = rendering.render(Page("title", sections, "The answer", about={"model": "tiny", "machine": ""}))
    places = [page.index(text) for text in ("<h1>The answer</h1>", "<dt>model</dt><dd>tiny</dd>", "<nav", "<section")]
    assert places == sorted(places) and "machine" not in page
    assert all(f'href="#part-{i}"' in page and f'id="part-{i}"' in page for i in range(MANY_SECTIONS))
    assert "<nav" not in rendering.render(Page("title", sections[1:]))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_a_picture_wider_than_a_phone_scrolls_there_in_a_region_of_its_own_name():
    series = [Series("", [Point(0, 0, None, "point")], 0)]
    plots = [Plot(f"plot {width}", series, Axis(0, 1), Axis(0, 1), width) for width in (NARROW, 900)]
    page = rendering.render(
        Page("", [Section("here", [Charts(plots), Table("", ["a"], [["b"]]), Table("", ["c"], [["d"]])])])
    )
    assert page.count("min-width") == 1 and 'aria-label="plot 900, picture"' in page
    labels = re.findall(r'role="region" aria-label="([^"]*)"', page)
    assert len(labels) == len(set(labels)) == 3


def test_places_on_axes():
    assert [Axis(0, 10).share(value) for value in (-5, 0, 5, 10, 20)] == [0, 0, 0.5, 1, 1]
    assert [Axis(1, 100, is_log=True).share(value) for value in (0.1, 10, 100)] == pytest.approx([0, 0.5, 1])
    assert Axis(3, 3).share(3) == 0 and categories(["a", "b"]).ticks == [(0.5, "a"), (1.5, "b")]
    plot = Plot("", [], Axis(0, 1, [(0, "one\ntwo")], "title"), Axis(0, 1), width=116, height=175, left=20)
    assert (plot.across(0), plot.across(1), plot.up(1)) == (20, 100, 22)
    assert plot.up(0) == plot.bottom == 175 - 3 * 15 - 8, "above two lines of labels and the title"


def test_a_plot_draws_points_intervals_and_lines():
    points = [Point(0, 0, (0, 1), "first"), Point(1, 1, None, "second")]
    for is_sideways, way in ((False, "V"), (True, "H")):
        series = Series("ours", points, NUM_MARKS - 1, is_joined=True)
        page = rendering.render(
            Page("", [Section("", [Charts([Plot("", [series], Axis(0, 1), Axis(0, 1), is_sideways=is_sideways)])])])
        )
        assert page.count("<polyline") == 1 and len(re.findall(rf'whisker c6" d="M\S+ \S+{way}', page)) == 1
        assert page.count('class="mark c6"') == 3, "two, and one in the key"
        assert 'aria-label="first; second"' in page


def test_bars_are_as_long_as_their_values():
    bars = Bars("", [Bar("long", 2.0, "2 ms", (1.0, 4.0)), Bar("short", 1.0, "1 ms"), Bar("none", None, "not there")])
    page = rendering.render(Page("", [Section("", [Charts([bars])])]))
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', page)]
    assert widths == [175, 87.5] and "none: not there" in page, "the longest interval reaches to the end, 350"
    assert Bars("", [Bar("zero", 0.0, "0")]).across(0.0) == 0


def test_a_curve_tells_its_ends_and_skips_what_is_no_number():
    plot = curve([3.0, None, float("nan"), 1.5, 2.0], "loss")
    assert plot.caption == "loss: 3.000 \u2192 2.000" and [point.y for point in plot.series[0].points] == [
        3.0,
        1.5,
        2.0,
    ]
    assert curve([2.0, 2.0], "flat") and not curve([2.0], "short")


def test_an_estimate_without_ends_has_no_interval():
    row = {"a": 0.5, "a_low": 0.25, "a_high": None, "b": 1.0, "c": None, "c_low": 0.0}
    assert estimate(row, "a", 2) == Cell("0.50", ("0.25", "\u2013"))
    assert estimate(row, "b") == Cell("1.000") and estimate(row, "c") == Cell("\u2013")
    assert estimate(row, "a", 1, 100).text == "50.0"


def test_without_jinja2_the_extra_is_named(monkeypatch):
    rendering._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match="jinja2"):
        rendering.render(Page("title", []))
