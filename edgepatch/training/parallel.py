"""Several processes that train one policy, each on its share of every batch, as `accelerate launch` or `torchrun` start them.

Only the policy's few parameters are exchanged; each process holds the frozen models whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Value = TypeVar("Value")


def world() -> tuple[int, int]:
    """(rank, number of processes), joining the others on the first call."""
    import torch.distributed as dist

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    if not dist.is_initialized():
        import torch

        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), size


def local_device() -> str:
    """The GPU of this process, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def from_first(decide: Callable[[], Value]) -> Value:
    """What the first process decides, in all of them; the others wait for it."""
    rank, size = world()
    if size == 1:
        return decide()
    import torch.distributed as dist

    decided = [decide() if rank == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    return cast(Value, decided[0])


def share(items: Sequence[Item]) -> list[Item]:
    """This process's part of a batch."""
    rank, size = world()
    return list(items[rank::size])


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Sums tensors over all processes, in place."""
    import torch.distributed as dist

    if world()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def summed(value: float, device: str) -> float:
    """The sum of every process's value, in all of them."""
    if world()[1] == 1:
        return value
    import torch

    total = torch.tensor([value], device=device)
    add_up([total])
    return float(total)
