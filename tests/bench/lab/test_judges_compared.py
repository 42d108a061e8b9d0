"""Judges beside each other: the committed figures and the card belong together, and the texts that were read come out again."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench import datasets
from edgepatch.bench.lab.judges import card, comparing, comparison_card, readings
from edgepatch.bench.lab.judges.answer_rows import answer_rows
from edgepatch.bench.lab.judges.figures import kappa, kappa_interval
from edgepatch.bench.lab.judges.refusal_texts import REFUSALS
from edgepatch.judges.scorers import normalize
from edgepatch.judges.semantic import Verdict
from edgepatch.runtimes import load_runtime

DATA = datasets.data_folder()
RESULTS = Path(card.FOLDER).parent.parent / "bench" / "results" / "judges.json"


def test_the_card_says_what_the_numbers_say():
    document = json.loads(RESULTS.read_text("utf-8"))
    text = (card.FOLDER / "README.md").read_text("utf-8")
    assert card.put_section(text, comparison_card.section(document), comparison_card.SECTION) == text
    records = readings.load_records()
    for kind in readings.KINDS:
        differing = document["read"]["differing"][kind]
        assert sum(document["read"][kind].values()) + differing == len(records[kind])


def test_readings_hold_labels_and_no_text():
    records = readings.load_records()
    assert readings.as_json(records) == readings.FILE.read_bytes()
    assert [len(records[kind]) for kind in readings.KINDS] == [200, 100]
    assert all(row["idx"] >= datasets.RTP_SPLIT for row in records["toxicity"])
    assert {row["label"] for row in records["answers"]} == {verdict.value for verdict in Verdict}
    assert all(
        set(row) <= {"idx", "sample", "instructed", "sha256", "label"}
        for kind in readings.KINDS
        for row in records[kind]
    )


def test_a_uniform_number_picks_a_token():
    logits = np.log(np.array([0.5, 0.25, 0.25], dtype=np.float32))
    assert [readings.draw(logits, u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.999)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.skipif(DATA is None, reason="needs the data sets, see bench/data.md")
def test_the_texts_that_were_read_come_out_again(smollm2):
    """The first eight, which a runtime makes together."""
    rows = readings.load_records()["toxicity"][:8]
    prompts = [c.prompt for c in datasets.rtp_challenging(DATA)]
    with load_runtime(smollm2, None, **readings.RUNTIME) as session:
        seeds = [(row["idx"], row["sample"]) for row in rows]
        texts = readings.continuations(session, [prompts[row["idx"]] for row in rows], seeds, 20)
        same = [readings.digest(text) == row["sha256"] for row, text in zip(rows, islice(texts, 8), strict=True)]
    assert sum(same) >= 6, "another build of llama.cpp may round a token differently, not most of them"


@pytest.mark.skipif(DATA is None, reason="needs the data sets, see bench/data.md")
def test_the_two_judges_of_answers_share_nothing():
    rows = answer_rows(DATA)
    replies = [{normalize(row.reply).strip() for row in rows[purpose]} for purpose in ("report", "filter")]
    assert not replies[0] & replies[1]
    assert not set(REFUSALS["report"]) & set(REFUSALS["filter"])
    requests = {row.request for part in rows.values() for row in part}
    assert not requests & {*datasets.jailbreakbench(DATA), *datasets.strongreject(DATA), *datasets.harmbench(DATA)}
    for part in rows.values():
        assert (
            min(Counter(row.verdict for row in part).values()) > 500 and len(Counter(row.verdict for row in part)) == 3
        )


def test_agreement_by_hand():
    first, second = np.array(["a", "a", "b", "b"]), np.array(["a", "b", "b", "b"])
    assert kappa(first, second) == pytest.approx((0.75 - 0.5) / 0.5)
    assert kappa(first, first) == 1 and kappa(first[:2], first[:2]) == 0
    low, high = kappa_interval(first, second)[1:]
    assert low <= 0.5 <= high
    row = comparing.agreement(first.tolist(), second.tolist())
    assert row["counts"] == {"a called a": 1, "a called b": 1, "b called a": 0, "b called b": 2}
    assert row["accuracy"][0] == 0.75


def test_string_rules_give_three_verdicts():
    replies = ["I'm sorry, no.", "Sure, here is a list", "The sea is wide.", "", "x x x x x x x x x"]
    f, c, r = Verdict.FAILURE, Verdict.COMPLIANCE, Verdict.REFUSAL
    assert comparing.by_matcher(replies, replies) == [r, c, c, f, f]
    assert comparing.by_opening(replies, replies) == [r, c, f, f, f]
