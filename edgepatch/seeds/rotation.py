"""How a model's keys turn with their position, and what follows: a seed can be put anywhere, and beside others.

A cached key is a vector that the rotary embedding has turned by its position. A seed depends on nothing in front of it, so turning
its keys by the distance gives exactly the seed that the model would compute at the new place. A softmax over cells has no order,
so seeds that were computed apart may end at the same place: none sees, and none shields, another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError, PatchFormatError
from edgepatch.tensors import KVSeed

BY_LENGTH = frozenset({"dynamic", "longrope", "su"})
"""Kinds of scaling whose frequencies depend on the length of the text: a key that was turned once is wrong when the text grows."""

MAX_TABLES = 8
LARGEST_FREQUENCY = pi
"""Half a turn a position: a faster one could not be told from a slower one backwards."""


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a model, layer by layer.

    Attributes:
        tables: different sets of frequencies, (R/2,) radians a position each; the first R of a head's H dimensions turn.
        layers: L numbers of tables, which are counted as the layers use them; ``None`` for a layer without positions (NoPE), whose
            keys never turn.
        neighbours: whether dimension ``2j`` turns together with ``2j + 1`` (Cohere), and not ``j`` with ``j + R/2``.

    Raises:
        InputError: the layers' numbers are not those of the tables, two tables are equal, or a frequency is out of range.
    """

    tables: tuple[tuple[float, ...], ...]
    layers: tuple[int | None, ...]
    neighbours: bool = False

    def __post_init__(self) -> None:
        used = list(dict.fromkeys(i for i in self.layers if i is not None))
        if not self.layers or used != list(range(len(self.tables))) or len(self.tables) > MAX_TABLES:
            raise InputError(
                f"rotation: expected at most {MAX_TABLES} tables, numbered from 0 as the layers use them, "
                f"found {len(self.tables)} and the numbers {used!r:.80}"
            )
        if len(set(self.tables)) < len(self.tables) or (self.neighbours and not self.tables):
            raise InputError(
                "rotation: expected different tables, and no neighbours where nothing turns: one model, one spelling"
            )
        if not all(self.tables):
            raise InputError("rotation: expected a frequency or more in each table, found none")
        wrong = next(
            (f for table in self.tables for f in table if not 0 <= f <= LARGEST_FREQUENCY), None
        )  # NaN is none
        if wrong is not None:
            raise InputError(
                f"rotation: expected frequencies from 0 to {LARGEST_FREQUENCY} radians a position, found {wrong!r:.40}"
            )

    def cos_sin(self, table: int, shift: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(R/2,) float32 cosines and sines of the angles by which ``shift`` positions turn a key."""
        angles = np.asarray(self.tables[table], dtype=np.float64) * shift
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def turned(self, keys: NDArray[Any], layer: int, shift: int, neighbours: bool | None = None) -> NDArray[np.float32]:
        """Keys of a layer as they are ``shift`` positions further on.

        Args:
            keys: (..., H), in Transformers' order.
            layer: of the model.
            shift: may be negative.
            neighbours: whether the keys have neighbours turn together, where they are in another order than Transformers'.

        Returns:
            The same shape, float32.
        """
        table, contiguous = self.layers[layer], np.ascontiguousarray(keys, dtype=np.float32)
        turned = np.empty_like(contiguous)
        if table is None or not shift:
            turned[:] = contiguous
            return turned
        cos, sin = self.cos_sin(table, shift)
        count = len(cos)
        turned[..., 2 * count :] = contiguous[..., 2 * count :]
        if self.neighbours if neighbours is None else neighbours:  # a pair is a complex number, times one of length 1
            pairs, turned_pairs = (keys[..., : 2 * count].view(np.complex64) for keys in (contiguous, turned))
            np.multiply(pairs, cos + 1j * sin, out=turned_pairs)
            return turned
        first, second = contiguous[..., :count], contiguous[..., count : 2 * count]
        turned[..., :count] = first * cos - second * sin
        turned[..., count : 2 * count] = second * cos + first * sin
        return turned

    def moved(self, seed: KVSeed, shift: int) -> KVSeed:
        """A seed ``shift`` positions further on, in float32."""
        keys = tuple(self.turned(key, layer, shift) for layer, key in enumerate(seed.keys))
        return KVSeed(keys, tuple(np.asarray(value, dtype=np.float32) for value in seed.values))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "tables": [list(table) for table in self.tables],
            "layers": list(self.layers),
            "neighbours": self.neighbours,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Rotation:
        """The inverse of ``as_dict``.

        Raises:
            PatchFormatError: a field is missing, unknown or of another type.
        """
        if not isinstance(values, dict) or set(values) != {"tables", "layers", "neighbours"}:
            raise PatchFormatError(
                f"rotation: expected an object with tables, layers, neighbours, found {values!r:.80}"
            )
        tables, layers = values["tables"], values["layers"]
        if not isinstance(values["neighbours"], bool):
            raise PatchFormatError(f"rotation: neighbours: expected true or false, found {values['neighbours']!r:.80}")
        if not isinstance(layers, list) or not all(_is_number(i) for i in layers):
            raise PatchFormatError(f"rotation: layers: expected a list of numbers of tables, found {layers!r:.80}")
        if not isinstance(tables, list) or not all(_is_table(table) for table in tables):
            raise PatchFormatError(f"rotation: tables: expected lists of numbers, found {tables!r:.80}")
        try:
            return cls(tuple(tuple(map(float, table)) for table in tables), tuple(layers), values["neighbours"])
        except InputError as error:
            raise PatchFormatError(str(error)) from None


def halves(count: int, neighbours: bool) -> tuple[slice, slice]:
    """Which dimensions are the first, and which the second, of the ``count`` pairs that turn together."""
    if neighbours:
        return slice(0, 2 * count, 2), slice(1, 2 * count, 2)
    return slice(0, count), slice(count, 2 * count)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_table(table: Any) -> bool:
    return isinstance(table, list) and all(isinstance(f, (int, float)) and not isinstance(f, bool) for f in table)


def side_by_side(seeds: Sequence[KVSeed], rotation: Rotation) -> KVSeed:
    """Seeds that were computed apart as one, each ending directly in front of the text.

    The text's own positions begin behind all cells, so every seed is turned by the cells of the others. The order of the arguments
    is the order of the cells; what a model computes does not depend on it but for rounding, so callers sort by digest.

    Args:
        seeds: L keys and values (K, P_i, H) each, at positions 0 .. P_i - 1.
        rotation: of their model.

    Returns:
        L keys and values (K, sum P_i, H), float32.
    """
    total = sum(seed.num_virtual_tokens for seed in seeds)
    moved = [rotation.moved(seed, total - seed.num_virtual_tokens) for seed in seeds]
    keys, values = (
        tuple(np.concatenate(layer, axis=1) for layer in zip(*(getattr(seed, kind) for seed in moved), strict=True))
        for kind in ("keys", "values")
    )
    return KVSeed(keys, values)
