"""Whether a model fits into this machine's memory: an estimate from its header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgepatch.inspection.facts import ModelFacts


@dataclass(frozen=True)
class MemoryNeed:
    """What a model needs, by estimate: buffers for computing come on top.

    Attributes:
        weight_bytes: of the weights.
        positions: that the cache has room for when nobody says.
        cache_bytes: type of the cache -> its bytes; the first is the default.
        context_bytes: the same for all positions that the model was trained for.
        available_bytes: that this machine can give now; ``None`` where the system does not say.
    """

    weight_bytes: int
    positions: int
    cache_bytes: Mapping[str, int]
    context_bytes: Mapping[str, int]
    available_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Of weights and cache, as by default."""
        return self.weight_bytes + next(iter(self.cache_bytes.values()), 0)

    @property
    def fits(self) -> bool | None:
        """Whether that is available; ``None`` where nobody knows."""
        return None if self.available_bytes is None else self.total_bytes <= self.available_bytes


def memory_need(model: ModelFacts, available_bytes: int | None) -> MemoryNeed:
    """What a model needs on a machine with so much memory left."""
    cache = model.cache
    if cache is None:
        return MemoryNeed(model.weight_bytes, 0, {}, {}, available_bytes)
    whole = model.shape.context_length or cache.default_positions
    return MemoryNeed(
        weight_bytes=model.weight_bytes,
        positions=cache.default_positions,
        cache_bytes={kind: cache.num_bytes(kind, cache.default_positions) for kind in cache.bytes_per_value},
        context_bytes={kind: cache.num_bytes(kind, whole) for kind in cache.bytes_per_value},
        available_bytes=available_bytes,
    )
