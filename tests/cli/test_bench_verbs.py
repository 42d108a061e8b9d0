"""``bench``: one door to every measurement, in front of plain functions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from edgepatch import cli
from edgepatch.bench import checkout
from edgepatch.bench.report.files import RESULT_FILES
from edgepatch.errors import InputError

ROOT = Path(__file__).parent.parent.parent
TARGETS = {"help", "demo", "smollm2", "minilm", "test", "lint", "lab", "bench", "devices", "clean"}


@pytest.fixture
def run(monkeypatch, capfd):
    """Arguments of ``bench`` -> (exit code, stdout, stderr), in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", "bench", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def verbs() -> set[str]:
    return set(get_command(cli.app).commands["bench"].commands)


def test_bench_alone_lists_every_measurement(run):
    _, out, err = run()
    assert {name for name in verbs() if re.search(rf"^. {name} ", out + err, re.MULTILINE)} == verbs()


def test_every_command_of_a_results_file_is_there():
    commands = [file.command.split() for file in RESULT_FILES]
    assert {words[2] for words in commands if words[:2] == ["edgepatch", "bench"]} <= verbs()
    assert not [words for words in commands if words[0] == "make" and words[1] not in TARGETS]


def test_the_makefile_has_no_second_door():
    names = re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(names) == TARGETS


def test_no_measurement_is_loaded_before_its_verb_runs():
    code = (
        "import sys; from edgepatch import cli; cli.app; "
        "print([name for name in sys.modules if name == 'numpy' or name.startswith('edgepatch.bench')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_machine_writes_what_it_prints(run, tmp_path):
    code, out, _ = run("machine", "--json", "--threads", 1, "--seconds", 0, "--out", tmp_path / "machine.json")
    document = json.loads((tmp_path / "machine.json").read_text())
    assert code == 0 and json.loads(out) == document
    assert document["command"] == "edgepatch bench machine" and document["read_gb_s"]["best"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evidence", "--column", "nosuch"], "column: there is no 'nosuch'"),
        (["evidence", "--arm", "patch", "--arm", "nosuch"], "arm: there is no 'nosuch'"),
        (["evidence", "--domain", "nosuch"], "domain: there is no 'nosuch'"),
        (["evidence", "--prompts", "10", "4", "2"], "expected a number of prompts that divides 10, found 4"),
        (["parity", "--only", "nosuch"], "architecture: expected one of"),
        (["swap", "--shape", "nosuch"], "shape: expected one of"),
        (["trl", "--model", "nosuch"], "model: expected some of lab"),
        (["buffers", "--model", "nosuch.gguf"], "there is no nosuch.gguf"),
        (["first-contact"], "expected --model, --forged or both"),
        (["lab"], "no data folder was named"),
        (["judge-card"], "no data folder was named"),
        (["composition"], "no data folder was named"),
        (["unpatch", "--model", "model.gguf"], "expected --patch too"),
        (["length", "--domain", "harm"], "no data folder was named"),
        (["length", "--domain", "nosuch"], "domain: expected one of toxicity, gender, harm, found nosuch"),
    ],
)
def test_wrong_use_is_2_and_leaves_nothing(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEPATCH_DATA", raising=False)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and message in err.replace("\n", " ")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_evidence_without_measurements_says_what_is_missing(run, tmp_path):
    arguments = ["--no-measuring", "--out", tmp_path, "--domain", "toxicity", "--arm", "bare", "--no-composition"]
    code, out, err = run("evidence", *arguments, "--column", "torch F32")
    document = json.loads((tmp_path / "evidence.json").read_text())
    assert code == 1 and "failed or missing: 2 measurements" in out
    assert err.count("not measured") == 2 and document["command"].startswith("edgepatch bench evidence --no-measuring")


def test_attacks_run_from_a_checkout_and_nowhere_else(run, tmp_path, monkeypatch):
    code, out, _ = run("fuzz", "--engine", "blind", "--seconds", 1, "--out", tmp_path / "fuzz.json")
    assert code == 0 and json.loads((tmp_path / "fuzz.json").read_text())["engine"] == "blind" and "inputs" in out
    monkeypatch.setattr(checkout, "TESTS", tmp_path)
    with pytest.raises(InputError, match=r"tests/attacks/fuzz.py is missing"):
        checkout.run_attack("fuzz")
    code, _, err = run("security", "--only", "F2")
    assert code == 2 and "source checkout" in err
