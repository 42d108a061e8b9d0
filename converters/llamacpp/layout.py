"""How llama.cpp orders what it caches, measured instead of assumed.

The canonical order of keys is Transformers' (rotate half: dimension ``j`` of a head turns with ``j + H/2``). llama.cpp's llama
family turns neighbours, so its converter reorders the key projection and every cached key with it; other families keep the order.
A quantized cache is multiplied by a Hadamard matrix before it is stored. Models with sliding windows keep two caches. No file
says which of this holds, and a wrong guess gives fluent nonsense without any error. So ``measure`` compares what the model itself
caches for a soft prompt with the seed that the full-precision model computed for it, under every candidate, and takes a layout
only if it fits as well as the values do, which no key order touches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.llamacpp.state import CacheState, LayerRows, SequenceState, fill
from edgepatch.converters.rope import interleave
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.tensors import KVSeed

ROTATION_BLOCK = 64  # the smallest that llama.cpp rotates
WORST_VALUE_ERROR = 0.7
"""Relative error of the values beyond which two caches are not of the same prompt; 4-bit weights stay below 0.4, foreign ones are at 1.4."""

KEY_ERROR_FACTOR, KEY_ERROR_FLOOR = 1.5, 0.02
"""In every layer, keys in the right order are as wrong as the values, from weights quantized alike.

The values of the first layer do not depend on any key, so a seed of another rope theta shows there; in later layers its values are
wrong too, and a mean over layers would hide it.
"""

COARSER_KEYS_FACTOR = 4.0
"""Where the key projection has another type than the value projection: llama.cpp's mixed types spare values up to twice the bits."""


@dataclass(frozen=True)
class Layout:
    """Where a seed's tensors go.

    Attributes:
        rotates_neighbours: keys are reordered from rotate-half to interleaved.
        key_block: size of the Hadamard blocks that keys were multiplied with; 0 for none.
        value_block: the same for values.
        layers: for each cache the layers of the model that it holds, in the cache's order.
    """

    rotates_neighbours: bool
    key_block: int
    value_block: int
    layers: tuple[tuple[int, ...], ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        """The inverse of ``as_dict``.

        Raises:
            TypeError: a field is missing or unknown.
            ValueError: a value is of another type.
        """
        layers = tuple(tuple(int(i) for i in cache) for cache in values["layers"])
        return cls(**{**values, "layers": layers})


def hadamard(tensor: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """(..., H) multiplied per block of ``block`` dimensions by the orthonormal Sylvester matrix, which is its own inverse."""
    if not block:
        return tensor
    blocks = tensor.reshape(-1, block) @ _sylvester(block)
    return _float32(blocks.reshape(tensor.shape))


@functools.cache
def _sylvester(size: int) -> NDArray[np.float32]:
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return _float32(matrix / np.float32(np.sqrt(size)))


def blocks_of(head_dim: int) -> list[int]:
    """0, and every power of two from 64 that divides H."""
    sizes = [1 << n for n in range(ROTATION_BLOCK.bit_length() - 1, head_dim.bit_length())]
    return [0, *(size for size in sizes if head_dim % size == 0)]


# Rows as the cache stores them.


def _quantization(ggml_type: int) -> Any:
    import gguf

    return gguf.GGMLQuantizationType(ggml_type)


def decode_rows(layer: LayerRows, cells: int, shape: tuple[int, int], transposed: bool) -> NDArray[np.float32]:
    """(K, cells, H) float32 of a cached layer.

    Args:
        layer: of a state.
        cells: number of cells.
        shape: (K, H).
        transposed: the rows are columns.

    Raises:
        InactivePatchError: the rows are not of that shape.
    """
    from gguf import quants

    data = np.frombuffer(layer.rows, dtype=np.uint8)
    table = quants.dequantize(data.reshape(cells, -1) if not transposed else data, _quantization(layer.ggml_type))
    if table.size != cells * shape[0] * shape[1]:
        raise InactivePatchError(
            f"llama.cpp's cache: expected rows of {shape[0]} heads of {shape[1]}, found {table.size // cells} values"
        )
    values = _float32(table)
    return _float32(
        values.reshape(*shape, cells).transpose(0, 2, 1)
        if transposed
        else values.reshape(cells, *shape).transpose(1, 0, 2)
    )


def encode_rows(tensor: NDArray[np.float32], ggml_type: int, transposed: bool) -> bytes:
    """The inverse of ``decode_rows``.

    Args:
        tensor: (K, P, H).
        ggml_type: of the cache.
        transposed: by column.

    Raises:
        InputError: a value is beyond the type's range.
    """
    from gguf import quants

    num_heads, cells, head_dim = tensor.shape
    order = (0, 2, 1) if transposed else (1, 0, 2)
    rows = np.ascontiguousarray(tensor.transpose(order), dtype=np.float32)
    if not transposed:
        rows = rows.reshape(cells, num_heads * head_dim)
    with np.errstate(over="ignore"):
        stored = quants.quantize(rows, _quantization(ggml_type))
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise InputError("the KV seed has values beyond float16", hint="load the model with kv_type f32")
    return bytes(np.ascontiguousarray(stored).tobytes())


def cells_of(probe: SequenceState, num_virtual_tokens: int, window: int) -> list[range]:
    """The virtual tokens that each of llama.cpp's caches keeps: the second, of layers with a window, what the next token can see."""
    first = max(0, num_virtual_tokens - window) if window else 0
    return [range(start, num_virtual_tokens) for start in (0, first)[: len(probe.caches)]]


def seeded_state(probe: SequenceState, layout: Layout, seed: KVSeed, window: int = 0) -> bytes:
    """The state of P cells that hold the seed, in the structure of ``probe``.

    Args:
        probe: read from the running library.
        layout: measured on the same model with the same cache.
        seed: canonical.
        window: of the layers in the second cache, which keeps only what the next token can see; 0 for none.

    Raises:
        InputError: a value is beyond the cache's type.
        InactivePatchError: the seed does not fit the cache.
    """
    cells = cells_of(probe, seed.num_virtual_tokens, window)
    return fill(probe, *_laid_out(probe, layout, seed, cells), cells)


def one_label_state(probe: SequenceState, layout: Layout, seed: KVSeed) -> bytes:
    """The state of a text's first token with a seed in front of it, all of whose cells stand at position 0.

    llama.cpp shows a token every cell of its sequence at or in front of its own position, however many are at one place; where a key
    stands is in the key. So clients that count one cell a token take the whole for that one token. Layers with a sliding window lose
    all cells of a position at once: a text must end before the model itself would lose the first of them.

    Args:
        probe: read from the running library.
        layout: measured on the same model with the same cache.
        seed: canonical, P + 1 cells at places -P to 0; the last is the token.

    Raises:
        InputError: a value is beyond the cache's type.
        InactivePatchError: the seed does not fit the cache.
    """
    cells = cells_of(probe, seed.num_virtual_tokens, 0)
    return fill(probe, *_laid_out(probe, layout, seed, cells), [[0] * len(each) for each in cells])


def _laid_out(
    probe: SequenceState, layout: Layout, seed: KVSeed, cells_of_caches: Sequence[range]
) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """Keys and values of each cache and layer, as the cache stores them."""
    keys, values = [], []
    for cache, layers, cells in zip(probe.caches, layout.layers, cells_of_caches, strict=True):
        keys.append(
            [
                encode_rows(_lay_out_key(seed.keys[i][:, cells], layout), stored.ggml_type, False)
                for i, stored in zip(layers, cache.keys, strict=True)
            ]
        )
        values.append(
            [
                encode_rows(
                    hadamard(_float32(seed.values[i][:, cells]), layout.value_block), stored.ggml_type, cache.transposed
                )
                for i, stored in zip(layers, cache.values, strict=True)
            ]
        )
    return keys, values


def _float32(tensor: NDArray[Any]) -> NDArray[np.float32]:
    converted: NDArray[np.float32] = np.asarray(tensor, dtype=np.float32)
    return converted


def _lay_out_key(key: NDArray[Any], layout: Layout) -> NDArray[np.float32]:
    ordered = interleave(key) if layout.rotates_neighbours else key
    return hadamard(_float32(ordered), layout.key_block)


# Measuring.


@dataclass(frozen=True)
class Measurement:
    """What ``measure`` found.

    Attributes:
        layout: the best candidate.
        key_error: mean relative error of its keys against the seed.
        value_error: of its values.
        confirmed: whether keys fit as well as values do, and no other candidate does.
    """

    layout: Layout
    key_error: float
    value_error: float
    confirmed: bool


def measure(state: SequenceState, seed: KVSeed, key_error_factor: float = KEY_ERROR_FACTOR) -> Measurement:
    """Finds the layout under which a seed is what the model itself has cached for the same soft prompt.

    Args:
        state: P cells that the model decoded from the soft prompt.
        seed: the same soft prompt's keys and values from the full-precision model.
        key_error_factor: how much more wrong keys may be than values.

    Raises:
        InactivePatchError: the cache has another number of layers or another shape than the seed.
    """
    slots = list(
        chain.from_iterable(
            zip(cache.keys, cache.values, [cache] * len(cache.keys), strict=True) for cache in state.caches
        )
    )
    if len(slots) != len(seed.keys):
        raise InactivePatchError(f"llama.cpp caches {len(slots)} layers, the KV seed has {len(seed.keys)}")
    shape = (seed.keys[0].shape[0], seed.keys[0].shape[2])
    keys = [decode_rows(k, len(c.positions), shape, False) for k, _, c in slots]
    values = [decode_rows(v, len(c.positions), shape, c.transposed) for _, v, c in slots]
    positions = [list(c.positions) for _, _, c in slots]
    value_block, assigned, value_error = _match_values(values, positions, seed)
    key_errors = {
        (swap, block): _mean_error(
            keys, [_lay_out_key(seed.keys[i], Layout(swap, block, 0)) for i in assigned], positions
        )
        for swap in (False, True)
        for block in blocks_of(shape[1])
    }
    (swap, block), *others = sorted(key_errors, key=lambda candidate: key_errors[candidate])
    layout = Layout(swap, block, value_block, _by_cache(assigned, state.caches))
    pairs = [
        (
            _error(key, _lay_out_key(seed.keys[i], layout), p),
            _error(value, hadamard(_float32(seed.values[i]), value_block), p),
        )
        for key, value, i, p in zip(keys, values, assigned, positions, strict=True)
    ]
    layers_fit = all(key <= key_error_factor * value + KEY_ERROR_FLOOR for key, value in pairs)
    error, limit = key_errors[swap, block], key_error_factor * value_error + KEY_ERROR_FLOOR
    fits = value_error <= WORST_VALUE_ERROR and layers_fit and limit < min(key_errors[other] for other in others)
    return Measurement(layout, error, value_error, fits and sorted(assigned) == list(range(len(slots))))


def _match_values(
    values: list[NDArray[np.float32]], positions: list[list[int]], seed: KVSeed
) -> tuple[int, list[int], float]:
    """(Hadamard block, layer of each slot, mean relative error) of the best fit of the cached values."""
    best: tuple[int, list[int], float] | None = None
    for block in blocks_of(seed.values[0].shape[2]):
        candidates = [hadamard(_float32(value), block) for value in seed.values]
        assigned = [
            min(range(len(candidates)), key=lambda i, v=v, p=p: _error(v, candidates[i], p))  # type: ignore[misc]
            for v, p in zip(values, positions, strict=True)
        ]
        error = _mean_error(values, [candidates[i] for i in assigned], positions)
        if best is None or error < best[2]:
            best = block, assigned, error
    assert best is not None  # block 0 is always tried
    return best


def _error(actual: NDArray[np.float32], expected: NDArray[np.float32], positions: list[int]) -> float:
    target = expected[:, positions]
    return float(np.linalg.norm(actual - target) / max(float(np.linalg.norm(target)), 1e-12))


def _mean_error(
    actual: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]], positions: list[list[int]]
) -> float:
    return float(np.mean([_error(f, e, p) for f, e, p in zip(actual, expected, positions, strict=True)]))


def _by_cache(assigned: list[int], caches: Sequence[CacheState]) -> tuple[tuple[int, ...], ...]:
    rest = iter(assigned)
    return tuple(tuple(next(rest) for _ in cache.keys) for cache in caches)


def turns_neighbours(keys: NDArray[np.float32], num_rotated: int) -> bool | None:
    """Which dimensions RoPE turns together, from the cached keys of one token repeated: it keeps each pair's length.

    Args:
        keys: (K, T, H) float32 of one layer, the same token at positions 0..T-1.
        num_rotated: dimensions of a head that RoPE turns.

    Returns:
        True for neighbours, False for halves, ``None`` where the two cannot be told apart.
    """
    turned = keys[..., :num_rotated]
    pairs = {
        True: turned.reshape(*turned.shape[:-1], -1, 2),
        False: turned.reshape(*turned.shape[:-1], 2, -1).swapaxes(-1, -2),
    }
    spread = {}
    for neighbours, pair in pairs.items():
        lengths = np.linalg.norm(pair, axis=-1)  # (K, T, H/2)
        spread[neighbours] = float(np.std(lengths, axis=1).sum() / np.maximum(lengths.mean(axis=1).sum(), 1e-12))
    if max(spread.values()) < 10 * min(spread.values()):
        return None
    return spread[True] < spread[False]
