"""The security figures F1 to F18, measured: `edgepatch bench security`. One line a figure, a summary last; exit code 1 when one is missed.

F4, F5 and F6 come from tests/attacks/store.py, F15 from tests/attacks/hostile.py, F18 from tests/attacks/disagreements.py. F7, F8, F12 to
F14, F16 and F17 are tests, which run here; what they count is in the tests.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from attacks import fuzz, hostile, specimens
from attacks.disagreements import tallies
from edgepatch.errors import PatchFormatError, UntrustedError
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import parse_patch, patch_bytes
from kit.amounts import EXAMPLES_VARIABLE

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).parent.parent.parent / "bench" / "results" / "security.json"
COMMAND = "edgepatch bench security"
FUZZED_INPUTS = COMPARED_FILES = 100_000
VERIFY_MS, VERIFY_RATIO = 200, 3
SMALL_PATCH_SHA256 = "6539edb633cb3fdef2eed6fae77bdef0c0c6b71460b0219a795d5886ea3b366a"
"""Of the small specimen's file, as the machine wrote it that this line comes from."""

COVERED = ("files", "patch.file", "patch.manifest", "patch.patch", "trust", "store")
COVERING_TESTS = ("files", "patch/test_format.py", "patch/test_patches.py", "trust", "store")
ENVIRONMENTS: tuple[dict[str, str], ...] = (
    {"PYTHONHASHSEED": "0", "LC_ALL": "C"},
    {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8"},
    {"PYTHONHASHSEED": "99", "LC_ALL": "POSIX", "PYTHONUTF8": "0"},
    {"TZ": "Asia/Kathmandu", "PYTHONOPTIMIZE": "2"},
    {"NPY_DISABLE_CPU_FEATURES": "AVX2 AVX512F AVX512_SKX", "OMP_NUM_THREADS": "1"},
)
Figure = dict[str, Any]


def figure(number: str, what: str, measured: str, target: str, passed: bool) -> Figure:
    return {"id": number, "what": what, "measured": measured, "target": target, "pass": bool(passed)}


def flipped_bits() -> Figure:
    """F1: each bit of a small signed patch, one after the other."""
    data, root = patch_bytes(specimens.small_patch()), specimens.trust_root()
    bits, by_format, by_signature = len(data) * 8, 0, 0
    for bit in range(bits):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            specimens.require_trusted(parse_patch(bytes(changed)), root)
        except PatchFormatError:
            by_format += 1
        except UntrustedError:
            by_signature += 1
    measured = f"{by_format + by_signature:,} of {bits:,}: {by_format:,} by the format alone, {by_signature:,} by the signatures"
    return figure(
        "F1",
        "single-bit flips of a signed patch refused by reading and verifying",
        measured,
        "100 %",
        by_format + by_signature == bits,
    )


def truncations() -> Figure:
    """F2: every shorter file."""
    data, refused = patch_bytes(specimens.small_patch()), 0
    for length in range(len(data)):
        try:
            parse_patch(data[:length])
        except PatchFormatError:
            refused += 1
    return figure(
        "F2", "truncations refused, at every byte", f"{refused:,} of {len(data):,}", "100 %", refused == len(data)
    )


def fuzzed() -> Figure:
    """F3: mutants of patches through what ``show`` and ``verify`` do."""
    tally = fuzz.blind(fuzz.TARGETS["patch"], 3600, FUZZED_INPUTS)
    row = tally.as_dict()
    measured = f"{row['inputs']:,} inputs, {len(row['crashes'])} crashes or hangs, slowest {row['slowest_ms']} ms, {row['peak_mb']} MB"
    passed = row["inputs"] >= FUZZED_INPUTS and not row["crashes"] and row["peak_mb"] <= fuzz.MEMORY_MB
    return figure(
        "F3", "fuzzed inputs on show and verify", measured, f"{FUZZED_INPUTS:,} without crash, > 1 s or > 64 MB", passed
    )


def from_store() -> list[Figure]:
    """F4, F5 and F6; missed where tests/attacks/store.py does not give them."""
    figures: dict[str, Figure] = {}
    try:
        for row in importlib.import_module("attacks.store").figures():
            figures[row["id"]] = figure(row["id"], row["name"], row["value"], row["target"], row["passed"])
    except ImportError as error:
        print(f"note: {error}", file=sys.stderr)
    return [
        figures.get(number) or figure(number, "store", "nothing", "a figure", False) for number in ("F4", "F5", "F6")
    ]


def _tests(number: str, what: str, target: str, *arguments: str) -> Figure:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, EXAMPLES_VARIABLE: "all"},
    )
    last = (done.stdout.strip().splitlines() or ["nothing ran"])[-1]
    measured = f"{last} ({time.monotonic() - started:.0f} s)"
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-1000:], file=sys.stderr)
    return figure(number, what, measured, target, done.returncode == 0)


def conversations() -> Figure:
    return _tests(
        "F7", "10,000 generated conversations with edits", "seed lost 0 times", "tests/attacks/test_unpatching.py"
    )


def canaries() -> Figure:
    return _tests(
        "F8", "inactive or foreign seed caught, in 1,000 loads", "100 %, 0 false alarms", "tests/patch/test_canary.py"
    )


def verify_large(file: Path) -> dict[str, float]:
    """In a process of its own: time and memory of reading and verifying one file."""
    from edgepatch.patch.file import read_patch

    root, before, times = specimens.trust_root(), fuzz.peak_mb(), []
    specimens.require_trusted(specimens.small_patch(), root)  # loads what is imported on first use
    for _ in range(7):
        started = time.perf_counter()
        specimens.require_trusted(read_patch(file), root)
        times.append((time.perf_counter() - started) * 1e3)
    return {
        "first_ms": times[0],
        "median_ms": sorted(times)[3],
        "ratio": (fuzz.peak_mb() - before) * 2**20 / file.stat().st_size,
    }


def large_patch() -> Figure:
    """F9."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.safetensors"
        file.write_bytes(patch_bytes(specimens.large_patch()))
        size = file.stat().st_size
        done = subprocess.run(
            [sys.executable, "-m", "attacks.security", "--verify", str(file)],
            capture_output=True,
            text=True,
            check=True,
            env=fuzz.child_environment(),
        )
    row = json.loads(done.stdout)
    measured = f"{size / 1e6:.1f} MB: {row['median_ms']:.0f} ms (first {row['first_ms']:.0f} ms), memory {row['ratio']:.2f} x file"
    passed = row["median_ms"] < VERIFY_MS and row["ratio"] < VERIFY_RATIO
    return figure(
        "F9", "reading and verifying the largest patch", measured, f"< {VERIFY_MS} ms, < {VERIFY_RATIO} x file", passed
    )


def coverage() -> Figure:
    """F10: lines and branches that the unit tests of format, signing and store reach."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *[str(ROOT / "tests" / name) for name in COVERING_TESTS],
            *[f"--cov=edgepatch.{name}" for name in COVERED],
            "--cov-branch",
            f"--cov-report=json:{report}",
            "--cov-report=term-missing:skip-covered",
        ]
        environment = {**os.environ, "COVERAGE_FILE": str(Path(folder) / "data"), EXAMPLES_VARIABLE: "all"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        rows = json.loads(report.read_text())["files"] if report.is_file() else {}
    short = {
        name: row["summary"]["percent_covered"] for name, row in rows.items() if row["summary"]["percent_covered"] < 100
    }
    if short or done.returncode:
        print(done.stdout[-6000:], done.stderr[-1000:], file=sys.stderr)
    branches = sum(row["summary"]["num_branches"] for row in rows.values())
    gaps = "; ".join(f"{Path(name).name} {percent:.1f} %" for name, percent in sorted(short.items()))
    measured = f"{len(rows)} files, {branches} branches: {gaps or '100 %'}" + (
        ", tests failed" if done.returncode else ""
    )
    there = all(any(f"edgepatch/{name.replace('.', '/')}" in file for file in rows) for name in COVERED)
    return figure(
        "F10",
        "branch coverage of format, signing and store",
        measured,
        "100 %",
        there and not short and done.returncode == 0,
    )


def equal_bytes() -> Figure:
    """F11: in processes as different as one machine makes them, against the bytes of the machine that wrote the constant."""
    code = "import hashlib; from attacks.specimens import small_patch; from edgepatch.patch.file import patch_bytes; print(hashlib.sha256(patch_bytes(small_patch())).hexdigest())"
    command, digests = [sys.executable, "-W", "ignore", "-c", code], []
    for variables in ENVIRONMENTS:
        done = subprocess.run(
            command, env=fuzz.child_environment() | variables, capture_output=True, text=True, check=True, cwd=ROOT
        )
        digests.append(done.stdout.strip())
    equal = sum(digest == SMALL_PATCH_SHA256 for digest in digests)
    measured = f"{equal} of {len(ENVIRONMENTS)} environments of this machine give the recorded bytes ({SMALL_PATCH_SHA256[:12]})"
    return figure("F11", "same inputs, two machines: equal patches", measured, "byte-equal", equal == len(ENVIRONMENTS))


def _tested(number: str, what: str, target: str, *arguments: str) -> Callable[[], Figure]:
    return lambda: _tests(number, what, target, *(f"tests/{file}" for file in arguments))


def hostile_requests() -> Figure:
    """F15: counted on a server of its own, beside the tests of each kind."""
    target = f"0 of {hostile.REQUESTS:,}; no wait above {hostile.PATIENCE_S:g} s by the clock; all tests"
    what = "hostile requests that delay, end or unpatch another client's reply, or find a fault of the server"
    tested = _tests("F15", what, target, "tests/server/test_attacks.py", "tests/server/test_openapi.py")
    with hostile.attacked() as (served, bystanders):
        tally = hostile.attack(served, bystanders, range(hostile.REQUESTS))
    for fault in tally.faults:
        print(f"note: {fault}", file=sys.stderr)
    slowest_s = max(
        by_clock for by_clock, _ in tally.longest_s.values()
    )  # a client does not see who computes meanwhile
    is_met = not tally.num_faults and slowest_s <= hostile.PATIENCE_S and sum(tally.sent.values()) >= hostile.REQUESTS
    return tested | {
        "measured": f"{hostile.in_words(tally)}; tests: {tested['measured']}",
        "pass": tested["pass"] and is_met,
    }


def disagreements() -> Figure:
    """F18: damaged files of three formats, read by our parsers and by the libraries that they guard."""
    rows = tallies(-(-COMPARED_FILES // 3))
    inputs, differ = sum(row.inputs for row in rows), sum(row.disagreements for row in rows)
    taken = ", ".join(f"{row.taken:,} {row.format}" for row in rows)
    measured = f"{differ} of {inputs:,} damaged files; taken by our parsers: {taken}"
    return figure(
        "F18",
        "files that we and the guarded library read differently",
        measured,
        f"0 of {COMPARED_FILES:,}",
        not differ and inputs >= COMPARED_FILES,
    )


FIGURES: dict[str, Callable[[], Figure | list[Figure]]] = {
    "F1": flipped_bits,
    "F2": truncations,
    "F3": fuzzed,
    "F4": from_store,
    "F5": from_store,
    "F6": from_store,
    "F7": conversations,
    "F8": canaries,
    "F9": large_patch,
    "F10": coverage,
    "F11": equal_bytes,
    "F12": _tested(
        "F12",
        "a library that dies, hangs or eats memory is an error with an exit code",
        "100 % of load paths; 2,000 forged files",
        "converters/test_first_contact.py",
        "bench/test_forged_gguf.py",
        "text/test_limits.py",
    ),
    "F13": _tested("F13", "entry points that run bare without the word", "0", "runtimes/test_active_patch.py"),
    "F14": _tested(
        "F14", "facts of identity, changed one at a time, refused or named", "100 %", "runtimes/test_identity.py"
    ),
    "F15": hostile_requests,
    "F16": _tested("F16", "code or pickles of foreign folders run or read", "0", "files/test_pretrained.py"),
    "F17": _tested("F17", "unsigned patches active on a device with a trust root", "0", "store"),
    "F18": disagreements,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="This figure; may be repeated.")] = None,
    verify: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure every figure, or some, whose rows then take the place of the old ones; exit code 1 when one is missed."""
    if verify:
        print(json.dumps(verify_large(verify)))
        return
    if unknown := [name for name in only or () if name not in FIGURES]:
        raise typer.BadParameter(f"expected some of {', '.join(FIGURES)}, found {unknown[0]}", param_hint="--only")
    rows: list[Figure] = []
    for measure in dict.fromkeys(FIGURES[name] for name in only or FIGURES):  # one measures three of them
        result = measure()
        for row in result if isinstance(result, list) else [result]:
            rows.append(row)
            print(
                f"{row['id']:<4} {'pass' if row['pass'] else 'MISS'}  {row['what']}: {row['measured']}  (target: {row['target']})",
                flush=True,
            )
            _write(row)
    missed = [row["id"] for row in rows if not row["pass"]]
    print(
        f"{len(rows) - len(missed)} of {len(rows)} figures met" + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    raise typer.Exit(1 if missed else 0)


def _write(row: Figure) -> None:
    """Puts a row in the place of the old one."""
    old = json.loads(RESULTS.read_text("utf-8"))["figures"] if RESULTS.is_file() else []
    date = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    figures = [*(one for one in old if one["id"] != row["id"]), row | {"date": date}]
    figures.sort(key=lambda one: int(one["id"][1:]))
    missed = [one["id"] for one in figures if not one["pass"]]
    document = {"command": COMMAND, "date": date, "figures": figures, "missed": missed}
    write_atomically(RESULTS, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    typer.run(main)
