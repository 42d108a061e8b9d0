"""The gate: what passes, what does not and why, and that nothing passes because it is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgepatch import cli
from edgepatch.bench.report.gate import Figure, check, figures, is_higher_better, make_baseline, read_baseline
from edgepatch.errors import InputError

ROOT = Path(__file__).parent.parent.parent.parent
CELL = {
    "domain": "toxicity",
    "arm": "patch",
    "column": "llamacpp Q4_K_M",
    "route": "stored",
    "retention": 0.97,
    "retention_low": 0.93,
    "retention_high": 1.01,
    "perplexity_change": 1.0,
    "perplexity_change_low": 0.8,
    "perplexity_change_high": 1.2,
    "over_refusal_change": 0.0,
    "over_refusal_change_low": -0.01,
    "over_refusal_change_high": 0.01,
}
RATIOS = {
    "ttft_patched_over_bare": {"value": 1.01, "low": 1.0, "high": 1.02},
    "decode_patched_over_bare": {"value": 0.99, "low": 0.98, "high": 1.0},
    "ttft_lora_r8_over_patched": {"value": 1.3, "low": 1.2, "high": 1.4},
}
KEPT = "retention/toxicity/patch/llamacpp Q4_K_M"
PERPLEXITY = "perplexity_change/toxicity/patch/llamacpp Q4_K_M"
REFUSED = "over_refusal_change/toxicity/patch/llamacpp Q4_K_M"
TTFT, DECODE = "ratio/ttft_patched_over_bare", "ratio/decode_patched_over_bare"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write(tmp_path, {}, {})
    return tmp_path


def write(folder: Path, cell: dict[str, Any], ratios: dict[str, Any]) -> None:
    """Results that differ from the usual ones in the given fields."""
    bare = {**CELL, "arm": "bare", "retention": None}
    (folder / "evidence.json").write_text(
        json.dumps({"cells": [{**CELL, **cell}, bare, {**CELL, "route": "decoded", "retention": 0.1}]})
    )
    (folder / "latency.json").write_text(json.dumps({"ratios": {**RATIOS, **ratios}}))


@pytest.fixture
def gate(results: Path, monkeypatch, capfd):
    """Arguments -> (exit code, stdout, stderr) of ``bench gate`` on the results."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["edgepatch", "bench", "gate", "--results", str(results), *map(str, arguments)]
        )
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


@pytest.fixture
def baseline(results: Path, gate) -> Path:
    path = results / "baseline.json"
    assert gate("--write", path)[0] == 0
    return path


def test_watched_are_patches_as_shipped_and_ratios_of_ours(results: Path):
    watched = figures(results)
    assert set(watched) == {KEPT, PERPLEXITY, REFUSED, TTFT, DECODE}
    assert watched[KEPT] == Figure(0.97, 0.93, 1.01)


def test_further_runs_are_watched_by_their_names(results: Path):
    (results / "latency-small-int4.json").write_text((results / "latency.json").read_text())
    watched = figures(results)
    more = {name for name in watched if name.startswith("ratio/small-int4/")}
    assert {name.replace("small-int4/", "") for name in more} == {TTFT, DECODE}
    assert {name: is_higher_better(name) for name in more} == {name: "decode" in name for name in more}


def test_the_committed_results_pass_the_committed_baseline():
    baseline = read_baseline(ROOT / "bench" / "baseline.json")
    assert len(baseline) > 50 and not check(baseline, figures(ROOT / "bench" / "results"))


def test_directions():
    assert [is_higher_better(name) for name in (KEPT, DECODE, PERPLEXITY, REFUSED, TTFT, "ratio/cold_start_x")] == [
        True
    ] * 2 + [False] * 4


def test_a_baseline_states_its_limits(baseline: Path):
    document = json.loads(baseline.read_text())
    entries = document["figures"]
    assert entries[KEPT]["floor"] == 0.92 and entries[PERPLEXITY]["ceiling"] == 2.0 and entries[TTFT]["ceiling"] == 1.04
    assert document["tolerances"]["retention"] == 0.05


def test_a_limit_is_never_within_the_interval():
    baseline = make_baseline({KEPT: Figure(0.9, 0.7, 1.1)}, "")
    assert baseline["figures"][KEPT]["floor"] == 0.7


def test_same_results_pass(gate, baseline: Path):
    code, out, _ = gate("--baseline", baseline)
    assert (code, out) == (0, "5 of 5 figures pass\n")


@pytest.mark.parametrize(
    ("cell", "ratios", "name", "expected", "actual"),
    [
        ({"retention": 0.5, "retention_low": 0.4, "retention_high": 0.6}, {}, KEPT, ">= 0.92", "0.5"),
        ({"perplexity_change": 4.0}, {}, PERPLEXITY, "<= 2", "4"),
        ({"over_refusal_change": 0.2}, {}, REFUSED, "<= 0.02", "0.2"),
        ({}, {"ttft_patched_over_bare": {"value": 1.2, "low": 1.1, "high": 1.3}}, TTFT, "<= 1.04", "1.2"),
        ({}, {"decode_patched_over_bare": {"value": 0.9, "low": 0.8, "high": 1.0}}, DECODE, ">= 0.96", "0.9"),
    ],
)
def test_a_figure_beyond_its_limit_fails_and_is_named(results, gate, baseline, cell, ratios, name, expected, actual):
    write(results, cell, ratios)
    code, out, _ = gate("--baseline", baseline)
    assert code == 1
    assert out.splitlines() == [f"{name}: beyond its limit: expected {expected}, found {actual}", "4 of 5 figures pass"]
    code, out, _ = gate("--baseline", baseline, "--json")
    document = json.loads(out)
    assert code == 1 and document["passed"] is False and document["num_figures"] == 5
    assert document["failures"] == [
        {"figure": name, "reason": "beyond its limit", "expected": expected, "found": actual}
    ]


def test_worse_than_the_baseline_beyond_the_intervals_fails_within_the_limit():
    entry = {KEPT: {"floor": 0.5, "value": 0.97, "low": 0.94, "high": 1.0}}
    (failure,) = check(entry, {KEPT: Figure(0.9, 0.88, 0.92)})
    assert failure.reason == "worse than the baseline" and failure.found == "0.9"
    assert not check(entry, {KEPT: Figure(0.94, 0.92, 0.96)}), "0.03 is within hypot(0.03, 0.02)"
    assert not check(entry, {KEPT: Figure(1.2, 1.19, 1.21)}), "better is no failure"
    assert not check(entry, {KEPT: Figure(0.6, 0.5, None)}), "an end without a value is infinite"
    assert not check({KEPT: {"floor": 0.5, "value": 0.97}}, {KEPT: Figure(0.6)}), (
        "without intervals the limit alone decides"
    )
    less = {TTFT: {"ceiling": 2.0, "value": 1.0, "low": 0.99, "high": 1.01}}
    assert [f.figure for f in check(less, {TTFT: Figure(1.1, 1.08, 1.12)})] == [TTFT]
    assert not check(less, {TTFT: Figure(0.5, 0.49, 0.51)})


@pytest.mark.parametrize("lost", ["evidence.json", "latency.json"])
def test_a_missing_file_fails(results, gate, baseline, lost):
    (results / lost).unlink()
    code, out, _ = gate("--baseline", baseline)
    assert code == 1 and "missing" in out and "no such figure" in out


@pytest.mark.parametrize("value", [None, True, "0.99", 10**400], ids=lambda value: str(value)[:8])
def test_a_figure_that_is_no_number_fails(results, gate, baseline, value):
    write(results, {"retention": value}, {})
    code, out, _ = gate("--baseline", baseline)
    assert code == 1 and f"{KEPT}: missing" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "JSON object"),
        ("{}", "version"),
        ('{"version": 1}', "figures"),
        ('{"version": 1, "figures": {}}', "figures"),
        ('{"version": 2, "figures": {"a": {"floor": 1}}}', "version"),
        ('{"version": 1, "figures": {"a": {"value": 1}}}', "floor or a ceiling"),
        ('{"version": 1, "figures": {"a": {"floor": null}}}', "numbers"),
        ('{"version": 1, "figures": {"a": {"floor": NaN}}}', "NaN"),
        ('{"version": 1, "figures": {"a": {"floor": 1, "flor": 2}}}', "flor"),
        ('{"version": 1, "figures": {"a": 1}}', "floor or a ceiling"),
    ],
)
def test_a_baseline_that_cannot_be_used_is_2(results, gate, text, message):
    path = results / "bad.json"
    path.write_text(text)
    code, out, err = gate("--baseline", path)
    assert (code, out) == (2, "") and message in " ".join(err.split()) and "Traceback" not in err


def test_wrong_use_and_wrong_results_are_2(results, gate, baseline):
    assert (
        gate()[0]
        == gate("--baseline", baseline, "--write", baseline)[0]
        == gate("--baseline", results / "nothing")[0]
        == 2
    )
    (results / "evidence.json").write_text('{"cells": [{}]}')
    code, _, err = gate("--baseline", baseline)
    assert code == 2 and "evidence.json" in err and "make it again" in err
    with pytest.raises(InputError, match="folder"):
        figures(results / "nothing")


def test_nothing_measured_gives_no_baseline(results, gate):
    for name in ("evidence.json", "latency.json"):
        (results / name).unlink()
    code, _, err = gate("--write", results / "new.json")
    assert code == 2 and "found none" in err and not (results / "new.json").exists()


def test_a_baseline_is_read_as_it_was_written(baseline: Path, results: Path):
    assert not check(read_baseline(baseline), figures(results))
