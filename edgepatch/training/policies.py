"""What is trained: a soft prompt, a K/V prefix, or several of them side by side.

A prefix shows itself as the model's memory of the virtual tokens: keys and values that all rows of a step share, computed once.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.hf import caches
from edgepatch.errors import InputError
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import KVSeed, SoftPrompt
from edgepatch.training.frozen.memory import Memory, side_by_side

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
    """A soft prompt.

    Args:
        start: (P, D) float32.
        device: "cpu" or "cuda".
    """

    def __init__(self, start: SoftPrompt, device: str) -> None:
        import torch

        self._prompt = torch.nn.Parameter(torch.tensor(start.embeddings, device=device))

    @property
    def num_virtual_tokens(self) -> int:
        return len(self._prompt)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self._prompt]

    def embeddings(self) -> torch.Tensor:
        return self._prompt

    def memory(self, base: PreTrainedModel) -> Memory:
        cache = caches.new_cache(base)
        # The decoder alone: no logit is needed, and for one row's PyTorch copies the head.
        base.get_decoder()(inputs_embeds=self._prompt.to(base.dtype)[None], past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def soft_prompt(self) -> SoftPrompt:
        """The soft prompt as it is now."""
        return SoftPrompt(self._prompt.detach().cpu().numpy().copy())


class KVPolicy(Policy):
    """A trained K/V prefix: keys (after RoPE) and values of every layer.

    Args:
        seed: where it starts, usually that of a trained soft prompt.
        device: "cpu" or "cuda".
    """

    def __init__(self, seed: KVSeed, device: str) -> None:
        import torch

        start = _fixed(seed, device)
        self._keys, self._values = ([torch.nn.Parameter(pair[i]) for pair in start] for i in range(2))

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


class SideBySidePolicy(Policy):
    """Patches that will be composed: each is trained beside any of the others, at the places that a composition gives them.

    Each is evaluated alone and turned to end directly in front of the text, so the order means nothing; what a step draws is which of them
    stand there (random subsets, as in MOSAIC, arXiv 2603.16210, without its orders).

    Args:
        segments: soft prompts or K/V prefixes; segment i belongs to task i.
        rotation: of the base.
        company: seeds that stand there too and stay as they are.
        device: "cpu" or "cuda".
    """

    def __init__(
        self, segments: Sequence[Policy], rotation: Rotation, company: Sequence[KVSeed] = (), device: str = "cpu"
    ) -> None:
        self.segments, self._rotation = list(segments), rotation
        self._company = [_fixed(seed, device) for seed in company]
        self._sizes = [s.num_virtual_tokens for s in segments] + [seed.num_virtual_tokens for seed in company]
        self.drawn = list(range(len(self._sizes)))

    @property
    def num_virtual_tokens(self) -> int:
        return sum(self._sizes[i] for i in self.drawn)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for segment in self.segments for parameter in segment.parameters()]

    def prepare(self, rng: random.Random, task: int) -> None:
        """The task's own segment with any number of the others."""
        others = [i for i in range(len(self._sizes)) if i != task]
        self.drawn = sorted([task, *rng.sample(others, rng.randint(0, len(others)))])

    def prepare_whole(self) -> None:
        """All of them."""
        self.drawn = list(range(len(self._sizes)))

    def memory(self, base: PreTrainedModel) -> Memory:
        return side_by_side([self._memory_of(i, base) for i in self.drawn], self._rotation)

    def _memory_of(self, index: int, base: PreTrainedModel) -> Memory:
        if index < len(self.segments):
            return self.segments[index].memory(base)
        fixed = self._company[index - len(self.segments)]
        return [(key.to(base.dtype), value.to(base.dtype)) for key, value in fixed]


def _fixed(seed: KVSeed, device: str) -> Memory:
    """A seed as float32 tensors."""
    import torch

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.tensor(array.astype(np.float32), device=device)[None]

    return [(tensor(key), tensor(value)) for key, value in zip(seed.keys, seed.values, strict=True)]


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
