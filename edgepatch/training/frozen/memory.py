"""The model's memory of virtual tokens, to be copied, turned and put beside others with a graph to what is trained.

The arithmetic is that of ``edgepatch.seeds.rotation``, which moves the seeds that are delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgepatch.seeds.rotation import Rotation, halves

if TYPE_CHECKING:
    import torch

Memory = list["tuple[torch.Tensor, torch.Tensor]"]
"""L keys and values, (1, K, P, H) each."""


class Turn:
    """A turn of keys or queries by some positions, with a graph to them; the arithmetic of ``Rotation.turned``.

    Args:
        rotation: of the model.
        shifts: int64 positions, of a shape that broadcasts against that of what is turned, but for its last dimension.
    """

    def __init__(self, rotation: Rotation, shifts: torch.Tensor) -> None:
        self._rotation, self._shifts = rotation, shifts
        self._known: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, tensors: torch.Tensor, layer: int) -> torch.Tensor:
        """(..., H) of a layer, turned."""
        import torch

        table = self._rotation.layers[layer]
        if table is None:
            return tensors
        cos, sin = self._cos_sin(table, tensors.dtype)
        count, neighbours = cos.shape[-1], self._rotation.neighbours
        first_half, second_half = halves(count, neighbours)
        first, second = tensors[..., first_half], tensors[..., second_half]
        parts = [first * cos - second * sin, second * cos + first * sin]
        if neighbours:
            parts = [torch.stack(parts, dim=-1).flatten(-2)]
        return torch.cat([*parts, tensors[..., 2 * count :]], dim=-1)

    def _cos_sin(self, table: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., R/2) each; layers of one table share them."""
        import torch

        if (table, dtype) not in self._known:
            frequencies = torch.tensor(self._rotation.tables[table], dtype=torch.float64, device=self._shifts.device)
            angles = self._shifts[..., None].double() * frequencies
            self._known[table, dtype] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._known[table, dtype]


def side_by_side(memories: Sequence[Memory], rotation: Rotation) -> Memory:
    """Memories that were computed apart as one, each ending directly in front of the text, as a composed patch's seed.

    Args:
        memories: of P_i virtual tokens each, at positions 0 .. P_i - 1.
        rotation: of the model.

    Returns:
        L keys and values (1, K, sum P_i, H).
    """
    import torch

    total = sum(memory[0][0].shape[2] for memory in memories)

    def in_place(keys: torch.Tensor, layer: int) -> torch.Tensor:
        return Turn(rotation, torch.tensor(total - keys.shape[2], device=keys.device))(keys, layer)

    return [
        (torch.cat([in_place(keys, layer) for keys, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2))
        for layer, parts in enumerate(zip(*memories, strict=True))
    ]
