"""The judge's card: its committed numbers, plot and section belong together, and come from the data."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from edgepatch.bench.lab.judges import card as judge_card
from edgepatch.errors import InputError
from edgepatch.judges.scorers import ToxicityScorer

DATA = Path(os.environ["EDGEPATCH_DATA"]) if os.environ.get("EDGEPATCH_DATA") else None
ROWS = [(text, True) for text in ("you stupid idiot", "shut up", "lovely day")] + [
    ("a calm walk", False),
    ("go to hell", False),
]
MANY = ROWS * 12  # enough for every bootstrap draw to hold both kinds


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((judge_card.FOLDER / "calibration.json").read_text(encoding="utf-8"))


def test_card_and_plot_say_what_the_numbers_say(committed: dict):
    text = (judge_card.FOLDER / "README.md").read_text(encoding="utf-8")
    assert judge_card.put_section(text, judge_card.section(committed)) == text
    assert (judge_card.FOLDER / "calibration.svg").read_text(encoding="utf-8") == judge_card.plot(committed)


def test_the_plot_has_a_point_for_every_bin(committed: dict):
    root = ET.fromstring(judge_card.plot(committed))
    bins = sum(len(row["reliability"]) for row in committed["domains"].values())
    assert len(root.findall(".//{*}circle/{*}title")) == bins


def test_the_numbers_are_the_shipped_judges(committed: dict):
    digest = judge_card.hashlib.sha256((judge_card.FOLDER / "report.safetensors").read_bytes()).hexdigest()
    assert committed["sha256"] == digest


@pytest.mark.skipif(DATA is None, reason="needs the data sets, see bench/data.md")
def test_the_data_give_the_committed_numbers(committed: dict):
    rows, dropped = judge_card.domains(DATA)
    name = "RealToxicityPrompts evaluation segments"
    assert dropped == committed["tweets_left_out"]
    assert judge_card.measure(ToxicityScorer.load("report"), rows[name]) == committed["domains"][name]


def test_figures_of_a_domain():
    row = judge_card.measure(ToxicityScorer.load("report"), MANY)
    assert (row["texts"], row["toxic"]) == (60, 36)
    assert sum(b["texts"] for b in row["reliability"]) == 60
    assert all(row[key][1] <= row[key][0] <= row[key][2] for key in ("auc", "accuracy", "brier"))
    with pytest.raises(InputError, match="3 toxic of 3"):
        judge_card.measure(ToxicityScorer.load("report"), ROWS[:3])


def test_a_section_is_added_then_replaced():
    once = judge_card.put_section("# Card\n", "one\n")
    assert judge_card.put_section(once + "tail\n", "two\n") == once.replace("one", "two") + "tail\n"
    with pytest.raises(InputError, match="expected the lines"):
        judge_card.put_section(f"# Card\n{judge_card.marks(judge_card.SECTION)[0]}\n", "two\n")


def test_a_card_that_is_not_there_is_named(tmp_path: Path):
    (tmp_path / "report.safetensors").write_bytes((judge_card.FOLDER / "report.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"model card .* is missing"):
        judge_card.require_card(tmp_path)
