"""The state of a seed at any place of a text, in llama.cpp's own bytes.

llama.cpp can shift cells by itself, but it shifts them for every sequence that shares them, rounds quantized keys anew, and corrupts
keys under YaRN. A seed's keys are known in full precision, so the state is written anew: the values and the structure stay, the
keys are turned. A cell's position is moved along: it decides which layers with a sliding window see the cell, while what a key
says of its place is in the key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.llamacpp import rows
from edgepatch.converters.llamacpp.layout import Layout, cells_of, decode_rows, hadamard, seeded_state
from edgepatch.converters.llamacpp.state import CacheState, KeyFields, SequenceState, key_fields
from edgepatch.converters.rope import deinterleave, interleave
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import KVSeed

MAX_KEPT_PLACES = 4
"""States of one seed at different places that stay in memory: conversations of one server pass the same ones."""


@dataclass(frozen=True)
class _Keys:
    """Keys that turn alike, of some layers of one cache.

    Attributes:
        layer: one of them, in the model.
        keys: (n, P, K, H) float32, in llama.cpp's order.
        ggml_type: of the cache.
        fields: of each of the n layers in the state.
    """

    layer: int
    keys: NDArray[np.float32]
    ggml_type: int
    fields: tuple[slice, ...]


class MovableState:
    """A seed whose state can be had at any anchor.

    What does not change is laid out once; a move turns the keys of all layers at once and puts them into a copy. Copies are kept and used
    again: fresh memory costs a move more than all of its arithmetic.

    Args:
        probe: read from the running library.
        layout: measured on the same model with the same cache.
        seed: canonical, at positions 0..P-1.
        rotation: of the model's keys.
        window: of the layers in the second cache, which keeps only what the next token can see; 0 for none.

    Raises:
        InputError: a value is, or may become, beyond the cache's type.
        InactivePatchError: the seed does not fit the cache.
    """

    def __init__(self, probe: SequenceState, layout: Layout, seed: KVSeed, rotation: Rotation, window: int = 0) -> None:
        self._layout, self._rotation = layout, rotation
        self._neighbours = layout.rotates_neighbours or rotation.neighbours
        count = seed.num_virtual_tokens
        self._fields = key_fields(probe, [len(cells) for cells in cells_of(probe, count, window)])
        self._at_start = np.frombuffer(seeded_state(probe, layout, seed, window), np.uint8)
        self._kept: OrderedDict[int, NDArray[np.uint8]] = (
            OrderedDict()
        )  # by anchor, the one that was longest unused first
        self._keys = [
            keys
            for cache, layers, cells, fields in zip(
                probe.caches, layout.layers, cells_of(probe, count, window), self._fields, strict=True
            )
            for keys in self._grouped(cache, layers, [seed.keys[i][:, cells] for i in layers], fields)
        ]

    def _grouped(
        self, cache: CacheState, layers: Sequence[int], keys: Sequence[NDArray[Any]], fields: KeyFields
    ) -> Iterator[_Keys]:
        """A cache's layers by table of frequencies and type; a layer without positions stays as it is."""
        groups: dict[tuple[int, int], list[int]] = {}
        for slot, (layer, stored) in enumerate(zip(layers, cache.keys, strict=True)):
            table = self._rotation.layers[layer]
            if table is not None:
                groups.setdefault((table, stored.ggml_type), []).append(slot)
        for (_, ggml_type), slots in groups.items():
            heads = np.stack([keys[slot] for slot in slots]).astype(np.float32).swapaxes(1, 2)
            if ggml_type == rows.FLOAT16 and np.linalg.norm(heads, axis=-1).max() > np.finfo(np.float16).max:
                raise InputError(
                    "the KV seed has values that are beyond float16 at some places",
                    hint="load the model with kv_type f32",
                )
            ordered = interleave(heads) if self._layout.rotates_neighbours else heads
            laid_out = np.ascontiguousarray(ordered)
            yield _Keys(layers[slots[0]], laid_out, ggml_type, tuple(fields.layers[slot] for slot in slots))

    def at(self, anchor: int) -> NDArray[np.uint8]:
        """The state of the seed directly in front of text position ``anchor``; its P positions overlap those of the text.

        It holds until ``MAX_KEPT_PLACES`` other anchors were asked for; then its memory is used again.
        """
        if anchor not in self._kept:
            self._kept[anchor] = self._written(anchor)
        self._kept.move_to_end(anchor)
        return self._kept[anchor]

    def _written(self, anchor: int) -> NDArray[np.uint8]:
        state: NDArray[np.uint8]
        if len(self._kept) < MAX_KEPT_PLACES:
            place, state = 0, self._at_start.copy()
        else:
            place, state = self._kept.popitem(last=False)
        for fields in self._fields:
            fields.move(state, anchor - place)
        for group in self._keys:
            turned = self._rotation.turned(group.keys, group.layer, anchor, self._neighbours)
            heads = hadamard(turned, self._layout.key_block)  # (n, P, K, H)
            num_layers, count, *_ = heads.shape
            stored = rows.encode(heads.reshape(num_layers * count, -1), group.ggml_type).reshape(num_layers, -1)
            for field, layer in zip(group.fields, stored, strict=True):
                state[field] = layer
        return state


def read_seed(state: SequenceState, layout: Layout, num_heads: int, head_dim: int) -> KVSeed:
    """The seed in a state that the model computed itself: the inverse of ``layout.seeded_state``.

    Args:
        state: of P cells, one behind the other; layers with a window may lack the first of them.
        layout: measured on the same model with the same cache.
        num_heads: K.
        head_dim: H.

    Returns:
        Canonical, float32; zeros where a layer lacks a cell, which its window keeps from every token.

    Raises:
        InactivePatchError: a cache does not hold all cells that count.
    """
    keys, values = dict[int, NDArray[np.float32]](), dict[int, NDArray[np.float32]]()
    start, count = min(state.caches[0].positions), len(state.caches[0].positions)
    end = start + count
    for number, (cache, layers) in enumerate(zip(state.caches, layout.layers, strict=True)):
        held = len(cache.positions)
        if sorted(cache.positions) != list(range(end - held if number else start, end)):
            raise InactivePatchError(
                f"llama.cpp's cache holds positions {cache.positions[0]} to {cache.positions[-1]} of the seed, expected them up to {end - 1}",
                hint="use seed_route stored",
            )
        order = np.argsort(cache.positions)
        for layer, key, value in zip(layers, cache.keys, cache.values, strict=True):
            laid_out = hadamard(decode_rows(key, held, (num_heads, head_dim), False), layout.key_block)
            laid_out_value = hadamard(
                decode_rows(value, held, (num_heads, head_dim), cache.transposed), layout.value_block
            )
            ordered = deinterleave(laid_out) if layout.rotates_neighbours else laid_out
            keys[layer], values[layer] = (_from_the_end(t[:, order], count) for t in (ordered, laid_out_value))
    return KVSeed(tuple(keys[i] for i in sorted(keys)), tuple(values[i] for i in sorted(values)))


def _from_the_end(cells: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """(K, N, H) as the last of (K, ``count``, H)."""
    return np.pad(cells, ((0, 0), (count - cells.shape[1], 0), (0, 0)))
