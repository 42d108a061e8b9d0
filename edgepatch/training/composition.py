"""Patches composed of others: their soft prompts one behind the other, evaluated anew as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepatch.converters import weight_sketches
from edgepatch.converters.gguf import specs
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.hf import folders, seeds
from edgepatch.errors import InputError
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.tensors import SoftPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL_PRECISION = frozenset({"F32", "F16", "BF16"})
MIN_PARTS, MAX_PARTS = 2, 64
MAX_LICENSE_LENGTH = 128
METHOD = "composition"


def compose(parts: Sequence[Patch], model: Path, name: str, version: str, **told: Any) -> Patch:
    """A patch whose virtual tokens are those of its parts, in order.

    Keys and values of a later part depend on the earlier ones, and so does what the whole does to the model: the seed and the
    canary are computed anew, nothing that was measured of the parts is taken over, and no signature under a part counts.

    Args:
        parts: two or more, for one base; the same patch may stand there twice.
        model: its full-precision weights: a Transformers folder, or a GGUF file of 16 or 32 bits.
        name: of the new patch.
        version: of the new patch (SemVer).
        **told: further fields of ``Patch``, which take the place of what follows from the parts.

    Returns:
        The patch, unsigned. The same arguments give the same bytes on the same machine.

    Raises:
        InputError: a part has no soft prompt, or all virtual tokens together leave no room in the model's context.
        MismatchError: the parts, or the model, are of different bases; the fields are named.
        PatchFormatError: a field of the new patch breaks the format.
    """
    embeddings = _embeddings(parts)
    parts[0].base.require_same(folders.read_spec(model))
    _require_full_precision(model)
    for part in parts:
        if part.weight_sketch is not None:
            compare(part.weight_sketch, weight_sketches.sketch_of(model, part.weight_sketch), "full precision")
    loaded = folders.load_model(model)
    _require_room(loaded, len(embeddings))
    fields = {**_inherited(parts), "weight_sketch": weight_sketches.sketch_of(model), **told}
    patch = Patch(
        name,
        version,
        parts[0].base,
        SoftPrompt(embeddings),
        training=_record(parts),
        parts=tuple(p.digest for p in parts),
        **fields,
    )
    return seeds.complete(patch, loaded)


def _embeddings(parts: Sequence[Patch]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(P, D) float32 of all parts, which must be for one base."""
    if not MIN_PARTS <= len(parts) <= MAX_PARTS:
        raise InputError(f"parts: expected {MIN_PARTS} to {MAX_PARTS} patches, found {len(parts)}")
    prompts = []
    for part in parts:
        parts[0].base.require_same(part.base)
        if part.soft_prompt is None:
            raise InputError(
                f"{part.name} {part.version} ({part.digest[:12]}): expected a soft prompt, found a trained K/V prefix",
                hint="keys hold the positions that they were trained at, and cannot be put behind others: compose soft prompts",
            )
        prompts.append(part.soft_prompt.embeddings)
    return np.concatenate(prompts)


def _require_full_precision(model: Path) -> None:
    if not model.is_file():
        return
    found = specs.quantization(read_header(model))
    if found not in FULL_PRECISION:
        raise InputError(
            f"{model}: expected full precision ({', '.join(sorted(FULL_PRECISION))}), found {found}",
            hint="seed and canary are what all quantizations are held against: name the base itself",
        )


def _require_room(model: PreTrainedModel, count: int) -> None:
    context = getattr(folders.text_config(model.config), "max_position_embeddings", None)
    if isinstance(context, int) and count >= context:
        raise InputError(
            f"virtual tokens: expected fewer than the model's context of {context}, found {count}",
            hint="compose fewer or shorter patches",
        )


def _record(parts: Sequence[Patch]) -> dict[str, Any]:
    """What stands where a trained patch tells of its training."""
    told = [
        {"name": p.name, "version": p.version, "digest": p.digest, "num_virtual_tokens": p.num_virtual_tokens}
        for p in parts
    ]
    return {"method": METHOD, "parts": told}


def _inherited(parts: Sequence[Patch]) -> dict[str, Any]:
    """Fields that follow from the parts: it expires with the first of them, and all of their licences hold."""
    templates, channels = ({getattr(p, key) for p in parts} for key in ("chat_template", "channel"))
    return {
        "chat_template": templates.pop() if len(templates) == 1 else "",
        "channel": channels.pop() if len(channels) == 1 else "stable",
        "expires": min((p.expires for p in parts if p.expires), default=""),
        "license": _licence_of([p.license for p in parts]),
    }


def _licence_of(licences: Sequence[str]) -> str:
    """SPDX expression; "" where a part does not tell its own."""
    distinct = list(dict.fromkeys(licences))
    if len(distinct) == 1:
        return distinct[0]
    if not all(distinct):
        return ""
    joined = " AND ".join(f"({one})" if " " in one else one for one in distinct)
    return joined if len(joined) <= MAX_LICENSE_LENGTH else ""
