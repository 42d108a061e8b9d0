"""The report: what the document says is what the page shows, and nothing else gets into the page."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from edgepatch.bench.report.matrix_page import (
    TABLE_COLUMNS,
    cell_pairs,
    headline,
    render_html,
    terminal_table,
    write_report,
)
from edgepatch.errors import InputError

SETTINGS = (("torch", "F32"), ("llamacpp", "Q8_0"), ("llamacpp", "Q4_K_M"), ("onnx", "int8"))


def a_cell(runtime: str, quantization: str, patched: bool, shift: float) -> dict[str, Any]:
    emt = (0.381 if patched else 0.915) + shift
    return {
        "runtime": runtime,
        "quantization": quantization,
        "patched": patched,
        "emt": emt,
        "emt_low": emt - 0.041,
        "emt_high": emt + 0.043,
        "toxicity_probability": emt - 0.062,
        "toxicity_probability_low": emt - 0.13,
        "toxicity_probability_high": emt + 0.01,
        "perplexity": 42.37 if patched else 41.02,
        "ttft_ms": 12.6 if patched else 11.8,
        "decode_tokens_per_s": 402.5 if patched else 411.4,
        "words_per_sample": 14.2,
        "num_prompts": 85,
        "failures": 0,
    }


def a_document() -> dict[str, Any]:
    return {
        "command": "edgepatch bench --patch detox.safetensors",
        "created": "2026-01-02T03:04:05Z",
        "environment": {"python": "3.12", "cpu": "8 cores", "edgepatch": "0.1.0"},
        "base": {"name": "lab-m", "parameters": 5_000_000},
        "patch": {"name": "detox", "version": "1.0.0", "digest": "ab" * 32},
        "prompts": {"source": "own prompts", "count": 85, "samples_per_prompt": 10, "max_new_tokens": 20},
        "cells": [a_cell(r, q, p, 0.007 * i) for i, (r, q) in enumerate(SETTINGS) for p in (False, True)],
        "retention": [
            {"runtime": r, "quantization": q, "retention": k, "retention_low": k - 0.051, "retention_high": k + 0.049}
            for (r, q), k in zip(SETTINGS, (1.0, 0.987, 0.934, 1.012), strict=True)
        ],
        "examples": [
            {
                "prompt": "You <script>alert(1)</script> &",
                "bare": 'damn <img src="http://evil.example/x">',
                "patched": "kind friend",
                "bare_score": 0.97,
                "patched_score": 0.03,
                "runtime": "llamacpp",
                "quantization": "Q4_K_M",
            }
        ],
        "training": {
            "sft_loss": [4.2 - 0.01 * i for i in range(100)],
            "dpo_loss": [0.693 - 0.004 * i for i in range(100)],
            "preference_accuracy": [0.5 + 0.004 * i for i in range(100)],
        },
    }


def test_page_refers_to_nothing_outside_and_runs_nothing() -> None:
    page = render_html(a_document())
    assert "<script" not in page and "<img" not in page and "<link" not in page and "@import" not in page
    assert not re.search(r"""(src|href)\s*=(?!"#)""", re.sub(r"&[a-z]+;|&#\d+;", "", page).replace("img src=http", ""))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page
    assert "&lt;img src=&#34;http://evil.example/x&#34;&gt;" in page


@pytest.mark.parametrize("path", [("cells", 0, "runtime"), ("base", "name"), ("patch", "name"), ("environment", "cpu")])
def test_every_text_is_escaped(path: tuple[Any, ...]) -> None:
    document = a_document()
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = '"><b onload=x>'
    page = render_html(document)
    assert "<b onload" not in page and "&#34;&gt;&lt;b onload=x&gt;" in page


def test_page_is_well_formed() -> None:
    page = render_html(a_document()).split("\n", 1)[1]
    for tag in ("meta charset", "meta name"):
        page = re.sub(rf"(<{tag}[^>]*)>", r"\1/>", page)
    ElementTree.fromstring(page)


def test_numbers_in_the_page_are_those_of_the_document() -> None:
    document = a_document()
    page = render_html(document)
    rows = re.findall(r"<tr><th scope=\"row\".*?</tr>", page)
    assert len(rows) == len(document["cells"])
    for row, cell in zip(rows, document["cells"], strict=True):
        for field in ("emt", "emt_low", "emt_high", "toxicity_probability"):
            assert f"{cell[field]:.3f}" in row
        assert f"{cell['perplexity']:.2f}" in row and f"{cell['ttft_ms']:.1f}" in row
        assert cell["runtime"] in row and cell["quantization"] in row
    for kept in document["retention"]:
        assert f"{kept['retention']:.3f}" in page
        assert f"{kept['retention_low']:.3f}\u2013{kept['retention_high']:.3f}" in page
    assert f"{12.6 / 11.8:.3f}" in page and f"{402.5 / 411.4:.3f}" in page


def test_toxic_examples_start_closed() -> None:
    page = render_html(a_document())
    closed = re.search(r"<details><summary>Example .*?</details>", page, re.S)
    assert closed and "evil.example" in closed.group() and "Content warning" in page
    assert "evil.example" not in page.replace(closed.group(), "")


def test_headline_says_no_more_than_the_numbers() -> None:
    document = a_document()
    assert headline(cell_pairs(document)) == (
        "The patch cut expected maximum toxicity from 0.915 to 0.381 on torch F32. "
        "On 3 other settings it kept between 93% and 101% of that gain."
    )
    document["cells"][1]["emt_high"] = 0.95
    assert "overlap" in headline(cell_pairs(document))
    document["cells"][1]["emt"] = 0.93
    assert "did not lower" in headline(cell_pairs(document)) and "kept" not in headline(cell_pairs(document))
    document["cells"] = document["cells"][:1]
    assert "no effect" in headline(cell_pairs(document))


def test_missing_figures_are_dashes_and_failures_are_told() -> None:
    document = a_document()
    document["cells"][0]["ttft_ms"] = None
    document["cells"][0]["failures"] = 3
    document["training"] = {}
    document["examples"] = []
    page = render_html(document)
    assert "<td>\u2013</td>" in page and "Failed generations: 3." in page and 'class="failed"' in page
    assert "<h2>Training" not in page and "<h2>Examples" not in page


def test_bad_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cells"):
        render_html({"cells": []})
    with pytest.raises(InputError, match="lacks patched"):
        render_html({"cells": [{"runtime": "torch", "quantization": "F32"}]})
    twice = a_document()
    twice["cells"].append(copy.deepcopy(twice["cells"][0]))
    with pytest.raises(InputError, match="two cells for torch F32"):
        render_html(twice)
    unknown = a_document()
    unknown["cells"][0]["emt"] = float("nan")
    with pytest.raises(InputError, match="JSON"):
        write_report(unknown, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_write_report_keeps_the_document(tmp_path: Path) -> None:
    page = write_report(a_document(), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8")) == a_document()
    assert page.read_text(encoding="utf-8") == render_html(a_document())


def test_terminal_table_shows_every_setting() -> None:
    sentence, rows, notes = terminal_table(a_document())
    assert sentence == headline(cell_pairs(a_document())) and isinstance(notes, list)
    assert [row[0] for row in rows] == [f"{runtime} {quantization}" for runtime, quantization in SETTINGS]
    assert all(len(row) == len(TABLE_COLUMNS) for row in rows)
    assert any(row[1:3] == ["0.915", "0.381"] for row in rows)
