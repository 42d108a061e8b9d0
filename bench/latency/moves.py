"""What a seed that goes along with the text costs on a model of a real size: ``edgepatch bench moves``.

The arms take turns within each round, and ratios are taken within the round. Beside the time on the clock stands the time that the
process has computed: on a machine that others use, only the latter can be compared. One thread, then: llama.cpp's threads compute
while they wait for each other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgepatch.bench.environment import environment
from edgepatch.bench.latency.random_patches import make_patch, random_tokens
from edgepatch.bench.shapes.gguf import write_gguf
from edgepatch.bench.shapes.shape import SHAPES
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import Patch
from edgepatch.progress import Progress, silent
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import ModelSpec

NUM_VIRTUAL_TOKENS = 50
BLOCKS = (64, 128, 256)
PIECES = (64, 128, 256, 512)
"""Tokens that one call evaluates, without any patch: anchors divide a prompt, and smaller calls may compute more slowly."""

NUM_MOVES = 30


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        prompt: tokens of a prefill.
        decoded: tokens that are generated behind it.
        rounds: that count; one more comes first.
    """

    prompt: int = 2048
    decoded: int = 128
    rounds: int = 5


class Spent(NamedTuple):
    """Milliseconds on the clock, and computed by this process."""

    wall_ms: float
    cpu_ms: float


def spent(act: Callable[[], object]) -> Spent:
    """What a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return Spent((time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000)


def plain_rotation(spec: ModelSpec) -> Rotation:
    """Of a random llama: all dimensions of a head turn, by powers of its base."""
    table = tuple(float(spec.rope_theta ** (-2 * i / spec.head_dim)) for i in range(spec.head_dim // 2))
    return Rotation((table,), (0,) * spec.num_hidden_layers)


def _arms(pinned: Patch, rotation: Rotation) -> dict[str, Patch | None]:
    moving = {f"moving {w}": replace(pinned, rotation=rotation, anchoring=Anchoring(w)) for w in BLOCKS}
    return {"bare": None, "pinned": pinned, **moving}


def measure(path: Path, sizes: Sizes, num_threads: int = 1, progress: Progress = silent) -> dict[str, Any]:
    """``cells`` of the arms and ``pieces`` of the bare model.

    Args:
        path: a GGUF file of the llama family without stretched frequencies.
        sizes: of what is measured.
        num_threads: of a forward pass.
        progress: told of every round.
    """
    positions = NUM_VIRTUAL_TOKENS + sizes.prompt + sizes.decoded
    with load_runtime(path, None, num_threads=num_threads, context_length=positions) as session:
        backend = session.backend
        assert isinstance(backend, LlamaCppRuntime)
        pinned = replace(make_patch(session, NUM_VIRTUAL_TOKENS), canary=None)
        arms = _arms(pinned, plain_rotation(session.spec))
        rounds: list[dict[str, dict[str, Spent]]] = []
        for number in range(sizes.rounds + 1):
            progress("rounds", number, sizes.rounds + 1)
            names = [*list(arms)[number % len(arms) :], *list(arms)[: number % len(arms)]]
            rounds.append({name: _arm(session, arms[name], sizes) for name in names})
            session.swap(None)
            rounds[-1] |= {str(size): {"prefill": _in_pieces(backend, session, size, sizes)} for size in PIECES}
        progress("rounds", sizes.rounds + 1, sizes.rounds + 1)
        moves = {name: _moves(session, patch) for name, patch in arms.items() if patch and patch.anchoring}
    counted = rounds[1:]
    cells = [_cell(name, counted, sizes) | moves.get(name, {}) for name in arms]
    pieces = [_piece(size, counted) for size in PIECES]
    return {"cells": cells, "pieces": pieces}


def _arm(session: Session, patch: Patch | None, sizes: Sizes) -> dict[str, Spent]:
    """A prompt, and tokens one by one behind it."""
    session.swap(patch)
    tokens = random_tokens(session.spec.vocab_size, sizes.prompt + sizes.decoded)
    prefill = spent(lambda: session.logits_of_last(tokens[: sizes.prompt]))

    def decode() -> None:
        for end in range(sizes.prompt + 1, len(tokens) + 1):
            session.logits_of_last(tokens[:end])

    return {"prefill": prefill, "decode": spent(decode)}


def _in_pieces(backend: LlamaCppRuntime, session: Session, size: int, sizes: Sizes) -> Spent:
    tokens = random_tokens(session.spec.vocab_size, sizes.prompt)
    session.reset()
    return spent(lambda: [backend.forward(0, tokens[i : i + size], False) for i in range(0, len(tokens), size)])


def _moves(session: Session, patch: Patch) -> dict[str, float]:
    """Median milliseconds of a move to a place where no seed has stood yet, and to one where it has."""
    session.swap(patch)
    session.logits_of_last(random_tokens(session.spec.vocab_size, NUM_MOVES + 1))
    place = session.backend.place_seed
    fresh = [spent(lambda anchor=anchor: place([0], [anchor])) for anchor in range(1, NUM_MOVES + 1)]  # type: ignore[misc]
    repeats = [spent(lambda i=i: place([0], [NUM_MOVES - i % 2])) for i in range(1, NUM_MOVES + 1)]  # type: ignore[misc]
    session.reset()
    return {
        "move_ms": round(float(np.median([each.wall_ms for each in fresh])), 3),
        "move_cpu_ms": round(float(np.median([each.cpu_ms for each in fresh])), 3),
        "move_again_cpu_ms": round(float(np.median([each.cpu_ms for each in repeats])), 3),
    }


def _cell(name: str, rounds: Sequence[Mapping[str, Mapping[str, Spent]]], sizes: Sizes) -> dict[str, Any]:
    """An arm: medians over the rounds; ratios to the bare model's of the same round, above 1 where it is slower."""
    arm, _, block = name.partition(" ")
    cell: dict[str, Any] = {"arm": arm, "block": int(block) if block else None}
    for kind in ("prefill", "decode"):
        own, bare = ([each[which][kind] for each in rounds] for which in (name, "bare"))
        cell[f"{kind}_ms"] = _median([each.wall_ms for each in own])
        cell[f"{kind}_cpu_ms"] = _median([each.cpu_ms for each in own])
        ratios = [one.cpu_ms / other.cpu_ms for one, other in zip(own, bare, strict=True)]
        cell[f"{kind}_cpu_ratio"] = round(float(np.median(ratios)), 4)
        cell[f"{kind}_cpu_ratios"] = [round(ratio, 4) for ratio in ratios]
    cell["decode_tokens_s"] = round(sizes.decoded / (cell["decode_ms"] / 1000), 3)
    cell["decode_tokens_cpu_s"] = round(sizes.decoded / (cell["decode_cpu_ms"] / 1000), 3)
    return cell


def _piece(size: int, rounds: Sequence[Mapping[str, Mapping[str, Spent]]]) -> dict[str, Any]:
    own, whole = ([each[str(which)]["prefill"] for each in rounds] for which in (size, PIECES[-1]))
    ratios = [one.cpu_ms / other.cpu_ms for one, other in zip(own, whole, strict=True)]
    return {
        "tokens": size,
        "prefill_ms": _median([each.wall_ms for each in own]),
        "prefill_cpu_ms": _median([each.cpu_ms for each in own]),
        "cpu_ratio": round(float(np.median(ratios)), 4),
    }


def _median(milliseconds: Sequence[float]) -> float:
    return round(float(np.median(milliseconds)), 2)


def has_amx() -> bool:
    """Whether the processor has Intel's matrix instructions, which llama.cpp's larger batches use."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and " amx_int8" in info.read_text(encoding="utf-8")


def run(
    shape: str, kind: str, num_threads: int, sizes: Sizes, folder: Path, out: Path, progress: Progress = silent
) -> dict[str, Any]:
    """Measures and writes the document that it returns.

    Args:
        shape, kind: of the random model, one of ``SHAPES`` and a type of ``write_gguf``.
        num_threads: of a forward pass.
        sizes: of what is measured.
        folder: random models are kept here.
        out: the JSON file.
        progress: told of every round.

    Raises:
        InputError: the shape is not known.
    """
    if shape not in SHAPES:
        raise InputError(f"shape: expected one of {', '.join(SHAPES)}, found {shape}")
    path = folder / f"{shape}-{kind}.gguf"
    if not path.is_file():
        write_gguf(path, SHAPES[shape], kind)
    loads = [os.getloadavg()[0]]
    figures = measure(path, sizes, num_threads, progress)
    loads.append(os.getloadavg()[0])
    document = {
        "command": "edgepatch bench moves",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment() | {"amx": has_amx()},
        "load_average": [round(load, 2) for load in loads],
        "model": f"{shape} {kind}",
        "num_threads": num_threads,
        "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
        "prompt_tokens": sizes.prompt,
        "decoded_tokens": sizes.decoded,
        "rounds": sizes.rounds,
        **figures,
    }
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    return document
