"""The doctor: complete, honest about libraries that do not load, usable by scripts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgepatch
from edgepatch import doctor
from edgepatch.cli import app
from edgepatch.errors import EdgepatchError, InputError

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.examine()


def test_report_is_json_and_says_where_it_runs(report):
    again = json.loads(json.dumps(report))
    assert again["edgepatch"] == edgepatch.__version__
    assert again["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= again["cpu"]["usable_cores"] <= again["cpu"]["cores"]
    assert again["memory"]["total_bytes"] is None or again["memory"]["total_bytes"] > 2**28


def test_every_optional_package_is_listed_with_its_install_line(report):
    section = PYPROJECT.read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    names = set(re.findall(r'"([\w-]+)>=', section)) | {"transformers"}
    rows = {row["name"]: row for row in report["packages"]}
    assert names <= set(rows)
    assert rows["llama-cpp-python"]["install"] == "pip install 'edgepatch[gguf]'"
    assert rows["pytest"]["version"]


def test_extras_are_expanded():
    extras = doctor.extras()
    assert extras["train"] | extras["gguf"] <= extras["convert"] <= extras["all"]
    assert "onnxruntime-gpu" not in extras["all"], "it would overwrite onnxruntime's files"


def test_installed_libraries_are_loaded(report):
    assert set(report["libraries"]) == {"llama_cpp", "onnxruntime", "torch"}
    assert isinstance(report["limited_models"], list)
    assert report["libraries"]["llama_cpp"]["state_version"] >= 1
    assert "CPUExecutionProvider" in report["libraries"]["onnxruntime"]["providers"]
    assert all(not doctor.missing(report, extra) for extra in ("train", "gguf", "onnx"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "libfoo.so.1"),
    ],
)
def test_library_that_does_not_load_is_named_and_counts_as_missing(monkeypatch, report, code, message):
    monkeypatch.setattr(
        doctor,
        "_start_probe",
        lambda name: subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ),
    )
    broken = {**report, "libraries": doctor.libraries()}
    assert message in broken["libraries"]["torch"]["error"]
    assert any(message in line for line in doctor.missing(broken, "train"))


def test_missing_package_fails_the_requirement(monkeypatch, report):
    rows = [{**row, "version": None} if row["name"] == "peft" else row for row in report["packages"]]
    monkeypatch.setattr(doctor, "examine", lambda: {**report, "packages": rows})
    result = CliRunner().invoke(app, ["doctor", "--require", "train"])
    assert isinstance(result.exception, EdgepatchError) and result.exception.exit_code == 1
    assert "peft" in str(result.exception)
    assert "pip install 'edgepatch[train]'" in result.output


def test_unknown_extra(report):
    with pytest.raises(InputError, match="nonsense"):
        doctor.missing(report, "nonsense")


def test_table_and_json(monkeypatch, report):
    monkeypatch.setattr(doctor, "examine", lambda: report)
    table = CliRunner().invoke(app, ["doctor"]).output
    assert "llama-cpp-python" in table and report["cpu"]["model"][:8] in table
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json", "--require", "gguf"]).output) == report
