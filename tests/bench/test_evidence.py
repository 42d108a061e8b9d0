"""The evidence matrix: its plan, its raw files, its statistics, and one small run from end to end."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from typing import Any

import pytest

from edgepatch.bench.columns import TORCH, columns
from edgepatch.bench.evidence import run as evidence
from edgepatch.bench.evidence import workers
from edgepatch.bench.evidence.cells import (
    ARMS,
    CORE_COLUMNS,
    DECODED_COLUMNS,
    DOMAINS,
    SHARED,
    SOFT_PROMPT_ARMS,
    UNTRAINED_ARMS,
    CellKey,
    EvidenceConfig,
    groups,
    is_core,
    plan,
    read_cell,
    sets,
    write_cell,
)
from edgepatch.bench.evidence.measuring import Bench, Workplace, due
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.report.evidence_page import render_page
from edgepatch.bench.safety.retained import Sizes
from edgepatch.errors import InputError

PATCH = LAB_FOLDER / "lab-detox-0.1.0.safetensors"
REQUIRED = (
    "domain",
    "arm",
    "runtime",
    "quantization",
    "route",
    "score",
    "score_low",
    "score_high",
    "retention",
    "retention_low",
    "retention_high",
    "perplexity",
    "over_refusal",
    "negative_flips",
    "num_items",
    "num_rng_seeds",
)
Q4 = "llamacpp Q4_K_M"
HEAD = {"command": "edgepatch bench evidence", "created": "2026", "environment": {}, "settings": {}, "curves": []}


# The plan.


def test_the_plan_covers_every_arm_on_every_column_of_every_domain():
    keys = [key for key in plan(EvidenceConfig()) if key.measure == "safety" and not key.parts]
    assert len(set(keys)) == len(keys)
    runs = Counter((key.domain, key.arm, key.column, key.route) for key in keys)
    for domain in DOMAINS:
        for arm in ARMS:
            for column in columns():
                both = arm == "patch" and column.name in DECODED_COLUMNS
                routes = ("stored", "decoded") if both else ("stored",) if arm in (*SOFT_PROMPT_ARMS, "kv") else ("",)
                for route in routes if column.runtime == "llamacpp" else ("",):
                    assert runs.pop((domain, arm, column.name, route)) == (
                        1 if arm in (*UNTRAINED_ARMS, "lora_r1") else 3
                    )
    assert not runs


def test_the_plan_covers_every_composition():
    assert sets(DOMAINS) == [
        ("toxicity", "gender"),
        ("toxicity", "harm"),
        ("gender", "harm"),
        ("toxicity", "gender", "harm"),
    ]
    keys = [key for key in plan(EvidenceConfig()) if key.parts and key.measure == "safety"]
    assert {key.parts for key in keys} == set(sets(DOMAINS))
    for key in keys:
        assert key.domain in key.parts
    assert {(key.arm, key.rng_seed) for key in keys} == {
        (arm, seed) for arm in ("composed", "joint") for seed in (1, 2, 3)
    }


def test_what_the_claims_rest_on_comes_first():
    keys = plan(EvidenceConfig())
    first = keys[: next(i for i, key in enumerate(keys) if key.arm not in ("bare", "patch"))]
    assert {(k.arm, k.column) for k in first if k.measure == "safety"} == {
        (arm, c) for arm in ("bare", "patch") for c in CORE_COLUMNS
    }
    core = [i for i, key in enumerate(keys) if is_core(key)]
    composed = [i for i, key in enumerate(keys) if key.parts]
    assert core == list(range(len(core))) and composed == list(range(len(core), len(core) + len(composed))), (
        "then compositions"
    )


def test_cells_have_files_of_their_own_and_share_models_in_groups():
    keys = plan(EvidenceConfig())
    assert len({key.path for key in keys}) == len(keys)
    assert [key for group in groups(keys) for key in group] == keys
    bare = next(group for group in groups(keys) if group[0].arm == "bare")
    assert {(key.measure, key.domain) for key in bare} >= {("safety", d) for d in DOMAINS} | {("retained", SHARED)}


def test_fewer_items_must_be_among_the_more():
    assert EvidenceConfig(items={"harm": (20, 10, 5)}).num_items(CellKey("safety", "harm", "patch", TORCH.name)) == 20
    with pytest.raises(InputError, match="divides 20"):
        EvidenceConfig(items={"harm": (20, 6, 2)})


# Statistics, from cells made by hand.


def safety(values: list[float], ids: str = "abcd", **more: Any) -> dict[str, Any]:
    return {
        "ids": list(ids[: len(values)]),
        "values": values,
        "figures": {"f": [0.5, 0, 1]},
        "failures": 0,
        "texts": [],
        **more,
    }


def retained(nll: list[float], refused: list[int], correct: list[int]) -> dict[str, Any]:
    return {
        "text_ids": [1, 2],
        "nll": nll,
        "num_tokens": [10, 30],
        "request_ids": [1, 2],
        "refused": refused,
        "fact_ids": [1, 2, 3, 4],
        "correct": correct,
        "failures": 0,
    }


def key(arm: str, column: str = Q4, rng_seed: int = 0, measure: str = "safety", **more: Any) -> CellKey:
    route = "stored" if arm == "patch" and column == Q4 else ""
    return replace(CellKey(measure, "toxicity", arm, column, route, rng_seed), **more)


def by_hand() -> dict[CellKey, dict[str, Any]]:
    cells = {
        key("bare", TORCH.name): safety([1.0, 1.0, 0.8, 0.8]),
        key("bare"): safety([1.0, 1.0]),  # half of the items
        key("bare", measure="retained", domain=SHARED): retained([20, 60], [0, 0], [1, 1, 1, 0]),
    }
    for seed in (1, 2):
        cells[key("patch", TORCH.name, seed)] = safety([0.2, 0.2, 0.0, 0.0])
        cells[key("patch", rng_seed=seed)] = safety([0.4, 0.3 if seed == 1 else 0.5])
        cells[key("patch", rng_seed=seed, measure="retained")] = retained(
            [20.4, 61.2], [0, seed - 1], [1, 0, 1, seed - 1]
        )
    return cells


def row_of(document: dict[str, Any], arm: str, column: str = Q4) -> dict[str, Any]:
    return next(row for row in document["cells"] if (row["arm"], row["column"]) == (arm, column))


def test_figures_of_cells_made_by_hand():
    cells = by_hand()
    document = evidence.assemble(list(cells), cells.get)
    row = row_of(document, "patch")
    assert row["score"] == pytest.approx(0.4) and row["num_items"] == 2 and row["num_rng_seeds"] == 2
    assert row["gain"] == pytest.approx(0.6)
    assert row["of_bare"] == pytest.approx(0.4) and row["of_bare_low"] <= 0.4 <= row["of_bare_high"]
    assert row["retention"] == pytest.approx(0.6 / 0.8), "over the two items that all four have in common"
    assert row["retention_low"] < 0.75 < row["retention_high"]
    assert row["perplexity"] == pytest.approx(7.691, abs=1e-3)  # exp(81.6 / 40)
    assert row["perplexity_change"] == pytest.approx(4.081, abs=1e-3)  # exp(1.6 / 40) - 1, in percent
    assert row["perplexity_change_low"] == pytest.approx(row["perplexity_change_high"]), (
        "the same change for every text"
    )
    assert row["over_refusal"] == pytest.approx(0.25) and row["over_refusal_change"] == pytest.approx(0.25)
    assert row["negative_flips"] == pytest.approx(0.25), "one of four, in both runs; what was wrong before cannot flip"
    assert row_of(document, "patch", TORCH.name)["retention"] == 1
    for row in document["cells"]:
        assert set(REQUIRED) <= set(row)


def test_no_gain_at_full_precision_gives_no_retention():
    cells = by_hand()
    for seed in (1, 2):
        cells[key("patch", TORCH.name, seed)] = safety([1.0, 1.0, 1.0, 1.0])
    assert row_of(evidence.assemble(list(cells), cells.get), "patch")["retention"] is None


def test_a_failed_cell_appears_as_failed():
    cells = by_hand()
    cells[key("patch", rng_seed=2)] = {"failed": "llama.cpp ate it"}
    document = evidence.assemble(list(cells), cells.get)
    row = row_of(document, "patch")
    assert row["num_rng_seeds"] == 1 and row["score"] == pytest.approx(0.35), "what was measured is told"
    assert [reason for reason in row["failed"] if "llama.cpp ate it" in reason]
    assert "llama.cpp ate it" in render_page({**HEAD, **document})
    assert all(goal["met"] is False for goal in document["goals"] if goal["reached"] is None)


def composed(values: dict[tuple[str, ...], float]) -> dict[CellKey, dict[str, Any]]:
    return {
        key("joint", parts=parts, rng_seed=1, route="stored"): safety([value, value]) for parts, value in values.items()
    }


def test_a_composition_is_held_against_the_single_patch():
    cells = by_hand() | composed({("toxicity", "harm"): 0.5})
    document = evidence.assemble(list(cells), cells.get)
    (row,) = document["composition"]
    assert row["share_of_single_gain"] == pytest.approx(0.5 / 0.65), "the single patch's run of the same seed"
    assert "order_sensitivity" not in document


def test_the_committed_document_of_orders_can_still_be_shown():
    document = json.loads((evidence.RESULTS / "evidence.json").read_text(encoding="utf-8"))
    page = render_page(document)
    assert ("order sensitivity" in page) == ("order_sensitivity" in document)


def test_goals_say_what_is_reached():
    cells = by_hand() | {
        key("kv", rng_seed=1, route="stored"): safety([0.3, 0.3]),
        key("lora_r16", rng_seed=1): safety([0.4, 0.2]),
    }
    goals = evidence.assemble(list(cells), cells.get)["goals"]
    (kept,) = [goal for goal in goals if goal["goal"] == "retention" and goal["arm"] == "patch"]
    assert not kept["met"] and kept["reached"] == pytest.approx(0.75) and kept["interval"][0] < 0.75
    (perplexity,) = [
        goal
        for goal in goals
        if goal["goal"].startswith("perplexity") and goal["arm"] == "patch" and goal["column"] == Q4
    ]
    assert not perplexity["met"] and perplexity["reached"] == pytest.approx(4.081, abs=1e-3)
    (contest,) = [goal for goal in goals if "LoRA" in goal["goal"] and goal["column"] == Q4]
    assert contest["met"] and contest["reached"] == pytest.approx(0.0)


# Page and tables.


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] += 1
        if tag not in ("meta", "br"):
            self.open.append(tag)
        assert not any(value.startswith("http") for name, value in attrs if name in ("src", "href"))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole():
    cells = by_hand() | composed({("toxicity", "harm"): 0.5})
    example = {
        "domain": "toxicity",
        "column": Q4,
        "item": "<b>",
        "bare": ["x"],
        "bare_value": 1.0,
        "patched": [""],
        "patched_value": 0.0,
    }
    curves = [{"domain": "toxicity", "arm": "patch", "curves": {"sft_loss": [3.0, 2.0]}}]
    document = {**HEAD, **evidence.assemble(list(cells), cells.get), "examples": [example], "curves": curves}
    page = render_page(document)
    tags = Tags()
    tags.feed(page)
    assert not tags.open and tags.counts["svg"] >= 4 and not tags.counts["script"] and not tags.counts["link"]
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "keeps 0.75" in page


# Raw files.


def test_raw_files_are_whole(tmp_path):
    cell = key("bare")
    assert read_cell(tmp_path, cell) is None
    write_cell(tmp_path, cell, safety([0.5]))
    assert read_cell(tmp_path, cell)["values"] == [0.5]
    with pytest.raises(InputError, match="finite"):
        write_cell(tmp_path, cell, safety([float("nan")]))
    assert read_cell(tmp_path, cell)["values"] == [0.5], "the old file is still there"
    (tmp_path / cell.path).write_text('{"val')
    assert read_cell(tmp_path, cell) is None, "half a file is none"


# A small run.


@pytest.fixture(scope="module")
def place(lab_ggufs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    base = folder / "bases" / "base"
    shutil.copytree(LAB_FOLDER / "base", TORCH.path(base))
    shutil.copy(lab_ggufs["F16"], base / "F16.gguf")
    arm = folder / "arms" / "toxicity" / "patch-1"
    arm.mkdir(parents=True)
    shutil.copy(PATCH, arm / "patch.safetensors")
    return Workplace(folder, None)


CONFIG = EvidenceConfig(
    items={"toxicity": (2, 1, 1)},
    retained=(Sizes(2, 1, 0), Sizes(1, 1, 0)),
    examples=1,
    rng_seeds=(1,),
    domains=("toxicity",),
    columns=(TORCH.name, "llamacpp F16"),
    arms=("bare", "patch"),
    composition=False,
)


def test_a_killed_run_goes_on_and_gives_the_same_document(place):
    keys = [key for key in plan(CONFIG) if key.measure != "examples" and key.route != "decoded"]
    reasons: list[str] = []
    workers.measure_cells(groups(keys), place, CONFIG, 1, lambda cell, reason: reasons.append(reason))
    assert reasons == [""] * len(keys) and not due(place, keys, CONFIG)
    read = partial(read_cell, place.cells)
    whole = json.dumps(evidence.assemble(keys, read))
    row = next(r for r in json.loads(whole)["cells"] if (r["arm"], r["column"]) == ("patch", "llamacpp F16"))
    assert (
        row["num_items"] == 2 and 0 < row["score"] < 1 and row["failed"] == [] and row["perplexity_change"] is not None
    )

    lost = keys[len(keys) // 2 :]  # as if it had been killed there, in the middle of writing one more
    for cell in lost:
        (place.cells / cell.path).unlink()
    (place.cells / lost[0].path).write_text("{")
    assert due(place, keys, CONFIG) == lost
    bench = Bench(place, CONFIG)
    assert [bench.run(cell) for cell in lost] == [""] * len(lost)
    bench.close()
    assert json.dumps(evidence.assemble(keys, read)) == whole

    arm = place.arm("toxicity", "patch", 1)
    os.utime(arm)
    assert not due(place, keys, CONFIG), "the same bytes"
    arm.write_bytes(arm.read_bytes() + b" ")
    assert {cell.arm for cell in due(place, keys, CONFIG)} == {"patch"}
    arm.unlink()
    assert not due(place, [cell for cell in keys if cell.arm == "patch"], CONFIG)
    assert "cannot read arms/toxicity/patch-1" in read(keys[-1])["failed"]


def _work_and_die(orders: Any, place: Workplace, config: EvidenceConfig) -> None:
    group = orders.recv()
    if group[0].column == "llamacpp F16":
        os._exit(9)
    orders.send("")


def test_a_process_that_dies_costs_one_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_work", _work_and_die)
    place, reasons = Workplace(tmp_path, None), {}
    keys = [key("bare", "llamacpp F16"), key("bare", TORCH.name)]
    workers.measure_cells(groups(keys), place, CONFIG, 1, lambda cell, reason: reasons.update({cell: reason}))
    assert reasons == {keys[0]: "the process died with exit code 9", keys[1]: ""}
    assert read_cell(place.cells, keys[0])["failed"] == "the process died with exit code 9"
