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


def copied(tensors: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """(B, K, C * P, H): C copies for each row of (1, K, P, H)."""
    return tensors.repeat(1, 1, anchors.shape[1], 1).expand(len(anchors), -1, -1, -1)


def turned_copies(keys: torch.Tensor, rotation: Rotation, layer: int, anchors: torch.Tensor) -> torch.Tensor:
    """Copies of keys, each turned by its anchor, with a graph to the keys; the arithmetic of ``Rotation.turned``.

    Args:
        keys: (1, K, P, H).
        rotation: of the model.
        layer: of the model.
        anchors: (B, C) int64.

    Returns:
        (B, K, C * P, H).
    """
    import torch

    table = rotation.layers[layer]
    if table is None:
        return copied(keys, anchors)
    frequencies = torch.tensor(rotation.tables[table], dtype=torch.float64, device=keys.device)
    angles = (anchors[..., None].double() * frequencies)[:, None, :, None]  # (B, 1, C, 1, R/2)
    cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
    first_half, second_half = halves(len(frequencies), rotation.neighbours)
    copies = keys[:, :, None]  # (1, K, 1, P, H)
    first, second = copies[..., first_half], copies[..., second_half]
    turned = torch.stack(
        [first * cos - second * sin, second * cos + first * sin], dim=-1 if rotation.neighbours else -2
    )
    turned = turned.flatten(-2)
    rest = copies[..., 2 * len(frequencies) :].expand(*turned.shape[:-1], -1)
    return torch.cat([turned, rest], dim=-1).flatten(2, 3)


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
        shift = torch.tensor([[total - keys.shape[2]]], device=keys.device)
        return turned_copies(keys, rotation, layer, shift)

    return [
        (torch.cat([in_place(keys, layer) for keys, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2))
        for layer, parts in enumerate(zip(*memories, strict=True))
    ]
