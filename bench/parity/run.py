"""``make parity``: proves on every architecture, runtime, quantization and cache that a seed does exactly what it should.

Writes bench/results/parity.json and .md; ends with 1 and the rows' names when a floor is missed. An architecture that
is already measured with the same code and libraries is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgepatch import converters, decoding, patch, runtimes, text, trust
from edgepatch.bench.demo import cpu_name
from edgepatch.bench.llama_server.server import fetch_sources
from edgepatch.bench.parity.controls import control_rows
from edgepatch.bench.parity.floors import complaint, control_complaint, judge
from edgepatch.bench.parity.models import architecture, build_folder, measured
from edgepatch.bench.parity.report import render
from edgepatch.bench.parity.rows import NUM_TOKENS, NUM_VIRTUAL_TOKENS, make_oracle, measure
from edgepatch.errors import EdgepatchError
from edgepatch.patch.file import write_atomically
from edgepatch.progress import OF_STREAM, Lines, Progress, logged

Found = dict[str, list[dict[str, Any]]]

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS, DOCUMENT = ROOT / "bench" / "results" / "parity.json", ROOT / "bench" / "results" / "parity.md"
COMMAND = "make parity"
LIBRARIES = ("torch", "transformers", "gguf", "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "numpy")
KEPT = "what is measured is kept; the same command goes on from there"


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


def measure_apart(name: str, work: Path, llama_cpp: Path, digest: str) -> Found:
    """``rows`` and ``controls`` of an architecture, measured in a process of its own, or kept from an earlier run of the same code.

    Raises:
        EdgepatchError: the process failed.
    """
    kept = work / f"{name}.json"
    if kept.is_file():
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["digest"] == digest:
            print(f"{name}: measured before", flush=True)
            return dict(known["found"])
    command = [
        sys.executable,
        "-m",
        "edgepatch.bench.parity",
        "--work",
        work,
        "--llama-cpp",
        llama_cpp,
        "--measure",
        name,
    ]
    # Calibration of an earlier run must not stand in for this one's.
    settings = {
        "EDGEPATCH_CACHE_DIR": str(work / name / f"cache-{os.getpid()}"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    limit_s = architecture(name).limit_s
    try:
        code = subprocess.run([str(word) for word in command], env=os.environ | settings, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        raise EdgepatchError(
            f"{name}: not measured after {limit_s} s", hint="run it again on an idle machine"
        ) from None
    if code:
        raise EdgepatchError(f"{name}: measuring failed with exit code {code}")
    found: Found = json.loads((work / f"{name}.found.json").read_text(encoding="utf-8"))
    write_atomically(kept, json.dumps({"digest": digest, "found": found}).encode())
    return found


def _measure_here(name: str, work: Path, llama_cpp: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.perf_counter()

    def tell(form: str) -> None:
        print(f"{name}: {form}, {time.perf_counter() - start:.0f} s", flush=True)

    wanted, folder = architecture(name), work / name
    build_folder(wanted, folder / "hf")
    oracle = make_oracle(wanted, folder / "hf")
    found = {
        "rows": measure(wanted, folder, oracle, llama_cpp, tell),
        "controls": list(control_rows(wanted, folder, oracle)),
    }
    tell("controls")
    write_atomically(work / f"{name}.found.json", json.dumps(found).encode())


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


def _run(arguments: argparse.Namespace, progress: Progress) -> int:
    start = time.perf_counter()
    llama_cpp = arguments.llama_cpp or fetch_sources(ROOT / "out" / "stock") / "vendor" / "llama.cpp"
    digest, rows, controls = code_digest(), [], []
    names = arguments.only or [a.name for a in measured()]
    for done, name in enumerate(names):
        progress("architectures", done, len(names))
        found = measure_apart(name, arguments.work, llama_cpp, digest)
        rows += [judge(_rounded(row)) for row in found["rows"]]
        controls += found["controls"]
    progress("architectures", len(names), len(names))
    failures = [complaint(row) for row in rows if row["passed"] is False]
    failures += [control_complaint(row) for row in controls if row["required"] and not row["caught_by"]]
    if not arguments.only:
        write_results(rows, controls, time.perf_counter() - start)
        print(f"wrote {RESULTS.relative_to(ROOT)} and {DOCUMENT.relative_to(ROOT)}")
    print(f"{sum(row['passed'] is True for row in rows)} rows reach their floors, {len(failures)} do not")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures or not rows else 0


def main() -> int:
    """Parses the command line and runs; exit code 1 when a floor is missed."""
    parser = argparse.ArgumentParser(prog="python -m edgepatch.bench.parity", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="measure these architectures alone, and write no results"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "out" / "parity", help="folder for models and kept measurements"
    )
    parser.add_argument(
        "--llama-cpp", type=Path, help="llama.cpp's sources (default: those of llama-cpp-python, fetched once)"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.measure:
            _measure_here(arguments.measure, arguments.work, arguments.llama_cpp)
            return 0
        tell = partial(print, file=sys.stderr, flush=True)
        with logged(arguments.work / "parity.log", tell, [Lines(tell, OF_STREAM)], lambda: KEPT) as progress:
            return _run(arguments, progress)
    except EdgepatchError as error:
        print(f"error: {error}\n{error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
