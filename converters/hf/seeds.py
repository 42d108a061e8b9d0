"""The seed and the canary of a patch, as the forward pass of a Transformers model computes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError
from edgepatch.patch import canary
from edgepatch.patch.file import Patch
from edgepatch.seeds.anchoring import Anchoring, Span
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import Canary, KVSeed, SoftPrompt

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

from edgepatch.converters.hf.caches import (
    is_attention_only,
    masks_behind,
    new_cache,
    prefill,
    replace_keys,
    seeded_cache,
)
from edgepatch.converters.hf.folders import load_model, read_spec, text_config
from edgepatch.converters.hf.rotary import read_rotation


def compute_kv_seed(
    model: PreTrainedModel, soft_prompt: SoftPrompt, dtype: type[np.floating[Any]] = np.float32
) -> KVSeed:
    """Keys and values of the virtual tokens through the model's own forward pass.

    Args:
        model: the full-precision base.
        soft_prompt: (P, D) float32.
        dtype: float32, or float16 for shipping (adds a KL of 1e-7 to 4e-7).

    Returns:
        L keys and values (K, P, H) of ``dtype``; keys after RoPE at positions 0..P-1, rotate-half order.

    Raises:
        InputError: the model has recurrent layers, whose memory is not made of keys and values.
    """
    if not is_attention_only(model):
        raise InputError(
            f"{model.config.model_type} has recurrent layers: a KV seed cannot hold their memory",
            hint="its patches carry the soft prompt alone, which each device evaluates itself",
        )
    layers = [(layer.keys[0], layer.values[0]) for layer in prefill(model, soft_prompt).layers]
    keys, values = (tuple(t.float().cpu().numpy().astype(dtype) for t in kind) for kind in zip(*layers, strict=True))
    return KVSeed(keys, values)


def compute_canary(
    model: PreTrainedModel,
    soft_prompt: SoftPrompt | None,
    seed: KVSeed | None = None,
    rotation: Rotation | None = None,
    anchoring: Anchoring | None = None,
    without_part: Mapping[str, KVSeed] = MappingProxyType({}),
    texts: Sequence[tuple[int, ...]] = (),
) -> Canary:
    """The full-precision model's answer to the canary's prompts, without and with the patch.

    Args:
        model: the full-precision base.
        soft_prompt: the patch's; where it has none, its seed is used.
        seed: a trained K/V prefix.
        rotation: of the model's keys, where the seed moves.
        anchoring: where the seed stands; ``None`` leaves it at the start.
        without_part: of a composed patch, name of each part -> the seed of the other parts side by side: as all stand directly in front of
            the text, these are as far from it as in the whole.
        texts: as for ``canary.make_canary``.

    Raises:
        InputError: a part cannot be proven.
    """
    if soft_prompt is None:
        assert seed is not None  # a patch has one of them
        memory = seeded_cache(model, seed)
    else:
        memory = prefill(model, soft_prompt)
    vocab_size = int(text_config(model.config).vocab_size)

    def behind(cache: DynamicCache) -> canary.Logits:
        return lambda tokens: logits_behind(model, copy.deepcopy(cache), tokens, rotation, anchoring)

    return canary.make_canary(
        vocab_size,
        lambda tokens: logits_behind(model, new_cache(model), tokens),
        behind(memory),
        anchoring,
        {name: behind(seeded_cache(model, others)) for name, others in without_part.items()},
        texts,
    )


def logits_behind(
    model: PreTrainedModel,
    cache: DynamicCache,
    tokens: Sequence[int],
    rotation: Rotation | None = None,
    anchoring: Anchoring | None = None,
) -> NDArray[np.float32]:
    """(V,) logits after a text.

    Args:
        model: the full-precision base.
        cache: holds nothing or a seed at the start; it takes the text in.
        tokens: T ids.
        rotation: of the model's keys, where the seed moves.
        anchoring: where the seed stands.
    """
    import torch

    num_virtual = cache.get_seq_length()
    at_start = [layer.keys[0].float().cpu().numpy() for layer in cache.layers] if anchoring else []
    spans = list(anchoring.spans(tokens)) if anchoring else [Span(0, len(tokens), 0)]
    for start, end, anchor in spans:
        masks: dict[str, Any] = {}
        if anchor:
            assert rotation is not None  # a patch with an anchoring has one
            replace_keys(cache, [rotation.turned(key, layer, anchor) for layer, key in enumerate(at_start)])
            masks = {"attention_mask": masks_behind(model, num_virtual, anchor, start, end - start)}
        with torch.inference_mode():
            ids = torch.tensor([list(tokens[start:end])], device=model.device)
            output = model(input_ids=ids, past_key_values=cache, **masks)
    logits: NDArray[np.float32] = output.logits[0, -1].float().cpu().numpy()
    return logits


def complete(
    patch: Patch,
    model: PreTrainedModel,
    tell: Callable[[str], None] = lambda line: None,
    without_part: Mapping[str, KVSeed] = MappingProxyType({}),
    texts: Sequence[tuple[int, ...]] = (),
) -> Patch:
    """The patch with what its full-precision model can tell: a float16 seed of its soft prompt, how its keys turn, and a canary.

    Args:
        patch: of this model; what it says of these is replaced, and signatures, which are of another content, are left out.
        model: in float32.
        tell: takes a line that says why the seed cannot move, where keys of the model do not turn.
        without_part, texts: as for ``compute_canary``.

    Raises:
        InputError: its seed shall move, and keys of this model do not turn.
    """
    seed = patch.kv_seed
    if patch.soft_prompt is not None and is_attention_only(model):
        seed = compute_kv_seed(model, patch.soft_prompt, np.float16)
    rotation = _rotation_of(patch, model, tell)
    measured = compute_canary(model, patch.soft_prompt, seed, rotation, patch.anchoring, without_part, texts)
    return replace(patch, kv_seed=seed, rotation=rotation, canary=measured, signatures=())


def _rotation_of(patch: Patch, model: PreTrainedModel, tell: Callable[[str], None]) -> Rotation | None:
    """``None`` where keys of the model do not turn and the seed stays."""
    try:
        return read_rotation(model)
    except InputError as error:
        if patch.anchoring is not None:
            raise
        tell(f"the seed cannot be moved or put beside another: {error}")
        return None


def with_kv_seed(patch: Patch, folder: Path, tell: Callable[[str], None] = lambda line: None) -> Patch:
    """The patch with a float16 seed, the rotation of its keys and a canary, from the full-precision model in ``folder``.

    A patch that has a trained K/V prefix instead of a soft prompt keeps it. Arguments as in ``complete``.

    Raises:
        InputError: the folder cannot be read.
        MismatchError: the patch was made for another model.
    """
    patch.base.require_same(read_spec(folder))
    return complete(patch, load_model(folder), tell)
