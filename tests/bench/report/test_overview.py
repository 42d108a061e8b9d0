"""The page of all results: whole, self-contained, readable, drawn by a real browser; and the limits of the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepatch import cli
from edgepatch.bench.latency import growth
from edgepatch.bench.latency.growth import model_name
from edgepatch.bench.report import overview
from edgepatch.bench.report.files import RESULT_FILES, read_results
from edgepatch.bench.report.sections import arm_table
from edgepatch.bench.report.tables import MOST_HEAT
from edgepatch.bench.shapes import machine
from edgepatch.bench.shapes.shape import SHAPES
from edgepatch.errors import InputError
from kit.page_text import as_markdown

ROOT = Path(__file__).parent.parent.parent.parent
COMMITTED = ROOT / "bench" / "results"
STYLE = (ROOT / "edgepatch" / "pages" / "style.css").read_text("utf-8")
VOID = {"meta", "br", "img", "input", "hr", "link"}
TEXT_CONTRAST, MARK_CONTRAST = 4.5, 3.0  # WCAG 2.2, 1.4.3 and 1.4.11
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARMS = ("bare", "seed", "text-50-cold", "lora-r8")


def timing(measure: str, arm: str, median: float, **more: Any) -> dict[str, Any]:
    """A row of the latency bench."""
    common = {
        "shape": "llama-3.2-1b",
        "quantization": "Q4_0",
        "runtime": "llamacpp",
        "model_size": 695e6,
        "model_n_params": 1.2e9,
        "status": "ok",
    }
    times = {
        "median_ms": median,
        "min_ms": 0.98 * median,
        "max_ms": 1.02 * median,
        "median_ts": 1000 * more.get("n_gen", 1) / median,
    }
    return {"measure": measure, "arm": arm, "n_prompt": 0, "n_gen": 0, "n_depth": 0, **common, **times, **more}


def a_latency() -> dict[str, Any]:
    rows = [timing("ttft", arm, 3.0 * n + i, n_prompt=n, n_gen=1) for i, arm in enumerate(ARMS) for n in (32, 128, 512)]
    rows += [
        timing("decode", arm, 16 * (20 + d / 100), n_gen=16, n_depth=d) for arm in ARMS[:2] for d in (0, 512, 2048)
    ]
    rows.append(
        {
            "measure": "decode",
            "arm": "onnxruntime-genai",
            "status": "not installed",
            "reason": "pip <b>install</b>",
            **timing("", "", 1),
        }
    )
    rows[-1] |= {"measure": "decode", "arm": "onnxruntime-genai", "status": "not installed"}
    rows.append(
        {
            "measure": "artefact",
            "arm": "seed",
            "status": "ok",
            "value": 1639408,
            "unit": "bytes",
            "shape": "llama-3.2-1b",
            "quantization": "Q4_0",
            "runtime": "llamacpp",
        }
    )
    ratio = {"value": 1.0049, "low": 0.99, "high": 1.02}
    goals = [{"goal": "time to first token, patched over bare", "wanted": "<= 1.02", "reached": 1.0049, "met": True}]
    return {
        "command": "edgepatch bench latency",
        "created": "2026",
        "environment": {"cpu": "8 cores"},
        "load": {"before": [0.1]},
        "shape": "llama-3.2-1b",
        "quantization": "Q4_0",
        "repeats": 7,
        "rows": rows,
        "ratios": {"ttft_patched_over_bare": ratio},
        "goals": goals,
    }


def an_evidence() -> dict[str, Any]:
    rows = []
    for arm, column in product(("bare", "patch"), ("torch F32", "llamacpp Q4_K_M")):
        row: dict[str, Any] = {
            "domain": "toxicity",
            "arm": arm,
            "column": column,
            "route": "",
            "failed": [],
            "failures": 0,
            "num_items": 200,
            "num_rng_seeds": 3,
        }
        for field in (
            "score",
            "perplexity_change",
            "over_refusal",
            "over_refusal_change",
            "negative_flips",
            "retention",
        ):
            row |= {field: 0.31, f"{field}_low": 0.2, f"{field}_high": 0.4}
        rows.append(row | ({"retention": None, "retention_low": None, "retention_high": None} if arm == "bare" else {}))
    goal = {
        "goal": "retention",
        "wanted": ">= 0.95",
        "domain": "toxicity",
        "arm": "patch",
        "column": "llamacpp Q4_K_M",
        "reached": 0.31,
        "interval": [0.2, 0.4],
        "met": False,
    }
    return {"command": "edgepatch bench evidence", "created": "2026", "environment": {}, "cells": rows, "goals": [goal]}


def a_machine() -> dict[str, Any]:
    rate = {"best": 40.0, "median": 38.0, "worst": 20.0, "repeats": 9}
    return {
        "command": "edgepatch bench machine",
        "created": "2026",
        "environment": {},
        "load_average": 0.1,
        "num_threads": 2,
        "read_gb_s": rate,
        "triad_gb_s": rate,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The committed files, with an evidence, a latency and a machine file made by hand."""
    folder = tmp_path_factory.mktemp("results")
    for path in COMMITTED.glob("*.json"):
        shutil.copy(path, folder)
    for name, document in (("evidence", an_evidence()), ("latency", a_latency()), ("machine", a_machine())):
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def page(results) -> str:
    return overview.render_html(read_results(results))


class Page(HTMLParser):
    """Fails where a tag is not closed, something is loaded from elsewhere, or a picture has no name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), f"{tag} {name}={attributes[name]}"
        if tag == "img":
            assert attributes.get("alt")
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (
                attributes.get("role") == "img" and attributes.get("aria-label")
            ), attributes
        if tag == "a":
            self.links.append(attributes["href"] or "")
        if "id" in attributes:
            self.ids.append(attributes["id"] or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# Structure.


def test_the_page_is_whole_and_needs_nothing_else(page):
    parsed = Page(page)
    assert len(set(parsed.ids)) == len(parsed.ids) and set(parsed.links) <= {f"#{name}" for name in parsed.ids}
    assert (
        parsed.tags.count("svg") > 8
        and parsed.tags.count("h1") == 1
        and "nav" in parsed.tags
        and '<html lang="en">' in page
    )
    assert not re.search(r"https?://|@import|url\(", page)
    assert page.count('<div class="wide"') == page.count('<div class="wide" tabindex="0" role="region" aria-label=') > 5
    assert "<b>install</b>" not in page


def test_every_figure_of_a_file_is_told_on_the_page_and_in_markdown(results, page):
    markdown = "\n\n".join(as_markdown(section.blocks) for section in overview.sections(read_results(results)))
    for text in (page, markdown):
        assert "not installed" in text and "1,639,408" in text and "1.005 [0.990, 1.020]" in text
        assert all(file.name in text for file in RESULT_FILES)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    for line, follower in pairwise(lines):
        if set(follower) <= set("|- "):
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", follower)), line


def test_a_missing_file_is_named_with_its_command_and_has_no_picture(tmp_path):
    page = overview.render_html(read_results(tmp_path))
    for file in RESULT_FILES:
        assert f"there is no {file.name}" in page and f"<pre>{file.command}</pre>" in page
    assert "svg" not in Page(page).tags and "<table" in page, "the table of commands"
    assert "0 of 0 goals are met. Not measured: evidence.json" in page


def test_an_arm_is_a_line_with_a_dash_for_what_was_not_measured():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in as_markdown([arm_table(a_latency())]).splitlines()
        if line.startswith("|")
    ]
    assert lines[0] == [
        "arm",
        *(f"first token, ms, {n}" for n in (32, 128, 512)),
        *(f"tokens/s, {n}" for n in (0, 512, 2048)),
        "artefact, MB",
    ]
    cells = {line[0]: line[1:] for line in lines[2:]}
    assert cells["seed"] == ["97", "385", "1,537", "50.0", "39.8", "24.7", "1.64"]
    assert cells["lora-r8"] == ["99", "387", "1,539", *["\u2013"] * 4] and "onnxruntime-genai" not in cells


def test_attention_turned_off_is_another_model():
    rows = [timing("ttft", "bare", 9.0, flash_attn=on) for on in (True, 1, False, 0)] + [timing("ttft", "bare", 9.0)]
    assert [model_name(row).endswith("no flash attention") for row in rows] == [False, False, True, True, False]


def test_goals_of_all_files_are_told_and_the_missed_come_first(results):
    goals = overview.goals(read_results(results))
    assert {goal[0] for goal in goals} >= {"safety", "latency", "security"}
    assert [
        "safety",
        "retention",
        "toxicity, patch, llamacpp Q4_K_M",
        ">= 0.95",
        "0.310 [0.200, 0.400]",
        "missed",
    ] in goals
    page = overview.render_html(read_results(results))
    assert page.index("goals that are missed") < page.index("goals that are met</summary>")


def test_bad_files_are_refused_by_name(tmp_path):
    for text, message in (("{", "latency.json"), ("[]", "JSON object"), ('{"a": NaN}', "NaN")):
        (tmp_path / "latency.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_results(tmp_path)
    (tmp_path / "latency.json").write_text('{"rows": [{}], "ratios": {}, "goals": [], "shape": "", "quantization": ""}')
    with pytest.raises(InputError, match=r"latency\.json: expected the fields"):
        overview.render_html(read_results(tmp_path))
    with pytest.raises(InputError, match="folder"):
        read_results(tmp_path / "nothing")


# Colours.


def schemes() -> dict[str, dict[str, str]]:
    """Colour variables as they are in the light, in the dark and on paper."""
    colours: dict[str, dict[str, str]] = {"light": {}, "dark": {}, "print": {}}
    for media, block in re.findall(r"(@media[^{]*\{\s*)?:root \{([^}]*)\}", STYLE):
        name = "dark" if "dark" in media else "print" if "print" in media else "light"
        colours[name] |= dict(re.findall(r"--(\w+): (#\w+)", block))
    return colours


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def mixed(over: str, under: str, share: float) -> str:
    pairs = ((int(a[i : i + 2], 16) for a in (over, under)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def test_contrast_as_the_standard_computes_it():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_and_marks_can_be_told_from_what_is_behind_them(scheme):
    colours = {**schemes()["light"], **schemes()[scheme]}
    for text, behind in product(("ink", "soft", "bare", "patched"), ("paper", "card", "band")):
        assert contrast(colours[text], colours[behind]) >= TEXT_CONTRAST, (text, behind)
    for mark in ("c0", "c1", "c3", "c4", "bare", "patched", "soft"):
        assert contrast(colours[mark], colours["card"]) >= max(MARK_CONTRAST, TEXT_CONTRAST), mark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_can_be_read_on_the_hottest_cell(scheme):
    assert "calc(var(--heat) * 1%)" in STYLE
    share = MOST_HEAT / 100
    colours = schemes()[scheme]
    hottest = mixed(colours["bare"], colours["card"], share)
    assert contrast(colours["ink"], hottest) >= TEXT_CONTRAST


# A real browser.


def pixels(path: Path) -> np.ndarray:
    """(height, width, channels) of a PNG file with 8 bits a channel."""
    data, offset, packed = path.read_bytes(), 8, b""
    width, height, bits, kind = struct.unpack(">IIBB", data[16:26])
    while offset < len(data):
        length, name = struct.unpack(">I4s", data[offset : offset + 8])
        packed += data[offset + 8 : offset + 8 + length] if name == b"IDAT" else b""
        offset += 12 + length
    assert bits == 8 and kind in (2, 6)
    channels = 3 if kind == 2 else 4
    raw, size, above, rows = zlib.decompress(packed), width * channels, bytes(width * channels), []
    for start in range(0, len(raw), size + 1):
        above = unfiltered(raw[start], raw[start + 1 : start + 1 + size], above, channels)
        rows.append(above)
    return np.frombuffer(b"".join(rows), np.uint8).reshape(height, width, channels)


def unfiltered(kind: int, line: bytes, above: bytes, channels: int) -> bytes:
    """A row of a PNG file without its filter (PNG specification, section 9)."""
    if kind == 0:
        return line
    if kind == 2:
        return (np.frombuffer(line, np.uint8) + np.frombuffer(above, np.uint8)).tobytes()
    row, corners = bytearray(channels) + bytearray(line), bytes(channels) + above
    for i in range(channels, len(row)):
        left, up, corner = row[i - channels], corners[i], corners[i - channels]
        nearest = min(
            (abs(up - corner), 0, left), (abs(left - corner), 1, up), (abs(left + up - 2 * corner), 2, corner)
        )[2]
        row[i] = (row[i] + (left if kind == 1 else (left + up) // 2 if kind == 3 else nearest)) & 255
    return bytes(row[channels:])


def test_a_real_browser_draws_the_page(page, tmp_path):
    browser = os.environ.get("EDGEPATCH_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    shot = tmp_path / "shot.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=900,900",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={shot}",
        (tmp_path / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert shot.is_file(), done.stderr[-2000:]
    drawn = pixels(shot)
    assert drawn.shape[:2] == (900, 900)
    for part in np.split(drawn, 4):
        assert len(np.unique(part.reshape(-1, drawn.shape[2]), axis=0)) > 20, "a quarter of the page is blank"


# Growth.


def test_exponents_of_curves_made_by_hand():
    points = [growth.Point(x, 2.0 * x**1.5, 2.0 * x**1.5, 2.0 * x**1.5) for x in (8.0, 64.0, 512.0)]
    assert growth.exponent(points) == pytest.approx((1.5, 1.5, 1.5))
    wide = [growth.Point(x, x, 0.5 * x, 2 * x) for x in (1.0, 4.0)]
    assert growth.exponent(wide) == pytest.approx((1.0, 0.0, 2.0)), (
        "the flattest and the steepest line through the repeats"
    )
    assert growth.exponent(points, base=1e6) is None and growth.exponent(points[:1]) is None


def test_curves_are_read_from_rows():
    curves = {(curve.quantity, curve.arm): curve for curve in growth.curves(a_latency()["rows"])}
    prompt = curves["prompt tokens", "bare"]
    assert [point.x for point in prompt.points] == [32, 128, 512] and growth.fitted(prompt).value == pytest.approx(1.0)
    depth = curves["positions of context", "seed"]
    assert depth.base == pytest.approx(20.0), "a token, not sixteen"
    assert growth.fitted(depth).value == pytest.approx(1.0), "of what the context adds"
    ((*_, exponent),) = growth.exponent_rows(
        [growth.Curve("P", "ttft", "m", "patch", tuple(growth.Point(x, 9.0, 8.0, 10.0) for x in (10.0, 50.0)), 8.5)]
    )
    assert exponent == "not above noise"


def test_each_arm_of_a_growing_quantity_is_one_curve():
    rows = [timing("ttft", "bare", 10.0, n_prompt=8)]
    rows += [timing("ttft", f"text-{n}-cold", 10.0 + n, n_prompt=8, n_prefix=n) for n in (50, 300)]
    rows += [
        timing("ttft", arm, 10.5, n_prompt=8, num_virtual_tokens=50 * n, num_patches=n)
        for arm, n in (("seed", 1), ("2 patches", 2))
    ]
    rows += [{**timing("ttft", "bare", 30.0, n_prompt=8), "shape": "llama-3.2-3b", "model_n_params": 3.6e9}]
    curves = {(curve.quantity, curve.arm): curve for curve in growth.curves(rows)}
    assert set(curves) == {
        ("tokens of a text in front", "text-N-cold"),
        ("virtual tokens (P)", "patch"),
        ("stacked patches", "patch"),
        ("parameters, billions", "bare"),
    }
    text = curves["tokens of a text in front", "text-N-cold"]
    assert text.base == 10.0 and growth.fitted(text).value == pytest.approx(1.0)
    assert growth.fitted(curves["parameters, billions", "bare"]).value == pytest.approx(1.0)


# Limits.


def test_bytes_and_operations_of_a_token():
    shape = SHAPES["llama-3.2-1b"]
    weights = shape.num_parameters
    assert machine.operations_per_token(shape) == 2 * weights
    assert machine.bytes_per_token(shape, "Q4_0") == pytest.approx(weights * 4.5 / 8, rel=1e-3)
    cache = machine.bytes_per_token(shape, "Q4_0", 1000) - machine.bytes_per_token(shape, "Q4_0")
    assert cache == 1000 * 16 * 8 * 64 * 2 * 2
    untied = SHAPES["llama-3.1-8b"]
    assert machine.bytes_per_token(untied, "F16") == pytest.approx(
        2 * (untied.num_parameters - untied.vocab_size * untied.hidden_size), rel=1e-3
    )


def test_bandwidth_is_measured(tmp_path):
    bandwidth = machine.measure_bandwidth(2, seconds=0.05, size_bytes=1 << 22)
    for name in ("read_gb_s", "triad_gb_s"):
        assert 0 < bandwidth[name]["worst"] <= bandwidth[name]["median"] <= bandwidth[name]["best"] < 1e5
    assert bandwidth["num_threads"] == 2 and bandwidth["size_bytes"] == 1 << 22
    assert machine.decode_ceiling({"read_gb_s": {"best": 2.0}}, 1e9) == 2.0
    with pytest.raises(InputError, match="threads"):
        machine.measure_bandwidth(0)
    assert machine.cache_bytes(tmp_path) == machine.UNKNOWN_CACHE_BYTES


def test_a_rate_stands_beside_its_ceiling(results):
    markdown = "\n\n".join(as_markdown(section.blocks) for section in overview.sections(read_results(results)))
    assert re.search(r"llama-3.2-1b Q4_0 llamacpp \| seed \| 695 \| 2.40 \| 57.6 \| 50.0 \| 87%", markdown)


# The command, and the document that it fills.


@pytest.fixture
def run(monkeypatch, capfd):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", "bench", "report", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def test_the_command_writes_the_page(run, results, tmp_path):
    code, out, _ = run("--results", results, "--out", tmp_path / "r.html", "--json")
    output = json.loads(out)
    assert code == 0 and output["html"] == str(tmp_path / "r.html")
    assert "trl.json" in output["missing"] + [path.name for path in results.glob("*")]
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "57.6" in page and "positions of context" in page
    assert "goals are met" in run("--results", results, "--out", tmp_path / "r.html")[1]


def test_wrong_use_is_2_and_writes_nothing(run, results, tmp_path):
    code, _, err = run("--results", tmp_path / "no", "--out", tmp_path / "r.html")
    assert code == 2 and "Traceback" not in err
    assert not list(tmp_path.iterdir())
