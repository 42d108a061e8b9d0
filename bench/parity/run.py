"""``edgepatch bench parity``: proves on every architecture, runtime, quantization and cache that a seed does exactly what it should.

Writes bench/results/parity.json and .md. An architecture that is already measured with the same code and libraries is not measured
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from edgepatch import converters, decoding, patch, runtimes, text, trust
from edgepatch.bench.checkout import ROOT
from edgepatch.bench.environment import cpu_name
from edgepatch.bench.llama_server.server import FOLDER, fetch_sources
from edgepatch.bench.parity.controls import control_rows
from edgepatch.bench.parity.floors import complaint, control_complaint, judge
from edgepatch.bench.parity.models import architecture, build_folder, measured
from edgepatch.bench.parity.report import render
from edgepatch.bench.parity.rows import NUM_TOKENS, NUM_VIRTUAL_TOKENS, make_oracle, measure
from edgepatch.errors import EdgepatchError
from edgepatch.files.writing import write_atomically
from edgepatch.processes import run_apart
from edgepatch.progress import Progress, silent

Measured = dict[str, list[dict[str, Any]]]

RESULTS, DOCUMENT = ROOT / "bench" / "results" / "parity.json", ROOT / "bench" / "results" / "parity.md"
WORK = ROOT / "out" / "parity"
COMMAND = "edgepatch bench parity"
LIBRARIES = ("torch", "transformers", "gguf", "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "numpy")


class Verdict(NamedTuple):
    """How many rows reach their floors, and what is wrong with each row or control that does not."""

    num_passed: int
    failures: list[str]


def code_digest() -> str:
    """Names the code and the libraries that a measurement depends on."""
    packages = [
        Path(path) for package in (converters, decoding, patch, runtimes, text, trust) for path in package.__path__
    ]
    files = list(Path(runtimes.__path__[0]).parent.glob("*.py"))
    files += [file for folder in (*packages, Path(__file__).parent) for file in folder.rglob("*.py")]
    digest = hashlib.sha256(json.dumps([version(name) for name in LIBRARIES]).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def measure_apart(name: str, work: Path, llama_cpp: Path, digest: str) -> Measured:
    """``rows`` and ``controls`` of an architecture, measured in a process of its own, or kept from an earlier run of the same code.

    Raises:
        EdgepatchError: the process failed.
    """
    kept_file = work / f"{name}.json"
    if kept_file.is_file():
        kept = json.loads(kept_file.read_text(encoding="utf-8"))
        if kept["digest"] == digest:
            return dict(kept["found"])
    # Calibration of an earlier run must not stand in for this one's.
    settings = {
        "EDGEPATCH_CACHE_DIR": str(work / name / f"cache-{os.getpid()}"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    request = {"name": name, "work": str(work), "llama_cpp": str(llama_cpp)}
    outcome = run_apart(
        f"{__name__}:measure_here", request, deadline_s=architecture(name).limit_s, environment=settings
    )
    if outcome.error:
        raise outcome.error
    if outcome.failure:
        raise EdgepatchError(f"{name}: the measurement {outcome.failure}", hint="run it again on an idle machine")
    measured_here: Measured = outcome.value
    write_atomically(kept_file, json.dumps({"digest": digest, "found": measured_here}).encode())
    return measured_here


def measure_here(request: dict[str, str]) -> Measured:
    """In a child: ``rows`` and ``controls`` of the architecture ``name``, built below the folder ``work``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    spec, folder = architecture(request["name"]), Path(request["work"]) / request["name"]
    build_folder(spec, folder / "hf")
    oracle = make_oracle(spec, folder / "hf")
    return {
        "rows": measure(spec, folder, oracle, Path(request["llama_cpp"])),
        "controls": list(control_rows(spec, folder, oracle)),
    }


def _meta(seconds: float) -> dict[str, Any]:
    return {
        "command": COMMAND,
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "seconds": round(seconds),
        "virtual_tokens": NUM_VIRTUAL_TOKENS,
        "tokens": NUM_TOKENS,
        "reference": "Transformers in float32, fed inputs_embeds = [soft prompt; tokens]",
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four digits are more than a measurement repeats on another processor."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def write_results(rows: list[dict[str, Any]], controls: list[dict[str, Any]], seconds: float) -> None:
    """Writes the results, a line for each row, and the document made of them."""
    results = {"meta": _meta(seconds), "rows": rows, "controls": controls}
    lists = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in results[name]) + "\n]" for name in ("rows", "controls")
    ]
    text = "{" + ",\n".join([f'"meta": {json.dumps(results["meta"])}', *lists]) + "}\n"
    write_atomically(RESULTS, text.encode())
    write_atomically(DOCUMENT, render(results).encode())


def run(
    only: Sequence[str] = (), work: Path = WORK, llama_cpp: Path | None = None, progress: Progress = silent
) -> Verdict:
    """Measures, judges every row by its floor, and writes the results unless only some architectures were measured.

    Args:
        only: names of architectures; none means all.
        work: folder for models and kept measurements.
        llama_cpp: its sources; by default those of the installed llama-cpp-python, fetched once.
        progress: told of every architecture.

    Raises:
        InputError: an architecture is not known.
        EdgepatchError: one could not be measured.
    """
    start = time.perf_counter()
    names = list(only) or [each.name for each in measured()]
    for name in names:
        architecture(name)
    work.mkdir(parents=True, exist_ok=True)
    llama_cpp = llama_cpp or fetch_sources(FOLDER) / "vendor" / "llama.cpp"
    digest, rows, controls = code_digest(), [], []
    for done, name in enumerate(names):
        progress("architectures", done, len(names))
        figures = measure_apart(name, work, llama_cpp, digest)
        rows += [judge(_rounded(row)) for row in figures["rows"]]
        controls += figures["controls"]
    progress("architectures", len(names), len(names))
    if not only:
        write_results(rows, controls, time.perf_counter() - start)
    failures = [complaint(row) for row in rows if row["passed"] is False]
    failures += [control_complaint(row) for row in controls if row["required"] and not row["caught_by"]]
    return Verdict(sum(row["passed"] is True for row in rows), failures)
