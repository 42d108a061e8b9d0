"""What exchanging a patch costs on a model of a real size: ``edgepatch bench swap``.

The weights are random, which changes no time. The seed is the model's own, taken from its cache, so that the stored route and the
canary run as they do with a trained patch.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.bench.latency.random_patches import make_patch
from edgepatch.bench.shapes.gguf import write_gguf
from edgepatch.bench.shapes.shape import SHAPES
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.patch import canary
from edgepatch.patch.file import Patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session

NUM_VIRTUAL_TOKENS = 50


def _times(act: Callable[[], object], between: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repeat; ``between`` is not timed."""
    milliseconds = []
    for _ in range(repeats):
        between()
        began = time.perf_counter()
        act()
        milliseconds.append((time.perf_counter() - began) * 1000)
    return milliseconds


def _row(times: Sequence[float]) -> dict[str, float]:
    return {"median_ms": float(np.median(times)), "min_ms": min(times), "max_ms": max(times), "repeats": len(times)}


def measure(shape: str, kind: str, num_threads: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Swap, unpatch, and the parts of a swap.

    Raises:
        InputError: the shape is not known.
    """
    if shape not in SHAPES:
        raise InputError(f"shape: expected one of {', '.join(SHAPES)}, found {shape}")
    path = folder / f"{shape}-{kind}.gguf"
    if not path.is_file():
        write_gguf(path, SHAPES[shape], kind)
    with load_runtime(path, None, num_threads=num_threads, context_length=1024) as runtime:
        backend = runtime.backend
        assert isinstance(backend, LlamaCppRuntime)
        first = make_patch(runtime, NUM_VIRTUAL_TOKENS)
        second = replace(first, name="other")
        runtime.swap(first)
        token = canary.canary_prompts(runtime.spec.vocab_size)[0]
        return {
            "command": "edgepatch bench swap",
            "shape": shape,
            "type": kind,
            "num_threads": num_threads,
            "seed_route": runtime.seed_route,
            "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
            "state_bytes": len(backend.seed_state()),
            "platform": platform.platform(),
            "load_average": os.getloadavg()[0],
            "rows": {
                "swap to another patch": _row(
                    _times(lambda: runtime.swap(second), lambda: runtime.swap(first), repeats)
                ),
                "swap to a patch that this device has used before": _row(
                    _fresh(runtime, first, repeats, confirmed=True)
                ),
                "swap to a patch that is new to this device": _row(_fresh(runtime, first, repeats, confirmed=False)),
                "unpatch": _row(_times(lambda: runtime.swap(None), lambda: runtime.swap(first), repeats)),
                "one token decoded (the canary's share)": _row(
                    _times(lambda: runtime.logits_of_last(token), runtime.reset, repeats)
                ),
            },
        }


def _fresh(runtime: Session, patch: Patch, repeats: int, confirmed: bool) -> list[float]:
    """Patches that are not in memory; where not ``confirmed``, each is compared with what the model makes of its soft prompt."""
    waiting: list[Patch] = []
    backend = runtime.backend
    assert isinstance(backend, LlamaCppRuntime)

    def prepare() -> None:
        fresh = replace(patch, name=f"fresh-{time.time_ns()}")
        if confirmed:
            runtime.swap(fresh)
            backend.seeds.forget()
        runtime.swap(patch)
        waiting.append(fresh)

    return _times(lambda: runtime.swap(waiting.pop()), prepare, repeats)


def run(shape: str, kind: str, num_threads: int, repeats: int, folder: Path, out: Path) -> dict[str, Any]:
    """Measures and writes the document that it returns.

    Args:
        shape, kind: of the random model, one of ``SHAPES`` and a type of ``write_gguf``.
        num_threads: of a forward pass.
        repeats: that count.
        folder: random models are kept here.
        out: the JSON file.
    """
    document = measure(shape, kind, num_threads, repeats, folder)
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    return document
