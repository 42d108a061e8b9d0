"""What llama.cpp's kernels for repacked weights are worth on this CPU: the same file with extra buffers and without, in turn.

``edgepatch bench buffers`` writes bench/results/extra_buffers.json. Both contexts are open at once and take turns, so that other work on the
machine meets both; CPU seconds are told beside wall seconds, because they hardly depend on it.
"""

from __future__ import annotations

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
from edgepatch.files.writing import write_atomically

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


def _document(models: Sequence[Path], threads: Sequence[int], repeats: int) -> dict[str, Any]:
    """The whole document: the library and the machine, and the rows of every model and number of threads."""
    return {
        "command": "edgepatch bench buffers " + " ".join(_options(models, threads, repeats)),
        "llama_cpp_python": version(compilation.DISTRIBUTION),
        "compiler": toolchain().name,
        "flags": list(toolchain().flags),
        "holds_amx": any(map(uses_amx, compilation.installed_libraries())),
        "cpu": cpu(),
        "platform": platform.platform(),
        "rows": [row for model in models for count in threads for row in measure(model, count, repeats)],
    }


def _options(models: Sequence[Path], threads: Sequence[int], repeats: int) -> list[str]:
    named = [f"--model {model.name}" for model in models if not model.name.startswith(RANDOM)]
    return [*named, *(f"--threads {count}" for count in threads), f"--repeats {repeats}"]


def run(models: Sequence[Path], threads: Sequence[int], repeats: int, shapes: Path, out: Path) -> dict[str, Any]:
    """Writes the random models where they are missing, measures them and those that are named, and writes the document.

    Args:
        models: further GGUF files.
        threads: numbers of threads, each measured.
        repeats: of each arm.
        shapes: folder of the random models.
        out: the JSON file.

    Raises:
        InputError: a model is missing.
    """
    for model in models:
        if not model.is_file():
            raise InputError(f"--model: there is no {model}")
    written = [shapes / f"{RANDOM}{kind}.gguf" for kind in KINDS]
    for path, kind in zip(written, KINDS, strict=True):
        if not path.is_file():
            write_gguf(path, SHAPE, kind)
    document = _document([*models, *written], threads, repeats)
    write_atomically(out, (json.dumps(document, indent=2) + "\n").encode())
    return document
