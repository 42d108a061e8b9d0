"""Patches side by side as one: each part computed alone, all ending directly in front of the text.

Whoever composes, a vendor or a device, gets the same seed: parts are sorted by digest, so their order on a command line or in a store
changes not a bit. Attention is a softmax over all cells, so no part sees another, and none shields another; they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepatch.errors import InputError, MismatchError
from edgepatch.patch.file import Patch
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation, side_by_side
from edgepatch.tensors import KVSeed

MIN_PARTS, MAX_PARTS = 2, 12
METHOD = "side by side"
ALONE = ("soft_prompt", "kv_prefix")
"""Kinds of training, in a patch's record, of one patch. With a company it learns beside others."""

ROUNDING = 1e-6
"""Relative difference of two frequencies that are one: ten steps of float32."""


def in_order(parts: Sequence[Patch]) -> list[Patch]:
    """The parts as they stand in a composition.

    Raises:
        InputError: fewer than two, too many, two of one name, or one that another part holds already.
        MismatchError: they are for different bases; the fields are named.
    """
    if not MIN_PARTS <= len(parts) <= MAX_PARTS:
        raise InputError(
            f"parts: expected {MIN_PARTS} to {MAX_PARTS} patches, found {len(parts)}",
            hint="every part takes room in the context: name fewer, or one that was trained for several ends",
        )
    for part in parts:
        try:
            parts[0].base.require_same(part.base)
        except MismatchError as error:
            error.hint = f"{_title(parts[0])} and {_title(part)} are for different bases: parts must be for one model"
            raise
    names = [part.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"parts: expected patches of different names, found {twice} twice",
            hint="two versions of one patch do not add up: name one of them",
        )
    contained = [digest for part in parts for digest in {part.digest, *part.parts}]
    again = next((part for part in parts if any(contained.count(d) > 1 for d in {part.digest, *part.parts})), None)
    if again is not None:
        raise InputError(
            f"parts: expected each patch once, found what {_title(again)} holds in another part as well",
            hint="a composed patch acts with all of its parts: name either it or them",
        )
    return sorted(parts, key=lambda part: part.digest)


def trained_alone(parts: Sequence[Patch]) -> list[str]:
    """Names of the patches whose training knew no other patch and that stand beside others, as far as records say; sorted.

    The attention of a position is shared by all cells, so what such a part does alone says little of what it does beside others: of
    SmolLM2's three patches, trained one by one, the one against harm has no measurable effect left (docs/results/safety.md).
    """
    return sorted(name for part in parts for name in _alone_in(part, has_company=len(parts) > 1))


def _alone_in(part: Patch, has_company: bool) -> list[str]:
    """Names of what a part is made of and that learned alone; none of a composition that was itself measured."""
    record = part.training
    if record.get("method") == METHOD:
        names: Any = record.get("trained_alone")
        is_known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return names if is_known and not part.evaluation else []
    return [part.name] if has_company and record.get("kind") in ALONE and not record.get("company") else []


def trained_alone_in_words(names: Sequence[str]) -> str:
    """What it means that patches of these names stand beside others."""
    return (
        f"trained alone, not for company: {', '.join(names)}; side by side each may keep little of its gain: measure them together "
        "(edgepatch bench safety MODEL --patch A --patch B), or get patches that were trained for it (edgepatch train-together)"
    )


def composed_seed(parts: Sequence[Patch], rotation: Rotation | None = None) -> KVSeed:
    """The seed of patches side by side.

    Args:
        parts: as ``in_order`` gives them.
        rotation: of their base, where a part does not say it itself.

    Returns:
        L keys and values (K, sum P_i, H), float16.

    Raises:
        InputError: a part has no seed, or nobody says how keys of the base turn.
    """
    seeds = []
    for part in parts:
        rotation = rotation or part.rotation
        if part.kv_seed is None:
            raise InputError(
                f"{_title(part)}: expected a KV seed, found a soft prompt alone",
                hint="add the seed first: edgepatch convert seed",
            )
        seeds.append(part.kv_seed)
    if rotation is None:
        raise InputError(
            f"{parts[0].name} {parts[0].version}: its seed cannot be moved beside another's: it does not say how keys of its base turn",
            hint="add that first, where keys of the base do turn: edgepatch convert seed",
        )
    together = side_by_side(seeds, rotation)
    keys, values = (tuple(t.astype(np.float16) for t in kind) for kind in (together.keys, together.values))
    return KVSeed(keys, values)


def composed_anchoring(parts: Sequence[Patch]) -> Anchoring | None:
    """Where a composition stands: at every anchor of a part, so that none is outrun; ``None`` where all stay at the start."""
    rules = [part.anchoring for part in parts if part.anchoring is not None]
    if not rules:
        return None
    blocks = [rule.block for rule in rules if rule.block]
    turn_tokens = sorted({token for rule in rules for token in rule.turn_tokens})
    return Anchoring(min(blocks, default=0), tuple(turn_tokens))


def compose_on_device(parts: Sequence[Patch]) -> Patch:
    """What a device runs where several patches are active: unsigned, and without a canary, for each part is proven by its own.

    Args:
        parts: verified patches of one base.

    Raises:
        InputError: they cannot stand side by side.
        MismatchError: they are for different bases.
    """
    parts = in_order(parts)
    rotation = _common_rotation(parts)
    return Patch(
        ".".join(sorted(part.name for part in parts))[:64].rstrip("."),
        "1.0.0",
        parts[0].base,
        None,
        composed_seed(parts, rotation),
        training={"method": METHOD},
        parts=tuple(part.digest for part in parts),
        rotation=rotation,
        anchoring=composed_anchoring(parts),
    )


def _common_rotation(parts: Sequence[Patch]) -> Rotation:
    """How keys of the base turn, as every part says: none is moved by the word of another's vendor alone."""
    rotations = [part.rotation for part in parts]
    for part, rotation in zip(parts, rotations, strict=True):
        if rotation is None:
            raise InputError(
                f"{_title(part)}: its seed cannot be moved beside another's: it does not say how keys of its base turn",
                hint="get a release from its vendor that says so (edgepatch convert seed adds it, where keys of the base do turn)",
            )
        assert rotations[0] is not None  # it was the first to be looked at
        if not _is_same(rotations[0], rotation):
            raise InputError(
                f"{_title(parts[0])} and {_title(part)}: expected that both say alike how keys of their base turn, found that they do not",
                hint="one of them was made by faulty software: ask their vendors",
            )
    assert rotations[0] is not None  # in_order: there are two or more
    return rotations[0]


def _is_same(first: Rotation, second: Rotation) -> bool:
    """Whether two rotations are one but for rounding on different machines."""
    if (first.layers, first.neighbours) != (second.layers, second.neighbours):
        return False
    pairs = list(zip(first.tables, second.tables, strict=True))
    return all(len(a) == len(b) and np.allclose(a, b, rtol=ROUNDING, atol=0.0) for a, b in pairs)


def _title(part: Patch) -> str:
    return f"{part.name} {part.version} ({part.digest[:12]})"
