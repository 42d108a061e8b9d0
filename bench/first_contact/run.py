"""``edgepatch bench first-contact``: the price of the first load of a model, and what becomes of forged GGUF files.

A load is a process of its own: the interpreter starts, loads the model, and ends. Three kinds take turns: without any proof (how a
load was before there was one), the first (an empty memory, so that a child tries the file), and later ones (from memory).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from edgepatch.bench.first_contact.corpus import corpus
from edgepatch.bench.first_contact.forged import DIED, UNCAUGHT, judge, table
from edgepatch.converters.machine_identity import CACHE_VARIABLE
from edgepatch.errors import EdgepatchError
from edgepatch.files.writing import write_atomically
from edgepatch.processes.programs import run_program

COMMAND = "edgepatch bench first-contact --forged --model SmolLM2-135M-Instruct.Q4_1.gguf"
LOAD = """
import json, sys, time
from pathlib import Path
from edgepatch.converters import first_contact
from edgepatch.runtimes.llamacpp import proof as llamacpp_proof, runtime as llamacpp
from edgepatch.runtimes.session import Session
def unproved(path, layers, settings):
    contact = llamacpp_proof.contact(path, layers, settings)
    return first_contact.Proof(contact, contact.signature(), json.loads(sys.argv[4]))
real, looked = llamacpp.prove_model, []
def timed(*arguments):
    start = time.thread_time()  # other threads work meanwhile
    proof = real(*arguments)
    looked.append((time.thread_time() - start) * 1000)
    return proof
llamacpp.prove_model = unproved if sys.argv[3] == "unproved" else timed
first_contact.require_library = (lambda *_: None) if sys.argv[3] == "unproved" else first_contact.require_library
start = time.perf_counter()
with Session(llamacpp.LlamaCppRuntime(Path(sys.argv[1]), num_threads=int(sys.argv[2])), None) as session:
    print(json.dumps({"load_ms": (time.perf_counter() - start) * 1000, "proof_ms": looked, "notes": session.notes}))
"""
WAYS = ("unproved", "first", "later")


def _load(model: Path, way: str, threads: int, memory: Path, answer: dict[str, Any], cold: bool) -> dict[str, Any]:
    """One process: seconds by the clock and of the CPU, children included, and what it told."""
    if cold:
        with model.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-c", LOAD, str(model), str(threads), way, json.dumps(answer)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = run_program(command, environment={CACHE_VARIABLE: str(memory)})
    if done.failure:
        raise EdgepatchError(f"loading {model.name} {done.failure}")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"s": seconds, "cpu_s": cpu, **json.loads(done.output.splitlines()[-1])}


def price(model: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Loads of each kind in turn, with the file in the page cache and out of it."""
    document: dict[str, Any] = {
        "model": model.name,
        "bytes": model.stat().st_size,
        "num_threads": threads,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory(prefix="edgepatch-") as name:
        warm_memory = Path(name) / "known"
        answer = {"use_extra_buffers": True, "takes_embeddings": True}
        first = _load(model, "first", threads, warm_memory, answer, False)
        answer["use_extra_buffers"] = not first["notes"]
        for cold in (False, True):
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for number in range(rounds):
                for way in WAYS:
                    memory = Path(name) / f"{cold}-{number}" if way == "first" else warm_memory
                    runs[way].append(_load(model, way, threads, memory, answer, cold))
            document["not in the page cache" if cold else "in the page cache"] = _row(runs)
    document["notes"] = first["notes"]
    return document


def _row(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for way, loads in runs.items():
        row[way] = {
            name: round(statistics.median(load[name] for load in loads), 4) for name in ("s", "cpu_s", "load_ms")
        }
    row["later"]["lookup_cpu_ms"] = round(statistics.median(load["proof_ms"][0] for load in runs["later"]), 3)
    pairs = list(zip(runs["first"], runs["unproved"], strict=True))
    row["first / unproved"] = {
        name: round(statistics.median(a[name] / b[name] for a, b in pairs), 2) for name in ("s", "cpu_s")
    }
    return row


def forged() -> dict[str, Any]:
    """Counts of what became of the whole corpus."""
    start = time.perf_counter()
    verdicts = judge(corpus())
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    deaths = Counter(
        verdict.reason.split("cannot be used on this machine: ")[-1]
        for verdict in verdicts
        if "died" in verdict.outcome
    )
    return {
        "files": len(verdicts),
        "survived_by_the_parent": len(verdicts) - outcomes[DIED],
        "exceptions_of_no_kind_of_ours": outcomes[UNCAUGHT],
        "outcomes": dict(outcomes),
        "by_kind": table(verdicts),
        "deaths_in_children": dict(deaths.most_common()),
        "s": round(time.perf_counter() - start, 1),
    }


def run(model: Path | None, is_forged: bool, num_threads: int, rounds: int, out: Path) -> dict[str, Any]:
    """Measures what is asked for and puts it into the results; what was measured before and is not asked for stays there.

    Args:
        model: a GGUF file, whose first load is measured.
        is_forged: whether the forged files are judged.
        num_threads: of the runtime.
        rounds: of loads.
        out: the JSON file.

    Returns:
        What was measured.
    """
    measured: dict[str, Any] = {}
    if model:
        measured["price"] = price(model, num_threads, rounds)
    if is_forged:
        measured["forged"] = forged()
    before = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    facts = {"platform": platform.platform(), "cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
    document = {**before, "command": COMMAND, "platform": facts, **measured}
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    return measured
