"""The doctor: complete, honest about libraries that do not load, usable by scripts."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import edgepatch
from edgepatch import doctor
from edgepatch.cli import app
from edgepatch.doctor import llamacpp_types, probing
from edgepatch.errors import EdgepatchError, InputError, install_command
from kit.table_lines import WIDTHS, require_readable

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
    assert rows["llama-cpp-python"]["install"] == install_command("gguf")
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


def test_every_weight_type_is_computed(report):
    """The floors are what rounding weights and activations costs; a type that is close to nothing of that was not run."""
    rows = {(row["library"], row["type"]): row for row in report["weight_types"]}
    llamacpp = {name for library, name in rows if library == "llama_cpp"}
    assert {
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q6_K",
        "IQ4_XS",
        "TQ1_0",
        "MXFP4",
    } <= llamacpp
    assert {("onnxruntime", "int4"), ("onnxruntime", "int8"), ("torch", "float32"), ("torch", "bfloat16")} <= set(rows)
    assert all(row["works"] and 0 <= row["deviation"] < 0.05 for row in rows.values()), rows
    assert all(rows["llama_cpp", name]["deviation"] > 0.002 for name in llamacpp - {"F32", "F16"})
    assert rows["torch", "float32"]["deviation"] < 1e-5 < 1e-3 < rows["torch", "bfloat16"]["deviation"]


def test_the_oracle_is_a_model_and_not_a_formula_that_fits_anything():
    """Another theta, another order of keys, another weight: what llama.cpp computes from the same file is far from it."""
    rng = np.random.default_rng(1)
    weights = {
        name: llamacpp_types._dequantized("Q8_0", llamacpp_types._matrix("Q8_0", rng))
        for name in llamacpp_types.MATRICES
    }
    norms = {name: np.ones(llamacpp_types.WIDTH) for name in llamacpp_types.NORMS}
    tokens = [int(token) for token in rng.integers(0, llamacpp_types.VOCAB, llamacpp_types.PROMPT + 1)]
    right = llamacpp_types._expected(weights | norms, tokens)
    for name in llamacpp_types.MATRICES[1:]:
        other = llamacpp_types._expected({**weights, **norms, name: weights[name][::-1]}, tokens)
        assert np.linalg.norm(other - right) > llamacpp_types.BOUND * np.linalg.norm(right), name


# Libraries that die, hang or compute nonsense: real ones cannot be had everywhere, so children run a module that behaves like them.


@pytest.fixture
def strange_library(tmp_path, monkeypatch):
    """A library of which the type "dies" ends the process with extra buffers, and "dead" with and without."""
    (tmp_path / "strange_types.py").write_text(
        textwrap.dedent("""
            import os, signal
            BOUND = 0.1
            def facts(): return {"is": "strange"}
            def types(): return ["good", "dies", "wrong", "nan", "raises", "dead", "last"]
            def deviation(name, extra_buffers):
                if name == "dead" or (name == "dies" and extra_buffers): os.kill(os.getpid(), signal.SIGSEGV)
                if name == "raises": raise RuntimeError("not implemented for Strange")
                return {"wrong": 0.7, "nan": float("nan")}.get(name, 0.01)
        """),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)

    def replace(name: str, module: str = "strange_types", has_extra_buffers: bool = True) -> None:
        library = probing.Library(module, probing.LIBRARIES[name].distributions, has_extra_buffers)
        monkeypatch.setattr(probing, "LIBRARIES", {name: library})

    return replace


def test_types_that_end_the_process_are_told_apart_from_those_behind_them(strange_library, report):
    strange_library("llama_cpp")
    libraries, rows = probing.probe_libraries()
    assert libraries == {"llama_cpp": {"is": "strange"}}
    assert {row["type"]: (row["works"], row["note"]) for row in rows} == {
        "good": (True, ""),
        "dies": (True, "died of SIGSEGV; runs without extra buffers"),
        "wrong": (False, "computes something else: off by 70%"),
        "nan": (False, "computes numbers that are not finite"),
        "raises": (False, "not implemented for Strange"),
        "dead": (False, "died of SIGSEGV"),
        "last": (True, ""),
    }
    lacking = doctor.missing({**report, "weight_types": rows}, "gguf")
    assert len(lacking) == 4 and "llama_cpp with dead weights (died of SIGSEGV)" in lacking
    json.dumps(rows, allow_nan=False)


def test_without_another_way_a_dead_type_stays_dead(strange_library):
    strange_library("torch", has_extra_buffers=False)
    rows = probing.probe_libraries()[1]
    assert [row["type"] for row in rows if not row["works"]] == ["dies", "wrong", "nan", "raises", "dead"]


def test_library_that_computes_nothing_fails_the_requirement(strange_library, report, monkeypatch):
    strange_library("llama_cpp")
    rows = probing.probe_libraries()[1]
    monkeypatch.setattr(doctor, "examine", lambda: {**report, "weight_types": rows})
    result = CliRunner().invoke(app, ["doctor", "--all", "--require", "gguf"])
    assert isinstance(result.exception, EdgepatchError) and result.exception.exit_code == 1
    assert "llama_cpp with dead weights (died of SIGSEGV)" in str(result.exception)
    assert result.exception.hint == "python -m edgepatch.compilation"
    flat = " ".join(result.output.split())
    assert "compiles it for this machine" in flat and "runs without extra" in flat


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("raise ImportError('libfoo.so.1: cannot open shared object file')", "libfoo.so.1"),
    ],
)
def test_library_that_does_not_load_is_named_and_counts_as_missing(tmp_path, strange_library, report, code, message):
    (tmp_path / "broken_types.py").write_text(code, encoding="utf-8")
    strange_library("torch", module="broken_types")
    libraries, rows = probing.probe_libraries()
    assert message in libraries["torch"]["error"] and rows == []
    broken = {**report, "libraries": libraries}
    assert any(message in line for line in doctor.missing(broken, "train"))
    assert doctor.remedy(broken, "train") == install_command("train", is_again=True)


def test_an_extra_that_does_not_exist_is_told_before_any_trial(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("the machine was examined"))
    result = CliRunner().invoke(app, ["doctor", "--require", "cuda"])
    assert isinstance(result.exception, InputError) and "no extra is named cuda" in str(result.exception)


def test_missing_package_fails_the_requirement(monkeypatch, report):
    rows = [{**row, "version": None} if row["name"] == "peft" else row for row in report["packages"]]
    monkeypatch.setattr(doctor, "examine", lambda: {**report, "packages": rows})
    result = CliRunner().invoke(app, ["doctor", "--require", "train"])
    assert isinstance(result.exception, EdgepatchError) and result.exception.exit_code == 1
    assert "peft" in str(result.exception)
    assert "".join(install_command("train").split()) in "".join(result.output.split())


def test_unknown_extra(report):
    with pytest.raises(InputError, match="nonsense"):
        doctor.missing(report, "nonsense")


def test_table_and_json(monkeypatch, report):
    monkeypatch.setattr(doctor, "examine", lambda: report)
    monkeypatch.setenv("COLUMNS", "200")
    verdicts = CliRunner().invoke(app, ["doctor"]).output
    answer, first, *_ = verdicts.splitlines()
    assert answer.startswith("this machine is ready to run GGUF models")
    assert first.split() == ["run", "GGUF", "models", "ready"] and len(verdicts.splitlines()) < 20
    table = CliRunner().invoke(app, ["doctor", "--all"]).output
    assert "llama-cpp-python" in table and report["cpu"]["model"][:8] in table
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json", "--require", "gguf"]).output) == report


def test_a_build_without_this_cpus_instructions_is_named(monkeypatch, report):
    """It computes right, five times slower: the doctor says so and what mends it."""
    cpu = {**report["cpu"], "features": ["avx2", "fma"]}
    built = {name: {**report["libraries"]["llama_cpp"], "system_info": f"CPU : {name}"} for name in ("AVX2 = 1", "")}
    for info, names in (("AVX2 = 1", []), ("", ["AVX2"])):
        changed = {**report, "cpu": cpu, "libraries": {"llama_cpp": built[info]}}
        assert doctor.unused_instructions(changed) == names
        monkeypatch.setattr(doctor, "examine", lambda changed=changed: changed)
        output = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).output
        assert ("compiled without AVX2" in output) == bool(names)
    assert doctor.unused_instructions({**report, "libraries": {}}) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_fit_the_terminal(monkeypatch, report, width):
    missing = [{**row, "version": None} if row["name"] in ("peft", "llguidance") else row for row in report["packages"]]
    monkeypatch.setattr(doctor, "examine", lambda: {**report, "packages": missing})
    monkeypatch.setenv("COLUMNS", str(width))
    output = CliRunner().invoke(app, ["doctor", "--all"]).output
    require_readable(output, width, [f"`{install_command('train')}`", "llama-cpp-python", "cyclonedx-python-lib"])
    assert (
        " ".join(output.split()).startswith("this machine is ready to serve models") and "not yet to run GGUF" in output
    )
