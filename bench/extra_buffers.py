"""What llama.cpp's kernels for repacked weights are worth on this CPU: the same file with extra buffers and without, in turn.

``make buffers`` writes bench/results/extra_buffers.json. Both contexts are open at once and take turns, so that other work on the
machine meets both; CPU seconds are told beside wall seconds, because they hardly depend on it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgepatch import compilation
from edgepatch.bench.shapes.gguf import write_gguf
from edgepatch.bench.shapes.shape import Shape
from edgepatch.compilation.compilers import toolchain, uses_amx
from edgepatch.doctor import cpu
from edgepatch.doctor.llamacpp_types import opened_context
from edgepatch.errors import EdgepatchError, InputError

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(
    1024, 10, 16, 4, 64, 3072, 32000, 2048
)  # 152 M weights; rows are multiples of 256, so K-quants do not fall back
RANDOM = "random-152m-"
KINDS = ("Q4_0", "Q8_0", "Q4_K_M")
PROMPT, NEW = 512, 128
ARMS = {"extra_buffers": True, "no_extra_buffers": False}


def measure(path: Path, num_threads: int, repeats: int) -> list[dict[str, Any]]:
    """Evaluates a prompt and decodes tokens, with extra buffers and without, in turn.

    Args:
        path: GGUF file.
        num_threads: of an evaluation.
        repeats: of each arm, after one that does not count.

    Returns:
        A row for each measure ("prompt", "decode"): median wall and CPU seconds of both arms, and their medians' ratios.
    """
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with ExitStack() as resources:
        length = PROMPT + NEW
        contexts = {
            arm: resources.enter_context(opened_context(path, extra, length, num_threads))
            for arm, extra in ARMS.items()
        }
        for repeat in range(repeats + 1):
            for arm, (lib, context) in contexts.items():
                for name, sample in _sample(lib, context).items():
                    if repeat:
                        samples.setdefault((name, arm), []).append(sample)
    return [_row(path, num_threads, name, samples) for name in ("prompt", "decode")]


def _sample(lib: Any, context: Any) -> dict[str, tuple[float, float]]:
    """(wall, CPU) seconds of a prompt from nothing and of the tokens behind it."""
    lib.llama_memory_clear(lib.llama_get_memory(context), False)
    return {"prompt": _timed(lib, context, [PROMPT]), "decode": _timed(lib, context, [1] * NEW)}


def _timed(lib: Any, context: Any, sizes: Sequence[int]) -> tuple[float, float]:
    wall, used = time.perf_counter(), time.process_time()
    for size in sizes:
        ids = (lib.llama_token * size)(*range(3, 3 + size))
        if lib.llama_decode(context, lib.llama_batch_get_one(ids, size)):
            raise EdgepatchError("llama.cpp does not evaluate the model")
    lib.llama_synchronize(context)
    return time.perf_counter() - wall, time.process_time() - used


def _row(
    path: Path, num_threads: int, measured: str, samples: dict[tuple[str, str], list[tuple[float, float]]]
) -> dict[str, Any]:
    tokens = PROMPT if measured == "prompt" else NEW
    row: dict[str, Any] = {"model": path.name, "threads": num_threads, "measure": measured, "tokens": tokens}
    for position, clock in enumerate(("wall", "cpu")):
        medians = {arm: statistics.median(sample[position] for sample in samples[measured, arm]) for arm in ARMS}
        row |= {f"{clock}_s_{arm}": round(seconds, 4) for arm, seconds in medians.items()}
        row[f"{clock}_speedup"] = round(medians["no_extra_buffers"] / medians["extra_buffers"], 3)
    return row | {"repeats": len(samples[measured, "extra_buffers"])}


def run(models: Sequence[Path], threads: Sequence[int], repeats: int) -> dict[str, Any]:
    """The whole document: the library and the machine, and the rows of every model and number of threads."""
    return {
        "command": "python -m edgepatch.bench.extra_buffers " + " ".join(_options(models, threads, repeats)),
        "llama_cpp_python": version(compilation.DISTRIBUTION),
        "compiler": toolchain().name,
        "flags": list(toolchain().flags),
        "holds_amx": any(map(uses_amx, compilation.installed_libraries())),
        "cpu": cpu(),
        "platform": platform.platform(),
        "rows": [row for model in models for count in threads for row in _told(measure(model, count, repeats))],
    }


def _told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        speedups = f"x {row['wall_speedup']} wall, x {row['cpu_speedup']} CPU"
        print(f"{row['model']:40} {row['threads']} threads  {row['measure']:7} {speedups}", flush=True)
    return rows


def _options(models: Sequence[Path], threads: Sequence[int], repeats: int) -> list[str]:
    named = [f"--model {model.name}" for model in models if not model.name.startswith(RANDOM)]
    return [*named, *(f"--threads {count}" for count in threads), f"--repeats {repeats}"]


def main() -> None:
    """Writes the random models where they are missing, and measures them and those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, action="append", default=[], help="another GGUF file; may be repeated")
    parser.add_argument("--threads", type=int, action="append", help="may be repeated; by default 1 and 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", type=Path, default=ROOT / "out" / "shapes", help="folder of the random models")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "extra_buffers.json")
    arguments = parser.parse_args()
    for model in arguments.model:
        if not model.is_file():
            raise InputError(f"--model: there is no {model}")
    written = [arguments.shapes / f"{RANDOM}{kind}.gguf" for kind in KINDS]
    for path, kind in zip(written, KINDS, strict=True):
        if not path.is_file():
            write_gguf(path, SHAPE, kind)
    result = run([*arguments.model, *written], arguments.threads or (1, 2), arguments.repeats)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
