"""A Transformers model's rotary embedding, read from the model and proven on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.hf import caches
from edgepatch.converters.hf.folders import text_config
from edgepatch.errors import InputError
from edgepatch.seeds.rotation import BY_LENGTH, Rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROTATES_NEIGHBOURS = frozenset({"cohere", "cohere2", "glm", "glm4", "ernie4_5", "llama4_text"})
"""Kinds of models whose code in Transformers turns neighbouring dimensions together; a wrong entry is refused, not believed."""

NUM_TOKENS, SHIFT = 3, 97
TOLERANCE = 1e-4
"""Largest relative error of a turned key against one that the model computes at the new place; float32 gives 1e-6."""


def read_rotation(model: PreTrainedModel) -> Rotation:
    """How the model's keys turn, layer by layer.

    The model itself is asked: some tokens are evaluated at two places, and each layer takes that of the model's tables of frequencies,
    or none, by which the keys at one become those at the other.

    Args:
        model: in float32.

    Raises:
        InputError: keys of this model cannot be turned; why.
    """
    kind = model.config.model_type
    if not caches.is_attention_only(model):
        raise InputError(
            f"{kind} has recurrent layers: their memory has no place, so its seeds cannot move",
            hint="leave the patch at the start of the text",
        )
    _require_fixed_frequencies(model)
    tables = _tables(model)
    near, far = (_keys_at(model, first) for first in (0, SHIFT))
    neighbours = model.config.model_type in ROTATES_NEIGHBOURS
    layers = [_table_of(tables, neighbours, *pair) for pair in zip(near, far, strict=True)]
    if None in layers:
        raise InputError(
            f"{kind}: layer {layers.index(None)}: keys of one place do not turn into those of another",
            hint="positions are not rotary here: leave the patch at the start of the text",
        )
    used = list(dict.fromkeys(i for i in layers if i is not None and i >= 0))
    numbers = tuple(used.index(i) if i in used else None for i in layers)
    return Rotation(tuple(tables[i] for i in used), numbers, neighbours and bool(used))


def _require_fixed_frequencies(model: PreTrainedModel) -> None:
    settings = getattr(text_config(model.config), "rope_parameters", None) or {}
    groups = [settings, *(group for group in settings.values() if isinstance(group, dict))]
    by_length = next((g["rope_type"] for g in groups if g.get("rope_type") in BY_LENGTH), None)
    if by_length:
        raise InputError(
            f"{model.config.model_type}: its frequencies depend on the length of the text ({by_length}), so its seeds cannot move",
            hint="leave the patch at the start of the text",
        )


def _tables(model: PreTrainedModel) -> list[tuple[float, ...]]:
    """The model's different sets of frequencies, as the shortest decimals of their float32."""
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and "vision" not in name and "visual" not in name
    }
    return list(dict.fromkeys(tuple(float(str(f)) for f in b.float().cpu().numpy()) for b in buffers.values()))


def _keys_at(model: PreTrainedModel, first: int) -> list[NDArray[np.float32]]:
    """L keys (K, T, H) of the same tokens from position ``first`` on."""
    import torch

    vocab_size = int(text_config(model.config).vocab_size)
    ids = torch.tensor([[(i * vocab_size) // (NUM_TOKENS + 1) for i in range(1, NUM_TOKENS + 1)]], device=model.device)
    positions = torch.arange(first, first + NUM_TOKENS, device=model.device)[None]
    cache = caches.new_cache(model)
    with torch.inference_mode():
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys[0].float().cpu().numpy() for layer in cache.layers]


def _table_of(
    tables: list[tuple[float, ...]], neighbours: bool, near: NDArray[np.float32], far: NDArray[np.float32]
) -> int | None:
    """Number of the table by which ``near`` turns into ``far``; -1 where nothing turns, ``None`` where nothing fits."""
    length = max(float(np.linalg.norm(far)), 1e-12)
    if np.linalg.norm(far - near) / length < TOLERANCE:
        return -1
    errors = [
        float(np.linalg.norm(Rotation((table,), (0,), neighbours).turned(near, 0, SHIFT) - far)) / length
        if 2 * len(table) <= near.shape[-1]
        else np.inf
        for table in tables
    ]
    best = int(np.argmin(errors)) if errors else -1
    return best if errors and errors[best] < TOLERANCE else None
