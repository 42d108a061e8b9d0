"""What ONNX Runtime computes here with weights of each type: one product, in a graph written byte by byte, against numpy.

A device has no ``onnx`` package, and a graph of one node needs few of protobuf's rules: a field is its number and wire type, then its value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = 0.1
"""Largest sound deviation. The kernels for int8 and int4 weights round activations to 8 bits, which costs 0.01."""

ROWS, WIDTH, BLOCK = 64, 256, 32
BITS = {"float32": 0, "int8": 8, "int4": 4}
ACTIVATIONS_OF_8_BITS = 4  # accuracy level of MatMulNBits, as our own conversion sets it
FLOAT, UINT8, INT = 1, 2, 2  # element types of tensors, and the type of an attribute, in ONNX's numbers


def facts() -> dict[str, Any]:
    """What the library says of itself."""
    import onnxruntime

    return {"providers": onnxruntime.get_available_providers()}


def types() -> list[str]:
    """Of weights."""
    return list(BITS)


def deviation(type_name: str, extra_buffers: bool) -> float:
    """How far a product of 64 rows with a matrix of a type, and one of a single row, are from the right ones.

    Args:
        type_name: one of ``types()``.
        extra_buffers: without meaning here.

    Returns:
        The larger root mean square of the error, over that of the right numbers.
    """
    import onnxruntime

    rng = np.random.default_rng(0)
    graph, weight = _float_graph(rng) if type_name == "float32" else _block_graph(BITS[type_name], rng)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    rows = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    # With one row as with many: libraries have kernels of their own for each.
    return max(
        float(np.linalg.norm(session.run(None, {"x": part})[0] - part @ weight) / np.linalg.norm(part @ weight))
        for part in (rows, rows[:1])
    )


# The graphs: y = x times a constant matrix.


def _float_graph(rng: np.random.Generator) -> tuple[bytes, NDArray[np.float32]]:
    weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    return _model(_node("MatMul", ("x", "w")), {"w": weight}), weight


def _block_graph(bits: int, rng: np.random.Generator) -> tuple[bytes, NDArray[np.float32]]:
    """Random bits in blocks of 32, each with a scale; the middle of their range is zero."""
    packed = rng.integers(0, 256, (WIDTH, WIDTH // BLOCK, BLOCK * bits // 8), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, (WIDTH, WIDTH // BLOCK)).astype(np.float32) / 2**bits
    values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(WIDTH, WIDTH // BLOCK, BLOCK)
    weight = ((values.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(WIDTH, WIDTH).T
    settings = {"K": WIDTH, "N": WIDTH, "bits": bits, "block_size": BLOCK, "accuracy_level": ACTIVATIONS_OF_8_BITS}
    node = _node("MatMulNBits", ("x", "w", "s"), "com.microsoft", settings)
    return _model(node, {"w": packed, "s": scales.reshape(-1)}), weight


def _model(node: bytes, constants: dict[str, NDArray[Any]]) -> bytes:
    tensors = [_message(5, _tensor(name, values)) for name, values in constants.items()]
    graph = (
        _message(1, node)
        + _message(2, b"product")
        + b"".join(tensors)
        + _message(11, _value("x"))
        + _message(12, _value("y"))
    )
    operators = [
        _message(8, _message(1, domain) + _number(2, version)) for domain, version in ((b"", 17), (b"com.microsoft", 1))
    ]
    return _number(1, 8) + _message(7, graph) + b"".join(operators)


def _node(operator: str, inputs: tuple[str, ...], domain: str = "", settings: dict[str, int] | None = None) -> bytes:
    attributes = [
        _message(5, _message(1, name.encode()) + _number(3, value) + _number(20, INT))
        for name, value in (settings or {}).items()
    ]
    named = b"".join(_message(1, name.encode()) for name in inputs) + _message(2, b"y")
    return named + _message(4, operator.encode()) + b"".join(attributes) + _message(7, domain.encode())


def _tensor(name: str, values: NDArray[Any]) -> bytes:
    sizes = b"".join(_number(1, size) for size in values.shape)
    kind = _number(2, UINT8 if values.dtype == np.uint8 else FLOAT)
    return sizes + kind + _message(8, name.encode()) + _message(9, values.tobytes())


def _value(name: str) -> bytes:
    """A matrix of float32 with any number of rows."""
    shape = _message(1, _message(2, b"rows")) + _message(1, _number(1, WIDTH))
    return _message(1, name.encode()) + _message(2, _message(1, _number(1, FLOAT) + _message(2, shape)))


def _message(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([digit | 0x80 for digit in digits[:-1]] + digits[-1:])
