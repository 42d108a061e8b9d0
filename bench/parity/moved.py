"""What Transformers says of a seed that moves: one forward pass over all copies of it, each seen by the tokens of its span alone.

Nothing of it is the product's: the model itself evaluates the virtual tokens at each place, and the masks are written here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.hf import caches
from edgepatch.converters.hf.folders import text_config
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.tensors import SoftPrompt

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

BLOCK = 20
"""The measured text is of more than three blocks."""

TURN_AT = 30
"""The token there opens a turn, wherever it stands."""


def anchoring_of(tokens: list[int]) -> Anchoring:
    """Blocks and turns, both of which occur in the text."""
    return Anchoring(BLOCK, (tokens[TURN_AT],))


def moved_logits(
    model: PreTrainedModel, soft_prompt: SoftPrompt, anchoring: Anchoring, tokens: list[int]
) -> NDArray[np.float32]:
    """(T, V) logits behind a soft prompt that stands directly in front of each span of the text.

    Args:
        model: attention only.
        soft_prompt: (P, D).
        anchoring: where the spans begin.
        tokens: T ids.
    """
    import torch

    anchors = [anchoring.anchors(tokens)[i] for i in range(len(tokens))]
    places = sorted(set(anchors))
    count = soft_prompt.num_virtual_tokens
    cache = _copies(model, soft_prompt, places)
    positions = count + torch.arange(len(tokens))
    cells = torch.cat([*(torch.arange(count) + place for place in places), positions])
    seen = torch.ones(len(tokens), len(cells), dtype=torch.bool).tril(len(cells) - len(tokens))
    for i, place in enumerate(places):
        seen[:, i * count : (i + 1) * count] = torch.tensor(anchors)[:, None] == place
    window = getattr(text_config(model.config), "sliding_window", None)
    kinds = {"full_attention": seen}
    if window:
        kinds["sliding_attention"] = seen & (positions[:, None] - cells < window)
    masks = {kind: _additive(mask) for kind, mask in kinds.items()}
    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([tokens]),
            position_ids=positions[None],
            past_key_values=cache,
            attention_mask=masks if window else masks["full_attention"],
        )
    logits: NDArray[np.float32] = output.logits[0].numpy()
    return logits


def _copies(model: PreTrainedModel, soft_prompt: SoftPrompt, places: list[int]) -> DynamicCache:
    """The model's own memory of the soft prompt at every place, one behind the other."""
    import torch

    memory = caches.new_cache(model)
    for place in places:
        cache, positions = caches.new_cache(model), torch.arange(soft_prompt.num_virtual_tokens)[None] + place
        with torch.inference_mode():
            model(
                inputs_embeds=torch.from_numpy(soft_prompt.embeddings)[None],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        for layer, copy in enumerate(cache.layers):
            memory.update(copy.keys, copy.values, layer)
    return memory


def _additive(seen: Any) -> Any:
    """(1, 1, T, N) float32 of (T, N) bool."""
    import torch

    return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[None, None]
