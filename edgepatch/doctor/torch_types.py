"""What PyTorch computes here: a matrix product and its gradient, in the types that training uses, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

BOUND = 0.05
"""Largest sound deviation; bfloat16 has 8 bits, which costs 0.004."""

ROWS, WIDTH = 64, 256


def facts() -> dict[str, Any]:
    """What the library says of itself."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(count)],
        "num_threads": torch.get_num_threads(),
    }


def types() -> list[str]:
    """Of weights."""
    return ["float32", "bfloat16"]


def deviation(type_name: str, extra_buffers: bool) -> float:
    """How far a product of 64 rows with a matrix of a type, one of a single row, and a gradient are from the right ones.

    Args:
        type_name: one of ``types()``.
        extra_buffers: without meaning here.

    Returns:
        The largest root mean square of the error, over that of the right numbers.
    """
    import torch

    rng = np.random.default_rng(0)
    rows, weight = rng.standard_normal((ROWS, WIDTH)), rng.standard_normal((WIDTH, WIDTH))
    # With one row as with many: libraries have kernels of their own for each.
    return max(_deviation(torch, getattr(torch, type_name), part, weight) for part in (rows, rows[:1]))


def _deviation(torch: Any, dtype: Any, rows: Any, weight: Any) -> float:
    inputs = torch.tensor(rows, dtype=dtype, requires_grad=True)
    product = torch.nn.functional.linear(inputs, torch.tensor(weight, dtype=dtype))
    product.sum().backward()
    expected = (rows @ weight.T, np.broadcast_to(weight.sum(0), rows.shape))
    computed = (product.detach().double().numpy(), inputs.grad.double().numpy())
    return max(float(np.linalg.norm(c - e) / np.linalg.norm(e)) for c, e in zip(computed, expected, strict=True))
