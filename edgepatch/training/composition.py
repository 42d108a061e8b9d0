"""Patches side by side as one: the vendor's side, where the full-precision model proves what was composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepatch.converters import weight_sketches
from edgepatch.converters.gguf import specs
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.hf import folders, rotary, seeds
from edgepatch.errors import InputError
from edgepatch.patch.composition import METHOD, composed_anchoring, composed_seed, in_order, trained_alone
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.prompts.genders import own_training_prompts
from edgepatch.prompts.sets import evenly, load_prompts
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import KVSeed
from edgepatch.training.frozen.forward import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgepatch.text.tokenizers import FolderTokenizer

FULL_PRECISION = frozenset({"F32", "F16", "BF16"})
MAX_LICENSE_LENGTH = 128
NUM_TEXTS = 16
"""Prompts of each domain that may prove a part, where tokens by chance do not."""


def compose(parts: Sequence[Patch], model: Path, name: str, version: str, **details: Any) -> Patch:
    """A patch whose seed holds those of its parts side by side, each as it is alone, all ending directly in front of the text.

    No part sees another, so their order changes nothing: the parts are sorted by digest. What the whole does to a model is not the sum of
    what they do, for they share its attention: the canary is measured anew and proves each part, nothing that was evaluated of the parts is
    taken over, and no signature under a part counts.

    Args:
        parts: 2 to 12 of different names, for one base, in any order; soft prompts or K/V prefixes.
        model: its full-precision weights: a Transformers folder, or a GGUF file of 16 or 32 bits.
        name: of the new patch.
        version: of the new patch (SemVer).
        **details: further fields of ``Patch``, which take the place of what follows from the parts.

    Returns:
        The patch, unsigned. The same arguments, the parts in any order, give the same bytes on the same machine.

    Raises:
        InputError: wrong parts, or one that does next to nothing beside the others; all virtual tokens together leave no room in the model's context, or keys of the base do not turn.
        MismatchError: the parts, or the model, are of different bases; the fields are named.
        PatchFormatError: a field of the new patch breaks the format.
    """
    parts = in_order(parts)
    parts[0].base.require_same(folders.read_spec(model))
    _require_full_precision(model)
    for part in parts:
        if part.weight_sketch is not None:
            compare(part.weight_sketch, weight_sketches.sketch_of(model, part.weight_sketch), "full precision")
    loaded = folders.load_model(model)
    rotation = _rotation(loaded)
    context = int(folders.text_config(loaded.config).max_position_embeddings)
    require_room(sum(part.num_virtual_tokens for part in parts), context)
    seeded = [_with_seed(part, loaded) for part in parts]
    fields = {**_inherited(parts), "weight_sketch": weight_sketches.sketch_of(model), **details}
    patch = Patch(
        name,
        version,
        parts[0].base,
        None,
        composed_seed(seeded, rotation),
        training=_record(parts),
        parts=tuple(p.digest for p in parts),
        rotation=rotation,
        anchoring=composed_anchoring(parts),
        **fields,
    )
    without_part = {part.name: _seed_without(part, seeded, rotation) for part in seeded}
    return seeds.complete(
        patch, loaded, without_part=without_part, texts=_texts(model, context - patch.num_virtual_tokens)
    )


def _texts(model: Path, room: int) -> list[tuple[int, ...]]:
    """Token ids of prompts of every domain: a patch that was trained for one acts there, and next to nowhere else."""
    tokenizer = tokenizer_of(model)
    toxic, harmful = (evenly(load_prompts(kind, "train"), NUM_TEXTS) for kind in ("toxic", "harm_requests"))
    plain = [*toxic, *evenly(own_training_prompts(), NUM_TEXTS)]
    texts = [*map(tokenizer.encode, plain), *(_asked(tokenizer, request) for request in harmful)]
    return [tuple(tokens) for tokens in texts if 0 < len(tokens) < room]


def _asked(tokenizer: FolderTokenizer, request: str) -> list[int]:
    """A request as users make it, where the model has a chat template that takes it."""
    try:
        return tokenizer.encode_chat([{"role": "user", "content": request}])
    except InputError:
        return tokenizer.encode(request)


def _seed_without(part: Patch, parts: Sequence[Patch], rotation: Rotation) -> KVSeed:
    return composed_seed([other for other in parts if other is not part], rotation)


def _with_seed(part: Patch, model: PreTrainedModel) -> Patch:
    """The part with its seed, computed where it has a soft prompt alone."""
    if part.soft_prompt is None or part.kv_seed is not None:
        return part
    return replace(part, kv_seed=seeds.compute_kv_seed(model, part.soft_prompt, np.float16))


def _rotation(model: PreTrainedModel) -> Rotation:
    try:
        return rotary.read_rotation(model)
    except InputError as error:
        raise InputError(
            f"patches of this base cannot stand side by side: {error}",
            hint="train one patch on the pairs of all of them",
        ) from None


def require_room(num_virtual_tokens: int, context: int) -> None:
    """Refuses a composition that leaves no room for text.

    Args:
        num_virtual_tokens: of all parts together.
        context: of the model, in tokens.

    Raises:
        InputError: it does not.
    """
    if num_virtual_tokens >= context:
        raise InputError(
            f"virtual tokens: expected fewer than the model's context of {context}, found {num_virtual_tokens}",
            hint="compose fewer or shorter patches",
        )


def _require_full_precision(model: Path) -> None:
    if not model.is_file():
        return
    quantization = specs.quantization(read_header(model))
    if quantization not in FULL_PRECISION:
        raise InputError(
            f"{model}: expected full precision ({', '.join(sorted(FULL_PRECISION))}), found {quantization}",
            hint="seed and canary are what all quantizations are held against: name the base itself. Where this file is all there is: "
            f"edgepatch convert base {model.name} FOLDER --to transformers",
        )


def _record(parts: Sequence[Patch]) -> dict[str, Any]:
    """What stands where a trained patch tells of its training."""
    records = [
        {"name": p.name, "version": p.version, "digest": p.digest, "num_virtual_tokens": p.num_virtual_tokens}
        for p in parts
    ]
    alone = trained_alone(parts)
    return {"method": METHOD, "parts": records, **({"trained_alone": alone} if alone else {})}


def _inherited(parts: Sequence[Patch]) -> dict[str, Any]:
    """Fields that follow from the parts: it expires with the first of them, and all of their licences hold."""
    templates, channels, probes = (
        {getattr(p, key) for p in parts} for key in ("chat_template", "channel", "tokenizer_probe")
    )
    return {
        "tokenizer_probe": probes.pop() if len(probes) == 1 else None,
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
