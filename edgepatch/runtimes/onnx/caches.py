"""A decoder graph bound to its memory: one class for graphs that write in place, one for those that give a longer past back.

Both hold B rows, each starting with cells that were put there: the seed, or the seed with a prompt behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.onnx.graphs import DecoderGraph
from edgepatch.errors import EdgepatchError
from edgepatch.tensors import ModelSpec

Cells = tuple[NDArray[Any], NDArray[Any]]  # a layer's key and value, each (K, N, H); keys after RoPE, rotate-half order


class Cache(ABC):
    """Keys and values of B rows, and the graph that reads and writes them.

    Args:
        session: onnxruntime's.
        graph: how it takes its past.
        spec: K, H, L and V.
        window: width of the sliding window, for graphs that ask for it.
        provider: "cpu" or "cuda".
        rows: B.
    """

    def __init__(
        self, session: Any, graph: DecoderGraph, spec: ModelSpec, window: int, provider: str, rows: int = 1
    ) -> None:
        self._session, self._graph, self._spec, self._provider = session, graph, spec, provider
        self._binding = session.io_binding()
        self._windows = np.array(window, dtype=np.int64)
        self._step_logits = np.empty((rows, 1, spec.vocab_size), dtype=graph.logits_type)
        self.lengths = np.zeros(rows, dtype=np.int64)  # filled positions of each row

    @abstractmethod
    def fill(self, rows: Sequence[Sequence[Cells]]) -> None:
        """Every row afresh.

        Args:
            rows: B times L keys and values; an empty one for a row without a past.
        """

    @abstractmethod
    def cut(self, length: int) -> None:
        """Forgets all but the first ``length`` positions of the only row."""

    @abstractmethod
    def cells(self, length: int) -> list[Cells]:
        """Per layer the key and the value of the first row's first positions."""

    @abstractmethod
    def put_keys(self, row: int, keys: Sequence[NDArray[Any]]) -> None:
        """Other keys, (K, P, H) for each layer, in place of those of a row's first P positions."""

    @abstractmethod
    def _run(self, tokens: NDArray[np.int64], logits: NDArray[Any]) -> None:
        """Evaluates (B, T) tokens into (B, T, V) logits."""

    def evaluate(self, tokens: NDArray[np.int64]) -> NDArray[Any]:
        """Evaluates tokens behind each row.

        Args:
            tokens: (B, T); T must be 1 when B > 1.

        Returns:
            (B, T, V) logits; the memory is used again by the next call with T = 1.
        """
        rows, length = tokens.shape
        shape = (rows, length, self._spec.vocab_size)
        logits = self._step_logits if length == 1 else np.empty(shape, dtype=self._graph.logits_type)
        self._bind("input_ids", tokens)
        for name in self._graph.windows:
            self._bind(name, self._windows)
        if self._graph.takes_positions:
            positions = self.lengths[:, None] + np.arange(length)
            self._bind("position_ids", positions)
        try:
            self._run(tokens, logits)
        except EdgepatchError:
            raise
        except Exception as error:  # onnxruntime's errors derive from Exception alone
            raise EdgepatchError(
                f"onnxruntime failed: {error}", hint="check memory, or convert the model again"
            ) from error
        self.lengths += length
        return logits

    def _bind(self, name: str, array: NDArray[np.int64]) -> None:
        self._binding.bind_input(name, "cpu", 0, np.int64, list(array.shape), array.ctypes.data)

    def _bind_logits(self, logits: NDArray[Any]) -> None:
        self._binding.bind_output("logits", "cpu", 0, logits.dtype.type, list(logits.shape), logits.ctypes.data)


class SharedCache(Cache):
    """For GroupQueryAttention, which reads and writes one (B, K, M, H) buffer per layer and kind in place.

    The length of the attention mask alone says how much of a buffer counts, so cutting it costs nothing.

    Args:
        positions: M, the patch's own included.
        **rest: as ``Cache``.
    """

    def __init__(self, *args: Any, positions: int, **rest: Any) -> None:
        super().__init__(*args, **rest)
        from onnxruntime import OrtValue

        rows = len(self.lengths)
        shape = (rows, self._spec.num_key_value_heads, positions, self._spec.head_dim)
        self._arrays = [np.zeros(shape, dtype=self._graph.cache_type) for _ in self._graph.past]
        # On the CPU each value is the array's own memory.
        self._values = [OrtValue.ortvalue_from_numpy(array, self._provider, 0) for array in self._arrays]
        for past, present, value in zip(self._graph.past, self._graph.present, self._values, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)

    def fill(self, rows: Sequence[Sequence[Cells]]) -> None:
        for row, layers in enumerate(rows):
            self.lengths[row] = layers[0][0].shape[1] if layers else 0
            for i, array in enumerate(self._arrays[: 2 * len(layers)]):
                array[row, :, : self.lengths[row]] = layers[i // 2][i % 2]
        self._upload()

    def spoil(self) -> None:
        """Puts NaN where the next token's cells belong: it stays only if the graph does not write to these buffers."""
        for array in self._arrays:
            array[:, :, self.lengths[0]] = np.nan
        self._upload()

    def put_keys(self, row: int, keys: Sequence[NDArray[Any]]) -> None:
        for value, array, key in zip(self._values[::2], self._arrays[::2], keys, strict=True):
            if self._provider != "cpu":
                array[:] = value.numpy()  # the graph has written there since
            array[row, :, : key.shape[1]] = key
            if self._provider != "cpu":
                value.update_inplace(array)

    def _upload(self) -> None:
        if self._provider != "cpu":
            for value, array in zip(self._values, self._arrays, strict=True):
                value.update_inplace(array)

    def cut(self, length: int) -> None:
        self.lengths[0] = length

    def _run(self, tokens: NDArray[np.int64], logits: NDArray[Any]) -> None:
        ends = self.lengths + tokens.shape[1]
        mask = (np.arange(ends.max()) < ends[:, None]).astype(np.int64)
        self._bind("attention_mask", mask)
        self._bind_logits(logits)
        self._session.run_with_iobinding(self._binding)

    def cells(self, length: int) -> list[Cells]:
        whole = self._arrays if self._provider == "cpu" else [value.numpy() for value in self._values]
        return [(whole[i][0, :, :length], whole[i + 1][0, :, :length]) for i in range(0, len(whole), 2)]


class GrowingCache(Cache):
    """For graphs that take the past (B, K, N, H) and give it back longer; what comes back is the next step's input.

    Rows of different lengths end at the same position: the shorter ones start with padding that the mask hides.
    """

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self._past: list[Any] = []  # onnxruntime's values
        self._held = 0  # positions of them, padding included

    def fill(self, rows: Sequence[Sequence[Cells]]) -> None:
        self.lengths[:] = [layers[0][0].shape[1] if layers else 0 for layers in rows]
        self._held = int(self.lengths.max())
        shape = (len(rows), self._spec.num_key_value_heads, self._held, self._spec.head_dim)
        arrays = []
        for i in range(len(self._graph.past)):
            array = np.zeros(shape, dtype=self._graph.cache_type)
            for row, layers in enumerate(rows):
                if layers:
                    array[row, :, self._held - self.lengths[row] :] = layers[i // 2][i % 2]
            arrays.append(array)
        self._past = [self._value(array) for array in arrays]

    def _value(self, array: NDArray[Any]) -> Any:
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._provider, 0)

    def put_keys(self, row: int, keys: Sequence[NDArray[Any]]) -> None:
        start = self._held - int(self.lengths[row])
        for layer, key in enumerate(keys):
            array = self._past[2 * layer].numpy()  # onnxruntime's own memory, or a copy of a device's
            array[row, :, start : start + key.shape[1]] = key
            if self._provider != "cpu":
                self._past[2 * layer] = self._value(array)

    def cut(self, length: int) -> None:
        if length < self._held:
            # Copies: a value keeps the array that it is made of, but not the memory that such an array only looks at.
            self._past = [self._value(value.numpy()[:, :, :length].copy()) for value in self._past]
        self._held = length
        self.lengths[0] = length

    def _run(self, tokens: NDArray[np.int64], logits: NDArray[Any]) -> None:
        total = self._held + tokens.shape[1]
        mask = (np.arange(total) >= (self._held - self.lengths)[:, None]).astype(np.int64)
        self._bind("attention_mask", mask)
        self._bind_logits(logits)
        for past, present, value in zip(self._graph.past, self._graph.present, self._past, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_output(present, self._provider, 0)
        self._session.run_with_iobinding(self._binding)
        self._past = self._binding.get_outputs()[1:]  # in the order in which they were bound
        self._held = total

    def cells(self, length: int) -> list[Cells]:
        arrays = [value.numpy()[0, :, self._held - int(self.lengths[0]) :] for value in self._past]
        return [(arrays[i][:, :length], arrays[i + 1][:, :length]) for i in range(0, len(arrays), 2)]


def new_cache(
    session: Any, graph: DecoderGraph, spec: ModelSpec, window: int, provider: str, *, positions: int, rows: int = 1
) -> Cache:
    """The cache that fits a graph."""
    if graph.shared:
        return SharedCache(session, graph, spec, window, provider, rows, positions=positions)
    return GrowingCache(session, graph, spec, window, provider, rows)
