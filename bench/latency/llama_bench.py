"""llama.cpp's own ``llama-bench`` as an arm: run where it is built, and said to be missing where it is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepatch.bench.latency.timing import missing
from edgepatch.processes.programs import run_program

if TYPE_CHECKING:
    from edgepatch.bench.latency.settings import Settings

NAME = "llama-bench"
BEHIND = "prompt behind positions"
VARIABLE = "EDGEPATCH_LLAMA_BENCH"
BUILT = Path("out/llama-server/build/bin/llama-bench")
TIMEOUT_S = 3600


def find_llama_bench(which: Callable[[str], str | None]) -> str | None:
    """The program: what ``EDGEPATCH_LLAMA_BENCH`` names, the one beside the llama-server that we build, or one on the path."""
    named = os.environ.get(VARIABLE)
    if named:
        return named
    return str(BUILT) if BUILT.is_file() else which(NAME)


def run_llama_bench(
    model: Path, settings: Settings, common: Mapping[str, Any], which: Callable[[str], str | None]
) -> list[dict[str, Any]]:
    """Its rows, or one that says why there are none. It runs after the arms, not in turn with them."""
    program = find_llama_bench(which)
    if program is None:
        hint = f"build it beside llama-server (ninja -C {BUILT.parent.parent} {NAME}), or name it in {VARIABLE}"
        return [missing("decode", NAME, "not installed", hint, common)]
    sizes, held = settings.sizes, settings.sizes.num_virtual_tokens
    shared = [
        program,
        "-m",
        str(model),
        "-t",
        str(settings.num_threads),
        "-r",
        str(settings.repeats),
        "-b",
        "512",
        "-ub",
        "512",
        "-ngl",
        "99" if settings.device == "cuda" else "0",
        "-o",
        "json",
    ]
    prompts, new, depths = (("-p", _listed(sizes.prompts)), ("-n", str(sizes.num_new)), ("-d", _listed(sizes.depths)))
    # Prompts alone; decoding at each depth; and what as many positions as one or four patches hold cost the shortest prompt.
    attention = ("-fa", str(int(settings.flash_attention)))
    runs: dict[str, tuple[str, ...]] = {
        "prompt": (*prompts, "-n", "0", *attention),
        "decode": ("-p", "0", *new, *depths, *attention),
        BEHIND: ("-p", str(sizes.prompts[0]), "-n", "0", "-d", _listed((0, held, 4 * held)), "-fa", "0,1"),
    }
    rows = []
    for measure, arguments in runs.items():
        done = run_program([*shared, *arguments], deadline_s=TIMEOUT_S)
        try:
            rows += [_row(measure, entry, common) for entry in json.loads(done.output)]
        except ValueError as error:
            rows.append(missing(measure, NAME, "failed", (done.failure or f"{error}")[:300], common))
    return rows


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _row(measure: str, entry: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of its JSON, with medians in our columns beside its own."""
    samples = sorted(sample / 1e6 for sample in entry["samples_ns"])
    median = (
        samples[len(samples) // 2]
        if len(samples) % 2
        else sum(samples[len(samples) // 2 - 1 : len(samples) // 2 + 1]) / 2
    )
    times = {
        "repeats": len(samples),
        "median_ms": round(median, 4),
        "min_ms": round(samples[0], 4),
        "max_ms": round(samples[-1], 4),
        "spread": round((samples[-1] - samples[0]) / median, 4),
        "samples_ms": [round(sample, 4) for sample in samples],
    }
    own = {name: value for name, value in entry.items() if name not in ("samples_ns", "samples_ts")}
    return {
        **common,
        **own,
        "arm": NAME,
        "measure": measure,
        "status": "ok",
        "median_ts": round((entry["n_gen"] or entry["n_prompt"]) / median * 1000, 3),
        **times,
        "model_filename": common["model_filename"],
        "quantization": common["quantization"],
    }
