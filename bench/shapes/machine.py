"""The limits of this machine: ``edgepatch bench machine``; bench/results/machine.json.

Decoding reads every weight once a token, so memory bandwidth over the model's bytes is a ceiling on its rate. The bandwidth is measured
here as STREAM does it (McCalpin 1995): arrays four times larger than the last cache, the best of many passes, all threads at once.
Reading alone is measured too: a decoder writes next to nothing, and reading is the faster of the two, so that it makes the ceiling.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.environment import environment
from edgepatch.bench.shapes.memory import gguf_weight_bytes
from edgepatch.bench.shapes.shape import Shape
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically

CACHE_FILES = "cpu0/cache/index*/size"
UNKNOWN_CACHE_BYTES = 32 << 20
STREAM_FACTOR = 4
BLOCK = 1 << 14
"""Values of a block of the triad: three blocks of float64 stay in a core's own cache, so that numpy's two steps pass memory once."""
PART = 1 << 21
"""Values of each array that one pass works on: 16 MB."""

Array = NDArray[np.float64]
Kernel = Callable[[list[Array], slice], None]


def cache_bytes(folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """The largest cache that the system tells of, or a guess."""
    sizes = [path.read_text(encoding="ascii").strip() for path in folder.glob(CACHE_FILES)]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=UNKNOWN_CACHE_BYTES)


def _triad(arrays: list[Array], part: slice) -> None:
    """a = b + s c, block by block."""
    a, b, c = (array[part] for array in arrays)
    for start in range(0, len(a), BLOCK):
        block = slice(start, start + BLOCK)
        np.multiply(c[block], 3.0, out=a[block])
        np.add(a[block], b[block], out=a[block])


def _read(arrays: list[Array], part: slice) -> None:
    """Two equal arrays compared by the C library, which reads both to their ends and writes nothing."""
    first, second = (array[part] for array in arrays)
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    if compare(first.ctypes.data, second.ctypes.data, first.nbytes):
        raise RuntimeError("equal arrays compare as different: the memory of this machine is broken")


def _rates(
    kernel: Kernel, num_arrays: int, num_values: int, pool: ThreadPoolExecutor, num_threads: int, seconds: float
) -> dict[str, float]:
    """GB/s (10^9 bytes) over all threads. The best, as STREAM tells it, with median and worst beside it.

    A pass is a part of the arrays, short enough to fall between two turns of another process, and each pass takes the next part.
    """
    arrays = [[np.ones(num_values) for _ in range(num_arrays)] for _ in range(num_threads)]
    length = min(PART, num_values)
    num_bytes = num_threads * num_arrays * 8 * length
    rates: list[float] = []
    until = time.perf_counter() + seconds
    while not rates or time.perf_counter() < until:
        start = len(rates) % (num_values // length) * length
        began = time.perf_counter()
        list(pool.map(kernel, arrays, [slice(start, start + length)] * num_threads))
        rates.append(num_bytes / (time.perf_counter() - began) / 1e9)
    return {"best": max(rates), "median": statistics.median(rates), "worst": min(rates), "repeats": len(rates)}


def measure_bandwidth(num_threads: int, seconds: float = 5.0, size_bytes: int | None = None) -> dict[str, Any]:
    """Memory bandwidth with so many threads.

    Args:
        num_threads: all work at the same time, each on arrays of its own.
        seconds: of each of the two measurements.
        size_bytes: of one array over all threads; default: four times the largest cache.

    Returns:
        ``triad_gb_s`` and ``read_gb_s``, each best, median and worst; ``size_bytes`` and ``num_threads``.

    Raises:
        InputError: fewer than one thread, or arrays smaller than a block.
    """
    size = size_bytes or STREAM_FACTOR * cache_bytes()
    num_values = size // num_threads // 8 if num_threads > 0 else 0
    if num_threads < 1 or num_values < BLOCK:
        raise InputError(
            f"expected one thread or more and {8 * BLOCK} bytes for each, found {num_threads} threads and {size} bytes"
        )
    with ThreadPoolExecutor(num_threads) as pool:
        rates = {
            "triad_gb_s": _rates(_triad, 3, num_values, pool, num_threads, seconds),
            "read_gb_s": _rates(_read, 2, num_values, pool, num_threads, seconds),
        }
    return {"num_threads": num_threads, "size_bytes": 8 * num_values * num_threads, **rates}


def bytes_per_token(shape: Shape, kind: str, depth: int = 0) -> int:
    """Bytes that decoding one token reads: every matrix once, and the keys and values (float16) of ``depth`` positions.

    Of the embedding one row is read, unless it is the output matrix as well.

    Raises:
        InputError: the type is not known.
    """
    cache = 2 * 2 * shape.num_layers * shape.num_key_value_heads * shape.head_dim * depth
    return gguf_weight_bytes(_read_whole(shape), kind) + cache


def operations_per_token(shape: Shape, depth: int = 0) -> int:
    """Multiplications and additions of one token: two a weight, and four a position, head and dimension in attention."""
    return 2 * _read_whole(shape).num_parameters + 4 * shape.num_layers * shape.num_heads * shape.head_dim * depth


def _read_whole(shape: Shape) -> Shape:
    """The shape with the one matrix of V x D that every token reads: the output matrix."""
    return replace(shape, is_tied=True)


def decode_ceiling(machine: Mapping[str, Any], num_bytes: float) -> float:
    """Tokens a second that this machine cannot exceed when each reads ``num_bytes``."""
    return float(machine["read_gb_s"]["best"]) * 1e9 / num_bytes


def run(num_threads: int, seconds: float, out: Path) -> dict[str, Any]:
    """Measures the bandwidth and writes the document that it returns.

    Args:
        num_threads: all at the same time.
        seconds: of each measurement.
        out: the JSON file.
    """
    load = os.getloadavg()[0]
    document = {
        "command": "edgepatch bench machine",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "load_average": load,
        **measure_bandwidth(num_threads, seconds),
    }
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    return document
