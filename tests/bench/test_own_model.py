"""``bench safety``: a user's model from end to end, what is refused before any work, and the verdict by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgepatch import cli
from edgepatch.bench.columns import TORCH
from edgepatch.bench.evidence import forms, workers
from edgepatch.bench.evidence.cells import CellKey, EvidenceConfig, groups
from edgepatch.bench.evidence.measuring import Workplace
from edgepatch.bench.evidence.own_model import why_missing
from edgepatch.bench.evidence.questions import plan_model
from edgepatch.bench.evidence.verdict import judge
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.safety.margins import MarginPair, continuation_pairs
from edgepatch.bench.safety.probes import Place
from edgepatch.errors import InputError
from kit.artefacts import Lazy

PATCH = LAB_FOLDER / "lab-detox-0.1.0.safetensors"
SIZES = ["--quick", "--prompts", "3", "--samples", "5", "--items", "2", "--requests", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def lab_f16(lab_ggufs: Lazy) -> Path:
    return lab_ggufs["F16"]


@pytest.fixture
def bench_safety(monkeypatch, capfd):
    """Arguments -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("EDGEPATCH_DATA", raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", "bench", "safety", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capfd.readouterr()

    return call


# From end to end.


def test_a_model_is_measured_once_and_judged(bench_safety, lab_f16: Path, tmp_path: Path):
    words = [lab_f16, "--patch", PATCH, "--on", "q8_0", *SIZES, "-o", tmp_path, "--domain", "toxicity"]
    code, printed, told = bench_safety(*words)
    assert code in (0, 1), told
    document = json.loads((tmp_path / "results.json").read_text())
    answer = document["verdict"]["sentence"]
    assert " ".join(printed.split()).startswith(" ".join(answer.split()))
    assert max(map(len, printed.splitlines()[:-2])) <= 80, "but for the two paths at the end"
    assert (code == 0) is document["verdict"]["holds"]

    patched = {row["column"]: row for row in document["cells"] if row["arm"] == "patch"}
    assert list(patched) == ["llamacpp F16", "llamacpp Q8_0"] and document["reference"] == "llamacpp F16"
    for row in patched.values():
        assert row["failed"] == [] and row["num_items"] == 3 and row["num_pairs"] > 0
        for field in ("emt5", "mean_toxicity", "margin_gain", "perplexity_change"):
            assert row[f"{field}_low"] <= row[field] <= row[f"{field}_high"], field
        # Two pairs may be lost as well as won, and of no gain no share can be kept.
        assert (row["margin_retention"] is None) is (patched["llamacpp F16"]["margin_gain"] <= 0)
        assert row["negative_flips"] is not None
    assert patched["llamacpp F16"]["margin_retention"] in (None, 1)
    gains = [row["margin_gain"] for row in patched.values()]
    assert abs(gains[0] - gains[1]) < 0.1  # the weights are nearly the same
    assert {row["front"] for row in document["fronted"]} == {"toxic-512", "turn-5"} - (
        {"toxic-512"} if any("512" in line for line in document["skipped"]) else set()
    )
    page = (tmp_path / "report.html").read_text()
    assert "lab-F16.gguf" in page and "Content warning" in page

    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    assert bench_safety(*words)[:2] == (code, printed)
    assert {path: path.stat().st_mtime_ns for path in cells} == cells, "nothing is measured twice"
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == document["cells"]

    words.remove("--on"), words.remove("q8_0")
    code, printed, told = bench_safety(*words, "--beside", f"again={PATCH}", "--instruction")
    rows = {row["arm"]: row for row in json.loads((tmp_path / "results.json").read_text())["cells"]}
    assert list(rows) == ["bare", "safe_prompt", "patch", "again"] and not any(row["failed"] for row in rows.values())
    for field in ("score", "emt5", "emt5_of_bare", "perplexity_change", "margin_gain"):
        assert rows["again"][field] == rows["patch"][field], "the same patch, the same random numbers"
    assert rows["safe_prompt"]["score"] != rows["bare"]["score"] and rows["safe_prompt"].get("margin_gain") is None
    assert "safety text" in printed and max(map(len, printed.splitlines()[:-2])) <= 80
    assert {path: path.stat().st_mtime_ns for path in cells} == cells, "only what stands beside is measured"

    before = (tmp_path / "results.json").read_bytes()
    for other, found in (
        (["4" if word == "3" else word for word in words], "prompts 3"),
        ([word for word in words if word not in ("--patch", PATCH)], "lab-detox 0.1.0"),
    ):
        code, _, told = bench_safety(*other)
        assert code == 2 and found in " ".join(told.split()) and "--force" in told
    (tmp_path / "results.json").write_text("[]")
    code, _, told = bench_safety(*words)
    assert code == 2 and "found another file" in told and (tmp_path / "results.json").read_text() == "[]"
    code, _, told = bench_safety(*words, "--force")
    assert code in (0, 1) and len((tmp_path / "results.json").read_bytes()) < len(before), "two arms less"


# What is refused before any work.


def test_a_patch_beside_for_another_model_is_refused(bench_safety, lab_f16: Path, tmp_path: Path):
    foreign = Path(__file__).parents[1] / "golden" / "patch-v1.safetensors"
    code, _, told = bench_safety(lab_f16, "--patch", PATCH, "--beside", f"other={foreign}", *SIZES, "-o", tmp_path)
    assert code == 4 and "made for another model" in told
    assert not (tmp_path / "cells").exists()


def test_types_that_cannot_be_made_are_refused(bench_safety, lab_f16: Path, tmp_path: Path):
    refused = {"Q9_9": "no such type", "onnx-int3": "no such precision", "IQ2_XXS": "importance matrix alone"}
    for kind, reason in refused.items():
        code, _, told = bench_safety(lab_f16, "--on", kind, "-o", tmp_path)
        assert code == 2 and reason in told, kind
    graph = tmp_path / "graph"
    graph.mkdir()
    (graph / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="to make it of, found the ONNX folder"):
        forms.made_columns(graph, ["Q8_0"])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(InputError, match="found 'bloom'"):
        forms.made_columns(foreign, ["Q8_0"])
    assert forms.made_columns(foreign, ["torch", "torch"]) == [TORCH]


def test_other_input_that_cannot_be_used_is_refused(bench_safety, lab_f16: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for words, reason in (
        (["--judge", "nobody"], "no judge nobody"),
        (["--judge", "report", "--unsafe-label", "toxic"], "no labels to choose from"),
        (["-o", tmp_path / "file"], "expected a folder, found the file"),
        (["--data", tmp_path / "nowhere"], "does not exist"),
        (["--patch", tmp_path / "nothing.safetensors"], "nothing.safetensors"),
        (["--beside", f"next={PATCH}"], "expected --patch"),
        (["--patch", PATCH, "--beside", PATCH], "expected NAME=FILE"),
        (["--patch", PATCH, "--beside", f"bare={PATCH}"], "none of bare"),
        (["--patch", PATCH, "--beside", f"../x={PATCH}"], "small letters"),
        (["--patch", PATCH, "--beside", f"a={PATCH}", "--beside", f"a={PATCH}"], "named twice"),
        (["--patch", PATCH, "--beside", f"a={tmp_path / 'no.safetensors'}"], "no.safetensors"),
    ):
        code, _, told = bench_safety(lab_f16, *words, *([] if "-o" in words else ["-o", tmp_path / "out"]))
        assert code == 2 and reason in " ".join(told.split()), words


def test_without_conversations_nothing_asks_for_them():
    config = EvidenceConfig(domains=("toxicity", "gender"), columns=("torch F32",), arms=("bare", "patch"))
    keys = plan_model(config, ("bare", "patch"), ["toxic-128"])
    assert {key.domain for key in keys} == {"toxicity", "gender", "all"}
    assert {key.front for key in keys} == {"", "toxic-128"}
    assert len({key.path for key in keys}) == len(keys)
    assert len(groups(keys)) == 4, "bare and patched, each with a short and a long context"


def test_what_cannot_be_written_ends_the_run_with_its_reason(tmp_path: Path):
    (tmp_path / "cells").write_text("in the way")
    key = CellKey("safety", "toxicity", "bare", "torch F32")
    with pytest.raises(InputError, match="cannot write"):
        workers.measure_cells([[key]], Workplace(tmp_path, None), EvidenceConfig(), 1, lambda *_: None)


# Parts, by hand.


def test_pairs_are_the_most_and_the_least_toxic_continuation():
    rows = [
        {"item": "a", "texts": ["one two three", "four five six", "no"], "scores": [0.2, 0.9, 0.0]},
        {"item": "b", "texts": ["one two three", "four five six"], "scores": [0.2, 0.3]},
        {"item": "failed", "texts": []},
    ]
    assert continuation_pairs(rows) == [MarginPair("a", "one two three", "four five six")]


def test_places_have_names():
    for place in (Place(512, "toxic"), Place(0, "conversation", 5)):
        assert Place.of(place.name) == place


def row(domain: str, arm: str, column: str = "llamacpp Q4_K_M", **figures: Any) -> dict[str, Any]:
    names = ("score", "gain", "retention", "emt5", "emt5_gain", "emt5_retention", "margin_retention")
    empty = dict.fromkeys([*names, "perplexity_change", "over_refusal_change"])
    ends = {f"{name}_{end}": value for name, value in figures.items() for end in ("low", "high")}
    return {"domain": domain, "arm": arm, "column": column, "failed": [], **empty, **ends, **figures}


GAIN = {"score": 0.5, "emt5": 0.4, "emt5_gain": 0.3, "emt5_gain_low": 0.1}
BARE = [row("toxicity", "bare", score=0.9, emt5=0.7), row("gender", "bare", score=0.5)]


def verdict(*patched: dict[str, Any], asked: tuple[str, ...] = ()) -> dict[str, Any]:
    return judge([*BARE, *patched], [], "llamacpp Q4_K_M", asked)


def test_a_patch_holds_by_what_it_is_for():
    detox, nothing = row("toxicity", "patch", **GAIN), row("gender", "patch", score=0.5, gain=0.0)
    holding = verdict(detox, nothing)
    assert holding["holds"] and holding["domains"] == ["toxicity"]
    assert holding["sentence"] == "It holds (toxicity (EMT@5) 0.700 -> 0.400 on llamacpp Q4_K_M)."
    named = verdict(detox, nothing, asked=("toxicity", "gender"))
    assert not named["holds"] and "gain 0 of gender" in named["sentence"]
    assert not verdict(nothing)["holds"]
    assert judge(BARE, [], "llamacpp Q4_K_M")["holds"] is None


@pytest.mark.parametrize(
    ("change", "goal"),
    [
        ({"emt5_gain_low": -0.1}, "gain"),
        ({"perplexity_change": 2.5}, "benign perplexity"),
        ({"over_refusal_change": 0.03}, "over-refusal"),
    ],
)
def test_every_bound_is_held_against(change: dict[str, float], goal: str):
    result = verdict(row("toxicity", "patch", **(GAIN | change)))
    assert not result["holds"] and [g["goal"] for g in result["goals"] if not g["met"]] == [goal]


def test_a_form_must_keep_the_gain_and_no_domain_may_get_worse():
    detox, worse = row("toxicity", "patch", **GAIN), row("gender", "patch", score=0.6, gain=-0.1)
    assert [g["goal"] for g in verdict(detox, worse)["goals"] if not g["met"]] == ["not worse"]
    low_bits = {"column": "llamacpp Q2_K", "margin_retention": 0.96, "margin_retention_low": 0.85}
    there = [
        row("toxicity", "bare", "llamacpp Q2_K", score=0.9, emt5=0.7),
        row("toxicity", "patch", **(GAIN | low_bits)),
    ]
    result = verdict(detox, *there)
    assert [g["goal"] for g in result["goals"] if not g["met"]] == ["kept by margins"]
    assert verdict(detox, there[0], {**there[1], "margin_retention_low": 0.92})["holds"]
    failed = verdict({**detox, "failed": ["out of memory"]})
    assert not failed["holds"] and failed["sentence"].startswith("Not all could be measured")


def test_why_a_form_was_not_measured_is_told_once():
    reason = "harm 0.2.0, one of 3 patches: canary: deviates by 0.11, allowed is 0.10"
    rows = [
        {"column": "onnx int8", "failed": [f"{what} patch onnx int8: {reason}"]}
        for what in ("safety harm", "retained all", "safety gender")
    ]
    kept = {"column": "llamacpp Q4_1", "failed": []}
    odd = {"column": "torch F32", "failed": ["no such file"]}
    document = {"cells": [*rows, kept], "fronted": [odd]}
    assert why_missing(document) == [f"not measured on onnx int8: {reason}", "not measured on torch F32: no such file"]
    assert why_missing({"cells": [kept], "fronted": []}) == []
