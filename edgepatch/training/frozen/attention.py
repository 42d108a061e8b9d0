"""Attention of packed rows that share a seed: what training puts in place of a model's own.

A seed that moves is not copied for every place where it stands. A key turned by an anchor and a query are as far apart as the key at
the start and the query turned back, so each token asks the one seed with its query turned back by its own anchor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepatch.training.frozen.memory import Memory, Turn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "edgepatch_packed"
TOLERANCE = 1e-3
"""Of logits, relative to the largest, between this attention and the model's own, in float32."""

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class SharedSeed:
    """The seed that all rows of a forward pass see.

    Attributes:
        memory: L keys and values (1, K, P, H).
        back: turns (B, Q, T, H) queries back by each token's anchor; ``None`` where the seed stays at the start.
    """

    memory: Memory
    back: Turn | None = None


_SEED: ContextVar[SharedSeed | None] = ContextVar("seed", default=None)


@contextmanager
def sharing(seed: SharedSeed | None) -> Iterator[None]:
    """Lets the model's attention see a seed in front of every row, at positions that the rows' own leave free."""
    token = _SEED.set(seed)
    try:
        yield
    finally:
        _SEED.reset(token)


def install(model: PreTrainedModel) -> bool:
    """Gives a model this attention where it computes what the model's own does; else leaves it with "eager".

    Models that put more into attention (caps, sinks, biases) differ or raise in a trial of a few tokens.

    Returns:
        Whether the model has it.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    ids = torch.arange(TRIAL_TOKENS, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    mask = torch.full((1, 1, TRIAL_TOKENS, TRIAL_TOKENS), torch.finfo(model.dtype).min, dtype=model.dtype)
    mask = mask.triu(1).to(model.device)
    answers = []
    try:
        for name in (NAME, "eager"):
            model.set_attn_implementation(name)
            if model.config._attn_implementation != name:
                return False
            with torch.no_grad():
                answers.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float())
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        model.set_attn_implementation("eager")
        return False
    allowed = TOLERANCE if model.dtype == torch.float32 else 30 * TOLERANCE
    if not float((answers[0] - answers[1]).abs().max()) <= allowed * float(answers[1].abs().max()):
        return False
    model.set_attn_implementation(NAME)
    return True


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' interface of an attention function.

    Args:
        module: the layer's attention.
        query: (B, Q, T, H); Q is a multiple of K.
        key, value: (B, K, T, H).
        attention_mask: (B, 1, T, T) additive.
        scaling: of the scores.
        dropout: not used: a frozen model has none.
        extra: what a model wants beyond; refused, so that the trial notices.

    Returns:
        ((B, T, Q, H), no weights).
    """
    import torch

    unknown = [
        name
        for name in ("softcap", "s_aux", "sliding_window", "position_bias", "head_mask")
        if extra.get(name) is not None
    ]
    if unknown:
        raise NotImplementedError(f"packed attention has no {unknown[0]}")
    rows, heads, length, size = query.shape
    groups, kv_heads = heads // key.shape[1], key.shape[1]
    scaled = query * (size**-0.5 if scaling is None else scaling)
    scores = torch.matmul(scaled.reshape(rows, kv_heads, groups * length, size), key.transpose(2, 3))
    scores = scores.view(rows, kv_heads, groups, length, length).add_(attention_mask[:, :, None])
    seed = _SEED.get()
    if seed is not None:
        seed_key, seed_value = seed.memory[module.layer_idx]
        scores = torch.cat([_seed_scores(scaled, seed_key, seed, module.layer_idx), scores], dim=-1)
        value = torch.cat([seed_value.expand(rows, -1, -1, -1), value], dim=2)
    weights = torch.softmax(scores, dim=-1).view(rows, kv_heads, groups * length, -1)
    attended = torch.matmul(weights, value).view(rows, heads, length, -1)
    return attended.transpose(1, 2).contiguous(), None


def _seed_scores(scaled: torch.Tensor, key: torch.Tensor, seed: SharedSeed, layer: int) -> torch.Tensor:
    """(B, K, Q / K, T, P) scores of the seed's cells: one product a head for all rows."""
    import torch

    rows, heads, length, size = scaled.shape
    kv_heads, cells = key.shape[1], key.shape[2]
    if seed.back is not None:
        scaled = seed.back(scaled, layer)
    by_head = scaled.reshape(rows, kv_heads, -1, size).transpose(0, 1).reshape(kv_heads, -1, size)
    scores = torch.bmm(by_head, key[0].transpose(1, 2))
    return scores.view(kv_heads, rows, heads // kv_heads, length, cells).transpose(0, 1)
