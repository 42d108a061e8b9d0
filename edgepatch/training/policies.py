"""What is trained: a soft prompt, several in random order, or a K/V prefix.

A prefix shows itself as the model's memory of the virtual tokens: keys and values that all rows of a step share, computed once.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepatch.converters.hf import caches
from edgepatch.errors import InputError
from edgepatch.tensors import KVSeed, SoftPrompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Memory = list["tuple[torch.Tensor, torch.Tensor]"]
"""L keys and values, (1, K, P, H) each."""


class Policy(ABC):
    """Something trainable on a frozen base model."""

    @property
    def num_virtual_tokens(self) -> int:
        """Positions in front of the text, as of the last ``prepare``."""
        return 0

    @abstractmethod
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer moves, in float32."""

    def prepare(self, rng: random.Random, task: int) -> None:  # noqa: B027  only what samples its form needs it
        """Draws the form of the next step.

        Args:
            rng: the step's own.
            task: which of the trained tasks the step reads.
        """

    def prepare_whole(self) -> None:  # noqa: B027
        """Takes the form that is delivered."""

    def embeddings(self) -> torch.Tensor | None:
        """(P, D) float32 in front of the text, or ``None`` where the policy has no embeddings."""
        return None

    def memory(self, base: PreTrainedModel) -> Memory:
        """Keys and values of the virtual tokens under a base model, with a graph to the parameters; empty without any."""
        return []

    def model(self, base: PreTrainedModel) -> Any:
        """What evaluates the text."""
        return base

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters."""
        return {str(i): p.detach().clone() for i, p in enumerate(self.parameters())}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of ``state``."""
        import torch

        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(state[str(i)])


class SoftPromptPolicy(Policy):
    """One soft prompt, or segments of a composition that come in random order (MOSAIC, arXiv 2603.16210).

    Args:
        segments: (P_i, D) float32 each; segment i belongs to task i.
        device: "cpu" or "cuda".
    """

    def __init__(self, segments: Sequence[SoftPrompt], device: str) -> None:
        import torch

        self._segments = [torch.nn.Parameter(torch.tensor(s.embeddings, device=device)) for s in segments]
        self.order = list(range(len(segments)))

    @property
    def num_virtual_tokens(self) -> int:
        return sum(len(self._segments[i]) for i in self.order)

    def parameters(self) -> list[torch.nn.Parameter]:
        return self._segments

    def prepare(self, rng: random.Random, task: int) -> None:
        """The task's own segment with any number of the others, in any order, so that every subset and order is trained for."""
        others = [i for i in range(len(self._segments)) if i != task]
        chosen = [task, *rng.sample(others, rng.randint(0, len(others)))]
        self.order = rng.sample(chosen, len(chosen))

    def prepare_whole(self) -> None:
        """All segments in the order of the tasks."""
        self.order = list(range(len(self._segments)))

    def embeddings(self) -> torch.Tensor:
        import torch

        return torch.cat([self._segments[i] for i in self.order])

    def memory(self, base: PreTrainedModel) -> Memory:
        cache = caches.new_cache(base)
        base(
            inputs_embeds=self.embeddings().to(base.dtype)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return [(layer.keys, layer.values) for layer in cache.layers]

    def soft_prompts(self) -> list[SoftPrompt]:
        """The segments as they are now."""
        return [SoftPrompt(s.detach().cpu().numpy().copy()) for s in self._segments]


class KVPolicy(Policy):
    """A trained K/V prefix: keys (after RoPE) and values of every layer.

    Args:
        seed: where it starts, usually that of a trained soft prompt.
        device: "cpu" or "cuda".
    """

    def __init__(self, seed: KVSeed, device: str) -> None:
        import torch

        def parameters(tensors: Sequence[Any]) -> list[torch.nn.Parameter]:
            return [torch.nn.Parameter(torch.tensor(t.astype(np.float32), device=device)[None]) for t in tensors]

        self._keys, self._values = parameters(seed.keys), parameters(seed.values)

    @property
    def num_virtual_tokens(self) -> int:
        return int(self._keys[0].shape[2])

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self._keys, *self._values]

    def memory(self, base: PreTrainedModel) -> Memory:
        return [(k.to(base.dtype), v.to(base.dtype)) for k, v in zip(self._keys, self._values, strict=True)]

    def kv_seed(self) -> KVSeed:
        """The prefix as it is now, in float16 for shipping.

        Raises:
            InputError: a value is too large for float16.
        """
        keys, values = (tuple(p.detach()[0].cpu().numpy() for p in kind) for kind in (self._keys, self._values))
        largest = max(float(np.abs(t).max()) for t in (*keys, *values))
        if largest > np.finfo(np.float16).max:
            raise InputError(
                f"the trained prefix has a value of {largest:.3g}, which float16 cannot hold",
                hint="lower the learning rate",
            )
        return KVSeed(tuple(k.astype(np.float16) for k in keys), tuple(v.astype(np.float16) for v in values))


def initial_soft_prompt(base: PreTrainedModel, token_ids: Sequence[int], num_virtual_tokens: int) -> SoftPrompt:
    """The embeddings of a written instruction, repeated or cut to P rows (Lester et al. 2021; PEFT's TEXT initialisation).

    Raises:
        InputError: the text has no token.
    """
    if not token_ids:
        raise InputError(
            "init_text: expected a text with at least one token, found none", hint="give an instruction, or init random"
        )
    repeated = (list(token_ids) * (num_virtual_tokens // len(token_ids) + 1))[:num_virtual_tokens]
    return _embedded(base, repeated)


def random_soft_prompt(base: PreTrainedModel, num_virtual_tokens: int, rng_seed: int) -> SoftPrompt:
    """The embeddings of random tokens of the vocabulary (PEFT's SAMPLE_VOCAB): noise of unit variance is ten times too loud."""
    import torch

    generator = torch.Generator().manual_seed(rng_seed)
    rows = base.get_input_embeddings().weight.shape[0]
    return _embedded(base, torch.randint(rows, (num_virtual_tokens,), generator=generator).tolist())


def _embedded(base: PreTrainedModel, token_ids: Sequence[int]) -> SoftPrompt:
    import torch

    ids = torch.tensor(list(token_ids), device=base.device)
    with torch.no_grad():
        return SoftPrompt(base.get_input_embeddings()(ids).float().cpu().numpy())
