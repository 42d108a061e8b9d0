"""How fast this machine multiplies matrices of the shapes of training, in each type: a hint at what training would choose."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edgepatch.training.precision import LEAST_SPEEDUP, TRIED

if TYPE_CHECKING:
    import torch

ROWS, HIDDEN_SIZE, INNER_SIZE = 512, 1024, 2816
"""8 pairs of 64 tokens through the feed-forward layer of a model of half a billion parameters."""

FEW_ROWS = 32
HOPELESS = 4
"""So many times slower on few rows, bfloat16 is not tried on all: a CPU without instructions for it took 7.7 s a pass, where float32 took 0.2."""

ROUNDS = 5
ROUNDS_OF_FEW = 2


def measure(request: None) -> dict[str, Any]:
    """In a child: CPU seconds of a forward and a backward pass through two products, the quickest of some, and the faster type.

    Returns:
        ``seconds`` by type, and ``chosen``.
    """
    seconds = _quickest(FEW_ROWS, ROUNDS_OF_FEW)
    full, half = (seconds[name] for name in TRIED)
    if half < HOPELESS * full:
        seconds = _quickest(ROWS, ROUNDS)
        full, half = (seconds[name] for name in TRIED)
    return {"seconds": seconds, "chosen": TRIED[1] if full >= LEAST_SPEEDUP * half else TRIED[0]}


def _quickest(rows: int, rounds: int) -> dict[str, float]:
    """Type -> CPU seconds of its quickest pass."""
    import torch

    layers = {name: _tensors(rows, getattr(torch, name)) for name in TRIED}
    times: dict[str, list[float]] = {name: [] for name in TRIED}
    for _ in range(1 + rounds):
        for name, tensors in layers.items():
            began = time.process_time()
            _pass(*tensors)
            times[name].append(time.process_time() - began)
    return {name: min(samples[1:]) for name, samples in times.items()}  # the first compiles kernels


def _tensors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    torch.manual_seed(0)
    hidden, up, down = (
        torch.randn(*shape, dtype=torch.float32).to(dtype)
        for shape in ((rows, HIDDEN_SIZE), (INNER_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, INNER_SIZE))
    )
    return hidden.requires_grad_(), up, down


def _pass(hidden: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
    import torch.nn.functional as F

    F.linear(F.silu(F.linear(hidden, up)), down).sum().backward()
    hidden.grad = None
