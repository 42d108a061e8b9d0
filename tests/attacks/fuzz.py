"""Fuzzes every reader of foreign bytes: `edgepatch bench fuzz`, or in the folder `tests`: `python -m attacks.fuzz --seconds 600`.

With atheris (libFuzzer for Python) the search is guided by the branches that an input reaches; without it the same mutations run
blindly. Either way each change is one of libFuzzer's own or one of tests/attacks/mutations.py, which fixes the lengths, digests and
forms around what it changed. A reader may accept an input or raise an EdgepatchError; anything else is a finding and is kept.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from attacks.mutations import mutated_bytes, mutated_json, mutated_patch
from attacks.specimens import moving_patch, require_trusted, small_patch, trust_root
from edgepatch.errors import EdgepatchError

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results" / "fuzz.json"
ENGINES = ("atheris", "blind")
HANG_S, MEMORY_MB = 1.0, 64
FLUSH_EVERY = 500


@dataclass
class Tally:
    """What happened so far to one reader."""

    inputs: int = 0
    accepted: int = 0
    slowest_ms: float = 0.0
    crashes: list[str] = field(default_factory=list)
    baseline_mb: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        peak = peak_mb() - self.baseline_mb
        return {
            "inputs": self.inputs,
            "accepted": self.accepted,
            "crashes": self.crashes,
            "slowest_ms": round(self.slowest_ms, 1),
            "peak_mb": round(peak, 1),
        }


def peak_mb() -> float:
    """Largest resident memory of this process so far; ``ru_maxrss`` would begin with that of the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


@dataclass(frozen=True)
class Target:
    """A reader, with good inputs and changes that get past its first checks."""

    read: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    mutated: Callable[[bytes, random.Random], bytes]


def _read_patch(data: bytes) -> None:
    """What ``show`` and ``verify`` do with a file before they print; tests/cli/test_damaged.py tries the printing."""
    from edgepatch.patch.file import parse_patch, patch_bytes

    patch = parse_patch(data)
    assert patch_bytes(patch) == data
    assert json.loads(patch.manifest)["name"] == patch.name
    require_trusted(patch, trust_root())


def _read_root(data: bytes) -> None:
    from edgepatch.trust.roots import parse_root
    from edgepatch.trust.verification import require_signed

    root = parse_root(data)
    assert root.to_bytes() == data
    require_signed(root)


def _read_adapter(data: bytes) -> None:
    from edgepatch.converters.gguf.adapters import read_gguf

    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        file.write(data)
        file.flush()
        read_gguf(Path(file.name))


def _patch_seeds() -> list[bytes]:
    from dataclasses import replace

    import numpy as np

    from edgepatch.patch.file import patch_bytes
    from edgepatch.patch.sketches import Sketch

    small = small_patch()
    sketch = Sketch(
        2,
        {"blk.0.attn_q": (2, 2), "token_embd": (8, 2)},
        np.array([0.5, 1], np.float32),
        np.array([0.5, 2], np.float32),
    )
    full = replace(
        small,
        weight_sketch=sketch,
        created="2026-11-21T10:00:00Z",
        summary="x",
        parts=("0" * 64,),
        training={"x": [1, {"y": 0.5}]},
    )
    return [
        patch_bytes(small),
        patch_bytes(moving_patch()),
        patch_bytes(replace(full, kv_seed=None)),
        patch_bytes(replace(full, soft_prompt=None, signatures=())),
    ]


def _adapter_seeds() -> list[bytes]:
    from dataclasses import replace

    from edgepatch.converters.gguf.adapters import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        path, adapters = Path(folder) / "adapter.gguf", []
        for patch in (replace(small_patch(), kv_seed=None), replace(small_patch(), soft_prompt=None), moving_patch()):
            write_gguf(patch, path)
            adapters.append(path.read_bytes())
    return adapters


def _mutated_root(data: bytes, rng: random.Random) -> bytes:
    from edgepatch.files.canonical import canonical_json

    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    with contextlib.suppress(ValueError):
        return canonical_json(mutated_json(json.loads(data), rng))
    return mutated_bytes(data, rng)


def _or_bytes(mutate: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """``mutate``; plain changes of bytes where the input is no longer whole enough for it."""

    def mutated(data: bytes, rng: random.Random) -> bytes:
        try:
            return mutate(data, rng)
        except Exception:  # the input is itself a mutant: anything may be wrong with it
            return mutated_bytes(data, rng)

    return mutated


TARGETS = {
    "patch": Target(_read_patch, _patch_seeds, _or_bytes(mutated_patch)),
    "trust root": Target(_read_root, lambda: [trust_root().to_bytes()], _or_bytes(_mutated_root)),
    "GGUF adapter": Target(_read_adapter, _adapter_seeds, mutated_bytes),
}


def try_input(target: Target, data: bytes, tally: Tally) -> None:
    """One input; what should not happen goes into the tally."""
    started = time.perf_counter()
    try:
        target.read(data)
        tally.accepted += 1
    except EdgepatchError:
        pass
    except Exception as error:
        tally.crashes.append(f"{type(error).__name__}: {error}"[:200] + f" on {data.hex()[:4000]}")
    took = time.perf_counter() - started
    tally.inputs += 1
    tally.slowest_ms = max(tally.slowest_ms, took * 1e3)
    if took > HANG_S:
        tally.crashes.append(f"{took:.1f} s on {data.hex()[:4000]}")


def blind(target: Target, seconds: float, inputs: int | None = None, rng_seed: int = 0) -> Tally:
    """Mutants of the good inputs, and mutants of mutants, until the time or the number is reached."""
    rng, seeds = random.Random(rng_seed), target.seeds()
    tally, until = Tally(baseline_mb=peak_mb()), time.monotonic() + seconds
    while tally.inputs < (inputs or 1 << 62) and time.monotonic() < until:
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = target.mutated(data, rng)
        try_input(target, data, tally)
    return tally


def guided(name: str, seconds: int, report: Path) -> None:
    """Runs atheris on one reader; does not return. The tally is written as it goes, because libFuzzer ends the process."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    target, tally = TARGETS[name], Tally()
    for module in (
        "files.canonical",
        "files.reading",
        "files.strict_json",
        "patch.file",
        "patch.manifest",
        "patch.patch",
        "tensors",
        "patch.sketches",
        "seeds.anchoring",
        "seeds.rotation",
        "trust.signatures",
        "trust.roots",
        "trust.verification",
        "converters.gguf.adapters",
    ):
        instrument = importlib.import_module(f"edgepatch.{module}")
        for value in vars(instrument).values():
            if (
                callable(value)
                and getattr(value, "__module__", "") == instrument.__name__
                and hasattr(value, "__code__")
            ):
                value.__code__ = atheris.instrument_func(value).__code__

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return (target.mutated(data, rng) if rng.random() < 0.7 else bytes(atheris.Mutate(data, most)))[:most]

    def one(data: bytes) -> None:
        if not tally.baseline_mb:
            tally.baseline_mb = peak_mb()
        try_input(target, data, tally)
        if tally.inputs % FLUSH_EVERY == 0 or tally.crashes:
            report.write_text(json.dumps(tally.as_dict()))

    corpus = report.with_suffix(".corpus")
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(data)
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={seconds}",
            "-max_len=16384",
            "-rss_limit_mb=2048",
            "-verbosity=0",
        ],
        one,
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def child_environment() -> dict[str, str]:
    """Of a process that finds what this one finds, modules of the tests too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _run_guided(name: str, seconds: int, folder: Path) -> dict[str, Any]:
    report = folder / f"{name.replace(' ', '-')}.json"
    command = [
        sys.executable,
        "-m",
        "attacks.fuzz",
        "--one",
        name,
        "--seconds",
        str(seconds),
        "--report",
        str(report),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, env=child_environment())
    row: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else Tally().as_dict()
    if done.returncode != 0:
        row["crashes"].append(f"exit code {done.returncode}: {done.stderr[-500:]}")
    return row


def run(seconds: int, engine: str) -> dict[str, Any]:
    """All readers, each for its share of the time."""
    share, rows = max(seconds // len(TARGETS), 1), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, target in TARGETS.items():
            rows[name] = (
                _run_guided(name, share, Path(folder)) if engine == "atheris" else blind(target, share).as_dict()
            )
            rows[name]["seconds"] = share
            row = rows[name]
            print(
                f"{name:<14} {row['inputs']:>9,} inputs in {share} s, {len(row['crashes'])} crashes, slowest {row['slowest_ms']} ms, "
                f"{row['peak_mb']} MB more memory",
                flush=True,
            )
    return {
        "engine": engine,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "seconds": share * len(TARGETS),
        "inputs": sum(row["inputs"] for row in rows.values()),
        "readers": rows,
    }


def main(
    seconds: Annotated[int, typer.Option(min=1, help="For all readers together.")] = 600,
    engine: Annotated[str, typer.Option(help="atheris or blind; default: atheris where it is installed.")] = "",
    out: Path = RESULTS,
    one: Annotated[str, typer.Option(hidden=True)] = "",
    report: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Fuzz every reader; exit code 1 when one crashes, hangs or takes much memory."""
    if one:
        assert report is not None  # the parent names it
        guided(one, seconds, report)
    if engine not in ("", *ENGINES):
        raise typer.BadParameter(f"expected {' or '.join(ENGINES)}, found {engine}", param_hint="--engine")
    result = run(seconds, engine or ENGINES[importlib.util.find_spec("atheris") is None])
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    crashes = sum(len(row["crashes"]) for row in result["readers"].values())
    worst = max(row["peak_mb"] for row in result["readers"].values())
    print(
        f"{result['engine']}: {result['inputs']:,} inputs in {result['seconds']} s, {crashes} crashes or hangs, at most {worst} MB"
    )
    raise typer.Exit(1 if crashes or worst > MEMORY_MB else 0)


if __name__ == "__main__":
    typer.run(main)
