"""Whatever is done in a conversation, every reply comes from the patched model: 10,000 generated conversations, of which each run takes a share.

After each conversation the logits of its whole text are compared with those of a second runtime that evaluates the text afresh,
and, for a sample, the first P cells of its sequence with the seed, byte for byte. The second runtime itself is checked against
the bare model: had both lost the seed, they would agree with that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepatch.converters.gguf import specs
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.patch.file import Patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import KVSeed, SoftPrompt
from kit import tiny_gguf
from kit.amounts import examples

SEQUENCES = 3
SHARE = examples(1, 10) / 10
"""Of the 10,000 conversations; all of them are held by ``edgepatch bench security --only F7``."""

MOVING = Anchoring(12, (7, 70, 77, 170, 177))
"""Contexts are of 52 tokens, so texts are of up to four blocks, and in a text of that length a token in fifty opens a turn."""

# (model, cache, flash attention, where the seed stands, conversations): 10,000 in all.
RUNS = [
    ("llama", "f16", True, None, 1000),
    ("llama", "f16", True, MOVING, 2000),
    ("llama", "f32", False, MOVING, 1000),
    ("llama", "q8_0", True, MOVING, 1000),
    ("llama", "q4_0", True, MOVING, 1000),
    ("gemma3", "f16", True, None, 1500),
    ("gemma3", "f32", False, None, 500),
    ("lfm2", "f16", True, None, 1500),
    ("lfm2", "f32", False, None, 500),
]
TOLERANCE = 0.05
"""Of the patch's own effect. Evaluating in other portions rounds differently; a lost seed is at 1."""


def test_the_runs_add_up():
    assert sum(count for *_, count in RUNS) == 10_000


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "gemma3", "lfm2"):
        getattr(tiny_gguf, f"write_{name}")(folder / f"{name}.gguf")
    return folder


def soft_patch(path: Path, num_virtual_tokens: int, rng_seed: int) -> Patch:
    spec = specs.read_spec(path)
    rng = np.random.default_rng(rng_seed)
    scale = 0.1 * np.sqrt(spec.hidden_size) if spec.model_type == "gemma3" else 1.0
    embeddings = (rng.standard_normal((num_virtual_tokens, spec.hidden_size)) * scale).astype(np.float32)
    return Patch(f"random-{rng_seed}", "1.0.0", spec, SoftPrompt(embeddings))


def moving_patch(path: Path, num_virtual_tokens: int, rng_seed: int) -> Patch:
    """Random keys and values, which turn as the tiny models' heads do."""
    spec, rng = specs.read_spec(path), np.random.default_rng(rng_seed)
    shape = (spec.num_key_value_heads, num_virtual_tokens, spec.head_dim)
    keys, values = (
        tuple(rng.standard_normal(shape).astype(np.float16) for _ in range(spec.num_hidden_layers)) for _ in range(2)
    )
    table = tuple(float(spec.rope_theta ** (-2 * i / spec.head_dim)) for i in range(spec.head_dim // 2))
    rotation = Rotation((table,), (0,) * spec.num_hidden_layers)
    seed = KVSeed(keys, values)
    return Patch(f"moving-{rng_seed}", "1.0.0", spec, None, seed, rotation=rotation, anchoring=MOVING)


class Caller:
    """Does to a runtime what clients do, and keeps the text that each conversation should have."""

    def __init__(self, runtime: Session, patches: list[Patch], rng_seed: int) -> None:
        self.runtime, self.patches = runtime, patches
        self.rng = random.Random(rng_seed)
        self.texts: list[list[int]] = [[] for _ in range(SEQUENCES)]
        self.acts = [
            self.turn,
            self.edit,
            self.branch,
            self.restart,
            self.reply,
            self.cancel,
            self.interleave,
            self.overfill,
        ]
        self.weights = [8, 5, 3, 2, 4, 2, 2, 1]

    def some(self, most: int = 6) -> list[int]:
        return [self.rng.randrange(256) for _ in range(self.rng.randint(1, most))]

    def converse(self) -> int:
        """One conversation of a few acts; the sequence it was held in."""
        sequence = self.rng.randrange(SEQUENCES)
        for act in self.rng.choices(self.acts, self.weights, k=self.rng.randint(1, 4)):
            act(sequence)
        if self.rng.random() < 0.005:
            self.fill_to_the_brim(sequence)
        if self.rng.random() < 0.01:
            self.exchange_patches()
        if not self.texts[sequence]:
            self.turn(sequence)
        return sequence

    def _evaluate(self, sequence: int, text: list[int]) -> None:
        self.texts[sequence] = text[: self.runtime.context_length]
        self.runtime.logits_of_last(self.texts[sequence], sequence=sequence)

    def turn(self, sequence: int) -> None:
        self._evaluate(sequence, self.texts[sequence] + self.some())

    def edit(self, sequence: int) -> None:
        kept = self.rng.randint(0, len(self.texts[sequence]))
        self._evaluate(sequence, self.texts[sequence][:kept] + self.some())

    def branch(self, sequence: int) -> None:
        other = self.texts[self.rng.randrange(SEQUENCES)]
        self._evaluate(sequence, other[: self.rng.randint(0, len(other))] + self.some())

    def restart(self, sequence: int) -> None:
        self._evaluate(sequence, self.some())

    def reply(self, sequence: int) -> None:
        self.turn(sequence)
        text = self.texts[sequence]
        sampling = Sampling(
            max_new_tokens=self.rng.randint(1, 4), rng_seed=self.rng.randrange(1000), ignore_end_tokens=True
        )
        ids = [piece.token_id for piece in self.runtime.stream(text, sampling, sequence=sequence)]
        self.texts[sequence] = (text + ids)[: self.runtime.context_length]

    def cancel(self, sequence: int) -> None:
        self.turn(sequence)
        stream = self.runtime.stream(
            self.texts[sequence], Sampling(rng_seed=1, ignore_end_tokens=True), sequence=sequence
        )
        for _ in range(self.rng.randint(0, 2)):
            next(stream, None)
        stream.close()

    def interleave(self, _: int) -> None:
        sampling = Sampling(max_new_tokens=2, rng_seed=1, ignore_end_tokens=True)
        prompts = [self.some(3) for _ in range(SEQUENCES)]
        streams = [self.runtime.stream(prompt, sampling, sequence=i) for i, prompt in enumerate(prompts)]
        for _ in range(2):
            for i, stream in enumerate(streams):
                if (piece := next(stream, None)) is not None:
                    prompts[i].append(piece.token_id)
        self.texts = prompts

    def overfill(self, sequence: int) -> None:
        with pytest.raises(InputError, match="context holds"):
            self.runtime.logits_of_last(
                [7] * (self.runtime.context_length + 1 + self.rng.randrange(500)), sequence=sequence
            )

    def fill_to_the_brim(self, sequence: int) -> None:
        length = self.runtime.context_length
        text = [self.rng.randrange(256) for _ in range(length - 3)]
        pieces = list(
            self.runtime.stream(
                text, Sampling(max_new_tokens=50, rng_seed=1, ignore_end_tokens=True), sequence=sequence
            )
        )
        assert pieces[-1].finish_reason == "length" and len(pieces) == 4
        self.texts[sequence] = (text + [piece.token_id for piece in pieces])[:length]

    def exchange_patches(self) -> None:
        for patch in (None, self.patches[1], self.patches[0]):
            self.runtime.swap(patch)
            self.runtime.logits_of_last(self.some(), sequence=self.rng.randrange(SEQUENCES))
        self.texts = [[] for _ in range(SEQUENCES)]


def first_cells(runtime: Session, sequence: int) -> list[bytes]:
    """Keys of the patch's positions, as far as the sequence's state shows them."""
    keys = []
    for cache in read_state(runtime.backend.context.state(sequence)).caches:
        cells = {position: i for i, position in enumerate(cache.positions)}
        for layer in cache.keys:
            rows = [
                layer.rows[cells[p] * layer.row_bytes : (cells[p] + 1) * layer.row_bytes]
                for p in range(12)
                if p in cells
            ]
            keys.append(b"".join(rows))
    return keys


def evaluated(runtime: Session, text: list[int]) -> Iterator[NDArray[np.float32]]:
    """Logits behind the text, evaluated at once, and then token by token, as replies are.

    A number that lies between two steps of a 4-bit cache is rounded up in one way and down in the other: of 1,000 conversations one
    is 0.064 of the effect away from the first, and 7e-7 from the second. A lost seed is far from both.
    """
    runtime.reset()
    yield runtime.logits_of_last(text)
    runtime.reset()
    *_, last = (runtime.logits_of_last(text[:end]) for end in range(1, len(text) + 1))
    yield last


@pytest.mark.parametrize(("name", "kv_type", "flash_attention", "anchoring", "count"), RUNS)
def test_no_conversation_loses_the_seed(models, name, kv_type, flash_attention, anchoring, count):
    path = models / f"{name}.gguf"
    make = moving_patch if anchoring else soft_patch
    patches = [make(path, 12, 1), make(path, 7, 2)]
    options = {"kv_type": kv_type, "flash_attention": flash_attention, "num_threads": 1, "context_length": 64}
    lost = 0
    with (
        load_runtime(path, patches[0], num_sequences=SEQUENCES, **options) as runtime,
        load_runtime(path, patches[0], **options) as afresh,
        load_runtime(path, None, **options) as bare,
    ):
        caller = Caller(runtime, patches, count)
        for number in range(round(SHARE * count)):
            sequence = caller.converse()
            text = caller.texts[sequence]
            logits = runtime.logits_of_last(text, sequence=sequence)
            bare.reset()
            without = bare.logits_of_last(text)
            lost += not any(
                np.linalg.norm(logits - expected) <= TOLERANCE * np.linalg.norm(without - expected)
                for expected in evaluated(afresh, text)
            )
            if number % 50 == 0 and name == "llama" and anchoring is None:
                assert first_cells(runtime, sequence) == first_cells(afresh, 0)
    assert lost == 0, f"{lost} of {count}"


def test_the_check_sees_a_lost_seed(models):
    """The comparison above must be able to fail."""
    path = models / "llama.gguf"
    patches = [soft_patch(path, 12, 1), soft_patch(path, 7, 2)]
    with load_runtime(path, patches[0], num_threads=1) as right, load_runtime(path, None, num_threads=1) as bare:
        expected, effect = (r.logits_of_last([1, 2, 3]) for r in (right, bare))
        limit = TOLERANCE * np.linalg.norm(effect - expected)
        for wrong in (
            patches[1],
            replace(patches[0], soft_prompt=SoftPrompt(patches[0].soft_prompt.embeddings[::-1].copy())),
        ):
            right.swap(wrong)
            assert np.linalg.norm(right.logits_of_last([1, 2, 3]) - expected) > limit
