"""What handling a patch costs: seed load, swap, unpatch, apply and verify on a store, ten turns, several sequences, a guard model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgepatch.bench.latency.arms import GREEDY
from edgepatch.bench.latency.random_patches import random_tokens
from edgepatch.bench.latency.timing import Cell, Measure
from edgepatch.errors import EdgepatchError
from edgepatch.patch.file import Patch, read_patch, write_patch
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances

TURN_PROMPT, TURN_REPLY = 24, 16
GUARD_TEMPLATE, GUARD_REPLY, GUARD_ANSWER = 200, 128, 4
"""Tokens of a guard's instructions with the conversation, of the reply that it judges, and of its verdict (Llama Guard's "unsafe S1")."""


def exchange_cells(runtime: Session, patch: Patch, detach: Callable[[], None]) -> list[Cell]:
    """Swap to another patch, take one off, and load the seed alone, of a runtime that holds both patches' states."""
    other = replace(patch, name="other")
    fresh = (replace(patch, name=f"fresh-{i}") for i in itertools.count())

    def start() -> None:
        detach()
        runtime.swap(other)
        runtime.swap(patch)

    exchanges = [
        Cell(Measure("swap"), "seed", lambda: runtime.swap(other), start),
        Cell(Measure("swap, new to this device"), "seed", lambda: runtime.swap(next(fresh)), start),
        Cell(Measure("unpatch"), "seed", lambda: runtime.swap(None), start),
    ]
    backend = runtime.backend
    load = backend.restore_seed if isinstance(backend, LlamaCppRuntime) else partial(backend.install, patch)
    return [*exchanges, Cell(Measure("seed load"), "seed", load, start)]


class StoreCosts:
    """Apply and verify on a device's store.

    Args:
        patch: what is applied.
        folder: for a store and the patch's file.
    """

    def __init__(self, patch: Patch, folder: Path) -> None:
        self.file = folder / "patch.safetensors"
        write_patch(patch, self.file)
        self._patch, self._folder, self._count = patch, folder, 0
        self._store = Store(folder / "store")

    def cells(self) -> list[Cell]:
        """Timed with the file as a vendor ships it."""
        return [
            Cell(Measure("apply"), "seed", self._apply, self._new_store),
            Cell(Measure("verify"), "seed", self._verify, self._applied),
            Cell(Measure("read patch file"), "seed", lambda: read_patch(self.file)),
        ]

    def _new_store(self) -> None:
        self._count += 1
        self._store = Store(self._folder / f"store-{self._count}")

    def _apply(self) -> None:
        allowances = Allowances(unsigned="measured by the bench")
        self._store.apply(self.file, allowances, model=self._patch.base, channel=self._patch.channel)

    def _applied(self) -> None:
        self._new_store()
        self._apply()

    def _verify(self) -> None:
        if not self._store.active(self._patch.base):
            raise EdgepatchError("the store has no active patch")


def conversation_cells(
    runtime: Session, arms: dict[str, tuple[Patch | None, Sequence[int]]], turns: int, detach: Callable[[], None]
) -> list[Cell]:
    """A conversation of so many turns, each a short question and a short reply.

    Args:
        runtime: loaded.
        arms: name -> patch and the system text in front of the conversation.
        turns: of the conversation.
        detach: takes adapters off.
    """
    measure = Measure(f"{turns} turns", n_prompt=turns * TURN_PROMPT, n_gen=turns * TURN_REPLY)

    def start(patch: Patch | None) -> None:
        detach()
        runtime.swap(patch)

    def talk(system: Sequence[int]) -> None:
        tokens = list(system)
        for turn in range(turns):
            tokens += random_tokens(runtime.spec.vocab_size, TURN_PROMPT, rng_seed=turn)
            sampling = replace(GREEDY, max_new_tokens=TURN_REPLY)
            tokens += [piece.token_id for piece in runtime.stream(tokens, sampling)]

    return [Cell(measure, name, partial(talk, system), partial(start, patch)) for name, (patch, system) in arms.items()]


def guard_cells(runtime: Session, detach: Callable[[], None], shrink: int = 1) -> list[Cell]:
    """A guard model's pass over a reply: its prompt evaluated afresh and a verdict; for a guard of the loaded model's own size.

    Args:
        runtime: loaded.
        detach: takes adapters off.
        shrink: divides the lengths, for contexts of a test's size.
    """
    length, answer = (GUARD_TEMPLATE + GUARD_REPLY) // shrink, GUARD_ANSWER

    def start() -> None:
        detach()
        runtime.swap(None)

    def judge() -> None:
        for _ in runtime.stream(random_tokens(runtime.spec.vocab_size, length), replace(GREEDY, max_new_tokens=answer)):
            pass

    return [Cell(Measure("guard pass", n_prompt=length, n_gen=answer), "guard model", judge, start)]


def concurrent_cells(runtime: Session, patch: Patch, counts: Sequence[int], prompt: int, length: int) -> list[Cell]:
    """So many conversations at once behind one seed, and behind none.

    Args:
        runtime: with as many sequences as the largest count.
        patch: the seed's.
        counts: of sequences.
        prompt: tokens of each prompt.
        length: tokens of each reply.
    """
    sampling = replace(GREEDY, max_new_tokens=length)

    def run(count: int) -> None:
        prompts = [random_tokens(runtime.spec.vocab_size, prompt, rng_seed=i) for i in range(count)]
        runtime.generate_batch(prompts, sampling)

    return [
        Cell(
            Measure(f"{count} sequences", n_prompt=count * prompt, n_gen=count * length),
            name,
            partial(run, count),
            partial(runtime.swap, active),
        )
        for count in counts
        for name, active in (("bare", None), ("seed", patch))
    ]


def seed_bytes(runtime: Session, patch: Patch) -> dict[str, Any]:
    """What the seed takes in memory while all sequences stand behind it.

    llama.cpp counts itself: the state of all its sequences holds each cell once, so it shows whether they share the seed's.
    """
    runtime.swap(patch)
    backend = runtime.backend
    if isinstance(backend, LlamaCppRuntime):
        one, whole = len(backend.seed_state()), backend.context.num_state_bytes
        return {
            "bytes_of_one": one,
            "bytes_in_all": whole,
            "num_sequences": runtime.num_sequences,
            "is_shared": whole < 1.5 * one,
        }
    assert patch.kv_seed is not None
    item = 2 if runtime.kv_type == "f16" else 4
    one = sum(tensor.size for tensor in (*patch.kv_seed.keys, *patch.kv_seed.values)) * item
    return {
        "bytes_of_one": one,
        "bytes_in_all": one * runtime.num_sequences,
        "num_sequences": runtime.num_sequences,
        "is_shared": False,
    }
