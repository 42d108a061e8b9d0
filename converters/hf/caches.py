"""A Transformers model's memory of a text that a seed stands in front of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.hf.folders import text_config
from edgepatch.tensors import KVSeed, SoftPrompt

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def is_attention_only(model: PreTrainedModel) -> bool:
    """Whether every layer remembers by keys and values alone, so that a seed can hold all of its memory."""
    return set(getattr(text_config(model.config), "layer_types", None) or ()) <= ATTENTION_LAYERS


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer sees all that stands before a token: no sliding window, no recurrent layer."""
    config = text_config(model.config)
    layers = getattr(config, "layer_types", None)
    if layers:
        return set(layers) == {"full_attention"}
    return not getattr(config, "sliding_window", None)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that forgets nothing.

    Transformers' own choice for a model with sliding windows drops what lies behind the window, so that it could not be cut
    back; recurrent layers need the configured kind.
    """
    from transformers import DynamicCache

    return DynamicCache() if is_attention_only(model) else DynamicCache(config=model.config)


def prefill(model: PreTrainedModel, soft_prompt: SoftPrompt) -> DynamicCache:
    """The model's memory of the virtual tokens."""
    import torch

    cache = new_cache(model)
    embeddings = torch.tensor(soft_prompt.embeddings, device=model.device)[None]  # (1, P, D)
    with torch.inference_mode():
        model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return cache


def seeded_cache(model: PreTrainedModel, seed: KVSeed) -> DynamicCache:
    """A cache that holds a seed, in float32."""
    import torch

    cache = new_cache(model)
    for layer, (key, value) in enumerate(zip(seed.keys, seed.values, strict=True)):
        tensors = [torch.tensor(t.astype(np.float32), device=model.device)[None] for t in (key, value)]
        cache.update(*tensors, layer)  # (1, K, P, H)
    return cache


def replace_keys(cache: DynamicCache, keys: Sequence[NDArray[np.float32]]) -> None:
    """Puts a seed's keys, turned to another place, in place of those in a cache.

    Args:
        cache: of one row, which begins with the seed.
        keys: L arrays (K, P, H).
    """
    import torch

    for layer, key in zip(cache.layers, keys, strict=True):
        turned = torch.from_numpy(key).to(layer.keys.device, layer.keys.dtype)[None]
        layer.keys = torch.cat([turned, layer.keys[:, :, turned.shape[2] :]], dim=2)


def masks_behind(model: PreTrainedModel, num_virtual: int, anchor: int, held: int, length: int) -> Any:
    """Attention masks under which layers with a sliding window see a seed at its place, and not where its cells stand in the cache.

    Args:
        model: attention only.
        num_virtual: P.
        anchor: text position that the seed stands in front of.
        held: tokens of text in the cache.
        length: T, tokens to be evaluated.

    Returns:
        What the model takes as ``attention_mask``: additive (1, 1, T, P + held + T) masks by kind of layer, or one where all are
        of one kind; ``None`` where no layer has a window.
    """
    import torch

    config = text_config(model.config)
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
    if "sliding_attention" not in kinds or not window:
        return None
    queries = num_virtual + torch.arange(held, held + length)[:, None]
    keys = torch.cat([torch.arange(num_virtual) + anchor, num_virtual + torch.arange(held + length)])[None]
    is_seed = torch.arange(num_virtual + held + length)[None] < num_virtual
    seen = {"full_attention": is_seed | (keys <= queries)}
    seen["sliding_attention"] = seen["full_attention"] & (queries - keys < window)
    masks = {
        kind: torch.zeros(seen[kind].shape, dtype=model.dtype).masked_fill_(~seen[kind], torch.finfo(model.dtype).min)
        for kind in kinds
    }
    masks = {kind: mask[None, None].to(model.device) for kind, mask in masks.items()}
    return masks if hasattr(config, "layer_types") and len(kinds) > 1 else masks["sliding_attention"]
