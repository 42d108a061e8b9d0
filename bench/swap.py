"""What exchanging a patch costs on a model of a real size: ``make swap``.

The weights are random, which changes no time. The seed is the model's own, taken from its cache, so that the stored route and the
canary run as they do with a trained patch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch import canary
from edgepatch.bench.shapes import SHAPES, write_gguf
from edgepatch.converters import gguf_specs, llamacpp_layout
from edgepatch.converters.llamacpp_state import read_state
from edgepatch.patches import Patch, write_atomically
from edgepatch.runtimes.llamacpp import LlamaCppRuntime
from edgepatch.tensors import KVSeed, ModelSpec, SoftPrompt

NUM_VIRTUAL_TOKENS = 50


def _patch(runtime: LlamaCppRuntime, spec: ModelSpec) -> Patch:
    """A random patch with the seed and the canary that this model itself gives it."""
    rng = np.random.default_rng(0)
    prompt = SoftPrompt((rng.standard_normal((NUM_VIRTUAL_TOKENS, spec.hidden_size)) * 0.02).astype(np.float32))
    patch = Patch("random", "1.0.0", spec, prompt)
    prompts = canary.canary_prompts(spec.vocab_size)

    def answers(active: Patch | None) -> dict[Sequence[int], NDArray[np.float32]]:
        runtime.swap(active)
        return {tokens: runtime.logits_of_last(tokens) for tokens in prompts}

    bare, patched = answers(None), answers(patch)
    cache = read_state(runtime.seed_state()).caches[0]
    shape = (spec.num_key_value_heads, spec.head_dim)
    keys = [llamacpp_layout.decode_rows(rows, NUM_VIRTUAL_TOKENS, shape, False) for rows in cache.keys]
    values = [llamacpp_layout.decode_rows(rows, NUM_VIRTUAL_TOKENS, shape, cache.transposed) for rows in cache.values]
    halves = [key.reshape(*key.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(key.shape) for key in keys]  # rotate-half order
    seed = KVSeed(tuple(k.astype(np.float16) for k in halves), tuple(v.astype(np.float16) for v in values))
    made = canary.make_canary(spec.vocab_size, lambda t: bare[tuple(t)], lambda t: patched[tuple(t)])
    return replace(patch, kv_seed=seed, canary=made)


def _times(act: Callable[[], object], between: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repeat; ``between`` is not timed."""
    found = []
    for _ in range(repeats):
        between()
        began = time.perf_counter()
        act()
        found.append((time.perf_counter() - began) * 1000)
    return found


def _row(times: Sequence[float]) -> dict[str, float]:
    return {"median_ms": float(np.median(times)), "min_ms": min(times), "max_ms": max(times), "repeats": len(times)}


def measure(shape: str, kind: str, num_threads: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Swap, unpatch, and the parts of a swap."""
    path = folder / f"{shape}-{kind}.gguf"
    if not path.is_file():
        write_gguf(path, SHAPES[shape], kind)
    spec = gguf_specs.read_spec(path)
    with LlamaCppRuntime(path, None, num_threads=num_threads, context_length=1024) as runtime:
        first = _patch(runtime, spec)
        second = replace(first, name="other")
        runtime.swap(first)
        token = canary.canary_prompts(spec.vocab_size)[0]
        return {
            "command": "make swap", "shape": shape, "type": kind, "num_threads": num_threads, "seed_route": runtime.seed_route,
            "num_virtual_tokens": NUM_VIRTUAL_TOKENS, "state_bytes": len(runtime.seed_state()),
            "platform": platform.platform(), "load_average": os.getloadavg()[0],
            "rows": {
                "swap to another patch": _row(_times(lambda: runtime.swap(second), lambda: runtime.swap(first), repeats)),
                "swap to a patch that this device has used before": _row(_fresh(runtime, first, repeats, confirmed=True)),
                "swap to a patch that is new to this device": _row(_fresh(runtime, first, repeats, confirmed=False)),
                "unpatch": _row(_times(lambda: runtime.swap(None), lambda: runtime.swap(first), repeats)),
                "one token decoded (the canary's share)": _row(_times(lambda: runtime.logits_of_last(token), runtime.reset, repeats)),
            },
        }  # fmt: skip


def _fresh(runtime: LlamaCppRuntime, patch: Patch, repeats: int, confirmed: bool) -> list[float]:
    """Patches that are not in memory; where not ``confirmed``, each is compared with what the model makes of its soft prompt."""
    waiting: list[Patch] = []

    def prepare() -> None:
        made = replace(patch, name=f"fresh-{time.time_ns()}")
        if confirmed:
            runtime.swap(made)
            runtime.forget_states()
        runtime.swap(patch)
        waiting.append(made)

    return _times(lambda: runtime.swap(waiting.pop()), prepare, repeats)


def main() -> None:
    """The entry point of ``make swap``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path("out/shapes"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/swap.json"))
    arguments = parser.parse_args()
    document = measure(arguments.shape, arguments.type, arguments.threads, arguments.repeats, arguments.folder)
    write_atomically(arguments.out, (json.dumps(document, indent=1) + "\n").encode())
    for name, row in document["rows"].items():
        print(f"{name:<50} median {row['median_ms']:7.1f} ms, {row['min_ms']:.1f} to {row['max_ms']:.1f}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
