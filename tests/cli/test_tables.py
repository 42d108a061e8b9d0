"""Tables at 60, 80 and 120 columns: identifiers whole, nothing padded, the answer first, and JSON by ``--json`` alone."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import edgepatch
from edgepatch import cli
from edgepatch.bench.harness.comparison import Flips, Score
from edgepatch.bench.metrics import Estimate
from edgepatch.bench.report.matrix_page import TABLE_COLUMNS, terminal_table
from edgepatch.cli.bench.harness import print_scores
from edgepatch.cli.bench.safety import print_summary
from edgepatch.cli.console import print_table, stdout, table
from edgepatch.cli.tables import speed
from edgepatch.patch.file import read_patch
from kit.stores import make_root, write
from kit.table_lines import WIDTHS, require_readable

BENCH = Path(edgepatch.__file__).parent / "bench"
LAB_PATCH = BENCH / "lab" / "model" / "lab-detox-0.2.0.safetensors"
LAB_BASE = BENCH / "lab" / "model" / "base"
BORN = datetime.now(timezone.utc) - timedelta(days=2)
SCORE = Estimate(0.5, 0.4, 0.6)


def results(name: str) -> dict[str, Any]:
    """A committed document."""
    return json.loads((BENCH / "results" / name).read_text("utf-8"))


@pytest.fixture
def run(monkeypatch, capsys):
    """(arguments) -> stdout, of a command that succeeds."""

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        assert not caught.value.code, output.err
        return output.out

    return command


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_of_the_store(run, monkeypatch, tmp_path, width):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", str(width))
    (tmp_path / "root.json").write_bytes(make_root(created=BORN).to_bytes())
    require_readable(run("trust", "set", "root.json"), width)
    require_readable(run("trust", "show"), width)
    files = [write(tmp_path, 1), write(tmp_path, 2)]
    digests = [read_patch(file).digest for file in files]
    for file, digest in zip(files, digests, strict=True):
        require_readable(run("apply", file), width, [digest])
    run("rollback", "--reason", "it refuses too much, said the two teams that tried it out last week")
    answers = {
        "list": "2 patches, 1 active",
        "status": "1 patch is active, for 1 model",
        "history": "4 entries, unchanged",
    }
    for verb, answer in answers.items():
        output = run(verb)
        require_readable(output, width, [digest[:12] for digest in digests[: 1 if verb == "status" else 2]])
        assert output.splitlines()[0] == answer
        json.loads(run(verb, "--json"))
    require_readable(run("verify", files[0]), width, [digests[0]])


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_of_files(run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    patch = read_patch(LAB_PATCH)
    for words in (["show", LAB_PATCH], ["show", LAB_PATCH, "--all"]):
        require_readable(run(*words), width, [patch.digest, patch.base.weight_fingerprint[:12]])
    require_readable(run("show", LAB_BASE), width, [patch.base.weight_fingerprint[:12]])
    require_readable(run("show", BENCH / "results" / "smollm2.json"), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_of_measurements(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))

    def require(*words: str) -> str:
        output = capsys.readouterr().out
        require_readable(output, width, words)
        return " ".join(output.split())

    for name in ("latency.json", "latency-llama-3.2-1b-int4.json"):
        document = results(name)
        print_table(speed.TIMES, speed.time_rows(document["rows"]), speed.latency_answer(document), speed.LESS)
        assert require("edgepatch", "cold start").startswith("the patch changes the time to the first token by ")
        print_table(speed.GOALS, speed.goal_rows(document["goals"]))
        require()
    moves = results("moves.json")
    print_table(tuple(speed.MOVES.values()), speed.move_rows(moves["cells"]), speed.moves_answer(moves["cells"]))
    assert require().startswith("moving every ")
    stdout().print(table(speed.contact_rows(results("first_contact.json"))))
    require("2,415")
    print_summary(results("smollm2.json"))
    assert require("toxicity", "Q4_1").startswith(results("smollm2.json")["verdict"]["sentence"])
    sentence, rows, _ = terminal_table(results("own/results.json"))
    print_table(TABLE_COLUMNS, rows, sentence)
    assert require("Q4_K_M", "int4").startswith(sentence)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_harness_says_what_the_patch_does(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    broken = Score("own_choice", "acc", 10, True, SCORE, SCORE, Estimate(-0.3, -0.6, -0.1), Flips(3, 0, 0.25))
    same = Score(
        "gsm8k_local", "exact_match,flexible-extract", 1319, None, SCORE, SCORE, Estimate(0.0, -0.1, 0.1), None
    )
    print_scores([broken, same])
    output = capsys.readouterr().out
    require_readable(output, width, ["own_choice", "exact_match,flexible-extract"])
    assert " ".join(output.split()).startswith(
        "the patch moves 1 of 2 scores beyond chance: own_choice acc -0.300 [-0.600, -0.100]"
    )


def test_text_in_a_table_steers_no_terminal_and_keeps_its_lines(capsys):
    print_table(("name", "what", "nothing"), [("a[b]", "one\x1b[31m\ntwo", ""), ("漢字", "three", "")])
    output = capsys.readouterr().out
    assert "\x1b" not in output and "a[b]" in output and "nothing" not in output
    lines = output.splitlines()
    assert lines[2].strip() == "two" and lines[3].startswith("漢字  three")
