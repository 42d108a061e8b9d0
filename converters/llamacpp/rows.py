"""Rows of numbers in ggml's types, by ggml's own code where the library lets it be called: numpy takes several times as long."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.gguf.library import load_library

FLOAT32, FLOAT16 = 0, 1
"""ggml's numbers of them."""


def encode(rows: NDArray[np.float32], ggml_type: int) -> NDArray[np.uint8]:
    """Rows as a cache of llama.cpp stores them; the bytes are the same as ``gguf``'s.

    Args:
        rows: (N, W), within the type's range.
        ggml_type: number of the cache's type.

    Returns:
        (N, bytes of a row).
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if ggml_type == FLOAT32:
        return rows.view(np.uint8)
    if ggml_type == FLOAT16 and (to_float16 := _function("ggml_cpu_fp32_to_fp16")):
        halves = np.empty(rows.shape, dtype=np.float16)
        to_float16(_pointer(rows), _pointer(halves), ctypes.c_int64(rows.size))
        return halves.view(np.uint8)
    return _quantize(rows, ggml_type)


def _quantize(rows: NDArray[np.float32], ggml_type: int) -> NDArray[np.uint8]:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(ggml_type)
    quantize = _function("ggml_quantize_chunk", ctypes.c_size_t)
    if quantize is None or ggml_type == FLOAT16:
        return np.ascontiguousarray(quants.quantize(rows, kind)).view(np.uint8)
    count, width = rows.shape
    encoded = np.empty(quants.quant_shape_to_byte_shape(rows.shape, kind), dtype=np.uint8)
    sizes = (ctypes.c_int64(n) for n in (0, count, width))
    quantize(ggml_type, _pointer(rows), _pointer(encoded), *sizes, None)
    return encoded


@cache
def _function(name: str, result: Any = None) -> Callable[..., Any] | None:
    """A function of ggml; ``None`` where it cannot be reached through llama.cpp's library, as on Windows."""
    opened = getattr(load_library().llama_cpp, "_lib", None)
    function: Any = getattr(opened, name, None)
    if function is not None:
        function.restype = result
    return function  # type: ignore[no-any-return]


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
