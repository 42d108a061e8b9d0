"""The state of a seed at any place of a text, in llama.cpp's own bytes.

llama.cpp can shift cells by itself, but it shifts them for every sequence that shares them, rounds quantized keys anew, and corrupts
keys under YaRN. A seed's keys are known in full precision, so the state is written anew: the values and the structure stay, the
keys are turned. A cell's position is moved along: it decides which layers with a sliding window see the cell, while what a key
says of its place is in the key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.llamacpp.layout import Layout, decode_rows, encode_rows, hadamard
from edgepatch.converters.llamacpp.state import CacheState, SequenceState, fill
from edgepatch.converters.rope import deinterleave, interleave
from edgepatch.errors import InactivePatchError
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import KVSeed


class MovableState:
    """A seed whose state can be had at any anchor.

    Args:
        probe: read from the running library.
        layout: measured on the same model with the same cache.
        seed: canonical, at positions 0..P-1.
        rotation: of the model's keys.
        window: of the layers in the second cache, which keeps only what the next token can see; 0 for none.

    Raises:
        InputError: a value is beyond the cache's type.
        InactivePatchError: the seed does not fit the cache.
    """

    def __init__(self, probe: SequenceState, layout: Layout, seed: KVSeed, rotation: Rotation, window: int = 0) -> None:
        self._probe, self._layout, self._rotation = probe, layout, rotation
        count = seed.num_virtual_tokens
        starts = (0, max(0, count - window) if window else 0)[: len(probe.caches)]
        self._cells = [range(start, count) for start in starts]
        self._keys = [
            [
                (interleave if layout.rotates_neighbours else np.asarray)(seed.keys[layer][:, cells].astype(np.float32))
                for layer in layers
            ]
            for layers, cells in zip(layout.layers, self._cells, strict=True)
        ]
        self._values = [
            [
                encode_rows(
                    hadamard(seed.values[layer][:, cells].astype(np.float32), layout.value_block),
                    stored.ggml_type,
                    cache.transposed,
                )
                for layer, stored in zip(layers, cache.values, strict=True)
            ]
            for layers, cells, cache in zip(layout.layers, self._cells, probe.caches, strict=True)
        ]

    def at(self, anchor: int) -> bytes:
        """The state of the seed directly in front of text position ``anchor``; its P positions overlap those of the text."""
        keys = [
            self._key_rows(cache, layers, tensors, anchor)
            for cache, layers, tensors in zip(self._probe.caches, self._layout.layers, self._keys, strict=True)
        ]
        positions = [range(cells.start + anchor, cells.stop + anchor) for cells in self._cells]
        return fill(self._probe, keys, self._values, positions)

    def _key_rows(
        self, cache: CacheState, layers: Sequence[int], keys: Sequence[NDArray[np.float32]], anchor: int
    ) -> list[bytes]:
        rows = []
        for layer, key, stored in zip(layers, keys, cache.keys, strict=True):
            turned = self._turned(key, layer, anchor)
            rows.append(encode_rows(hadamard(turned, self._layout.key_block), stored.ggml_type, False))
        return rows

    def _turned(self, key: NDArray[np.float32], layer: int, anchor: int) -> NDArray[np.float32]:
        """(K, P, H) in llama.cpp's order, ``anchor`` positions further on."""
        if self._layout.rotates_neighbours:
            return self._rotation.turned(key, layer, anchor, neighbours=True)
        return self._rotation.turned(key, layer, anchor)


def read_seed(state: SequenceState, layout: Layout, num_heads: int, head_dim: int) -> KVSeed:
    """The seed in a state that the model computed itself: the inverse of ``layout.seeded_state``.

    Args:
        state: of cells at positions 0..P-1.
        layout: measured on the same model with the same cache.
        num_heads: K.
        head_dim: H.

    Returns:
        Canonical, float32.

    Raises:
        InactivePatchError: a cache does not hold all cells.
    """
    keys, values = dict[int, NDArray[np.float32]](), dict[int, NDArray[np.float32]]()
    for cache, layers in zip(state.caches, layout.layers, strict=True):
        count = len(cache.positions)
        if sorted(cache.positions) != list(range(count)):
            raise InactivePatchError(
                f"llama.cpp's cache holds positions {cache.positions[0]} to {cache.positions[-1]} of the seed, not all from 0 on",
                hint="use seed_route stored",
            )
        for layer, key, value in zip(layers, cache.keys, cache.values, strict=True):
            laid_out = hadamard(decode_rows(key, count, (num_heads, head_dim), False), layout.key_block)
            keys[layer] = deinterleave(laid_out) if layout.rotates_neighbours else laid_out
            values[layer] = hadamard(
                decode_rows(value, count, (num_heads, head_dim), cache.transposed), layout.value_block
            )
    return KVSeed(tuple(keys[i] for i in sorted(keys)), tuple(values[i] for i in sorted(values)))
