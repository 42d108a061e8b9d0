"""How the keys of a GGUF model turn with their position, read from what llama.cpp caches: for patches that do not say it."""

from __future__ import annotations

from math import pi

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.llamacpp.layout import Layout
from edgepatch.converters.llamacpp.moving import read_seed
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.errors import InputError
from edgepatch.runtimes.llamacpp.context import LlamaContext
from edgepatch.seeds.rotation import LARGEST_FREQUENCY, Rotation, halves
from edgepatch.tensors import ModelSpec

NUM_TOKENS = 4
PLACES = (1, 16, 256)
"""Distances at which the angle of each pair is read: the first tells the frequency roughly, each further one 16 times as exactly."""

PROOF_PLACE = 97
TOLERANCE = 1e-4
"""Largest relative error of a turned key against one that the model computes there; a float32 cache gives 1e-6."""

SAME_FREQUENCY = 1e-5
"""Up to which two layers turn alike, in radians a position."""


def read_rotation(context: LlamaContext, layout: Layout, spec: ModelSpec, num_rotated: int) -> Rotation:
    """How the model's keys turn, layer by layer: the same tokens are evaluated at several places.

    Args:
        context: with a float32 cache, without flash attention; what it held is lost.
        layout: of that cache.
        spec: of the model.
        num_rotated: R, dimensions of a head that turn.

    Raises:
        InputError: keys of this model cannot be turned.
    """
    neighbours = context.model.turns_neighbours() and not layout.rotates_neighbours
    count = num_rotated // 2
    near, proof = _keys_at(context, layout, spec, 0), _keys_at(context, layout, spec, PROOF_PLACE)
    far = [_keys_at(context, layout, spec, place) for place in PLACES]
    tables: list[tuple[float, ...]] = []
    layers: list[int | None] = []
    for layer, keys in enumerate(near):
        table = _frequencies(keys, [keys_at[layer] for keys_at in far], count, neighbours)
        layers.append(_number_of(table, tables))
    rotation = Rotation(tuple(tables), tuple(layers), neighbours and bool(tables))
    for layer, (keys, expected) in enumerate(zip(near, proof, strict=True)):
        error = np.linalg.norm(rotation.turned(keys, layer, PROOF_PLACE) - expected) / np.linalg.norm(expected)
        if not error <= TOLERANCE:
            raise InputError(
                f"{spec.model_type}: layer {layer}: keys of one place do not turn into those of another",
                hint="positions are not rotary here: use `edgepatch serve`",
            )
    return rotation


def _keys_at(context: LlamaContext, layout: Layout, spec: ModelSpec, place: int) -> list[NDArray[np.float32]]:
    """L keys (K, T, H) of the same tokens at position ``place``: each alone, so that rounding is the same wherever it stands."""
    seeds = []
    for i in range(1, NUM_TOKENS + 1):
        context.clear()
        context.evaluate(0, [(i * spec.vocab_size) // (NUM_TOKENS + 1)], first=place)
        seeds.append(read_seed(read_state(context.state(0)), layout, spec.num_key_value_heads, spec.head_dim))
    return [np.concatenate(keys, axis=1) for keys in zip(*(seed.keys for seed in seeds), strict=True)]


def _frequencies(
    near: NDArray[np.float32], far: list[NDArray[np.float32]], count: int, neighbours: bool
) -> NDArray[np.float64]:
    """(R/2,) radians a position by which the pairs of a layer's keys turn."""
    start = _pairs(near, count, neighbours)
    frequencies = np.zeros(count)
    for place, keys in zip(PLACES, far, strict=True):
        angles = np.angle((_pairs(keys, count, neighbours) * start.conj()).sum(axis=(0, 1)))
        turns = np.round((frequencies * place - angles) / (2 * pi))
        frequencies = (angles + 2 * pi * turns) / place
    return np.clip(frequencies, 0, LARGEST_FREQUENCY)  # a pair that stands still is measured at about zero


def _pairs(keys: NDArray[np.float32], count: int, neighbours: bool) -> NDArray[np.complex128]:
    """(K, T, R/2) dimensions that turn together, as complex numbers."""
    first, second = halves(count, neighbours)
    pairs: NDArray[np.complex128] = keys[..., first].astype(np.float64) + 1j * keys[..., second]
    return pairs


def _number_of(table: NDArray[np.float64], tables: list[tuple[float, ...]]) -> int | None:
    """Of a layer's table among those known, to which a new one is added; ``None`` where nothing turns."""
    if table.max() < SAME_FREQUENCY:
        return None
    for number, known in enumerate(tables):
        if np.abs(table - known).max() < SAME_FREQUENCY:
            return number
    tables.append(tuple(float(f"{f:.8g}") for f in table))
    return len(tables) - 1
