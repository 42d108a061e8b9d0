"""The shipped prompts: counts, splits, uniqueness, and that none is copied from a data set."""

from __future__ import annotations

import json
import re

import pytest

from edgepatch.bench import datasets
from edgepatch.errors import InputError
from edgepatch.prompts.sets import FIELDS, FOLDER, KINDS, load_benign_text, load_minimal_pairs, load_prompts


def plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def every_text() -> list[str]:
    kinds = [kind for kind in KINDS if kind != "benign_text"]
    prompts = [t for kind in kinds for split in ("train", "eval") for t in load_prompts(kind, split)]
    return prompts + load_benign_text("train") + load_benign_text("eval")


def test_counts() -> None:
    counts = {
        kind: (len(load_prompts(kind, "train")), len(load_prompts(kind, "eval")))
        for kind in KINDS
        if kind != "benign_text"
    }
    assert counts == {"toxic": (220, 85), "benign": (80, 42), "harm_requests": (80, 60), "harm_benign": (80, 60)}
    assert len(load_benign_text("train")) >= 30 and len(load_benign_text("eval")) >= 30


def test_all_are_different_and_so_the_splits_are_disjoint() -> None:
    texts = [plain(text) for text in every_text()]
    assert (
        len(set(texts))
        == len(texts)
        == sum(len((FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()) for kind in KINDS)
    )


def test_prompts_do_not_follow_a_template() -> None:
    for kind in ("toxic", "benign", "harm_requests", "harm_benign"):
        prompts = load_prompts(kind, "train") + load_prompts(kind, "eval")
        openings = [" ".join(plain(prompt).split()[:3]) for prompt in prompts]
        assert max(map(openings.count, openings)) <= 5


def test_prompts_are_beginnings_without_loose_spaces() -> None:
    for text in every_text():
        assert text == text.strip() and "  " not in text and text.isprintable()
    for kind in ("toxic", "benign"):
        for prompt in load_prompts(kind, "train") + load_prompts(kind, "eval"):
            assert prompt[-1] not in ".!?" and 4 <= len(prompt.split()) <= 30, prompt


def test_benign_text_is_of_the_promised_length() -> None:
    for text in load_benign_text("train") + load_benign_text("eval"):
        assert 40 <= len(text.split()) <= 90 and text.endswith((".", "?"))


def test_rows_have_the_closed_fields_and_unique_ids() -> None:
    for kind in KINDS:
        rows = [json.loads(line) for line in (FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(set(row) == FIELDS for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)


def test_unknown_names_are_refused() -> None:
    for kind, split in (("harmful", "eval"), ("toxic", "test"), ("benign_text", "eval")):
        with pytest.raises(InputError):
            load_prompts(kind, split)
    with pytest.raises(InputError):
        load_benign_text("test")


def test_no_text_is_copied_from_realtoxicityprompts() -> None:
    folder = datasets.data_folder()
    if folder is None:
        pytest.skip("EDGEPATCH_DATA is not set")
    records = datasets.rtp_challenging(folder) + datasets.rtp_nontoxic(folder) + datasets.rtp_training(folder)
    theirs = {plain(r.prompt) for r in records} | {plain(r.prompt + r.text) for r in records}
    assert not theirs & {plain(text) for text in every_text()}


def test_minimal_pairs_differ_and_stand_once() -> None:
    pairs = [pair for pairs in load_minimal_pairs().values() for pair in pairs]
    assert len(pairs) == len({good for good, _ in pairs}) == 100
    for good, bad in pairs:
        assert good != bad and good[-1] in ".?" and bad[-1] in ".?"
