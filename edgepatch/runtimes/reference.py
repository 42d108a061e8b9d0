"""The PyTorch runtime: full precision, the oracle of every parity test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import hf
from edgepatch.patches import Patch
from edgepatch.runtimes.base import Message, Prompt, Runtime, as_float32, check_patch
from edgepatch.sampling import Sampling
from edgepatch.tokenizers import FolderTokenizer


class TorchRuntime(Runtime):
    """A Transformers folder in float32, seeded with the patch.

    Args:
        folder: model and tokenizer.
        patch: ``None`` for the bare model.
        device: "cpu" or "cuda".

    Raises:
        InputError: the folder cannot be read.
        MismatchError: the patch was made for another model.
    """

    name = "torch"
    quantization = "F32"

    def __init__(self, folder: Path, patch: Patch | None = None, device: str = "cpu") -> None:
        super().__init__()
        self.spec = hf.read_spec(folder)
        check_patch(patch, self.spec)
        self.patch = patch
        self._tokenizer = FolderTokenizer(folder)
        self.end_token_ids = self._tokenizer.end_token_ids
        self.model = hf.load_model(folder, device)
        self._cache: Any = None
        self._seed = None
        if patch is not None:
            # A stored seed is rounded to float16 for shipping; the oracle wants the soft prompt's own float32 seed.
            self._seed = hf.compute_kv_seed(self.model, patch.soft_prompt) if patch.soft_prompt else patch.kv_seed
        self._num_virtual_tokens = patch.num_virtual_tokens if patch else 0
        self.context_length = int(self.model.config.max_position_embeddings) - self._num_virtual_tokens
        self._rewind(0)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode_chat(messages)

    def _new_decoder(self) -> Callable[[int], str]:
        return self._tokenizer.new_decoder()

    def _rewind(self, length: int) -> int:
        import torch
        from transformers import DynamicCache

        if length:
            self._cache.crop(self._num_virtual_tokens + length - self._cache.get_seq_length())
            return length
        self._cache = DynamicCache()
        if self._seed is not None:
            for layer, (key, value) in enumerate(zip(self._seed.keys, self._seed.values, strict=True)):
                tensors = [torch.from_numpy(t.astype(np.float32))[None].to(self.model.device) for t in (key, value)]
                self._cache.update(*tensors, layer)  # (1, K, P, H)
        return 0

    def _forward(self, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        import torch

        ids = torch.tensor([list(tokens)], device=self.model.device)
        with torch.inference_mode():
            output = self.model(input_ids=ids, past_key_values=self._cache, logits_to_keep=0 if every else 1)
        return as_float32(output.logits[0].float().cpu().numpy())

    def generate_many(self, prompt: Prompt, sampling: Sampling, count: int) -> list[str]:
        """As the base class, with the continuations evaluated as one batch."""
        import torch

        if sampling.rng_seed is None:
            return super().generate_many(prompt, sampling, count)
        tokens = self.tokens(prompt)
        logits = self._evaluate(tokens)[-1]
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(count)

        def step(drawn: NDArray[np.int64]) -> NDArray[np.float32]:
            with torch.inference_mode():
                ids = torch.from_numpy(drawn).to(self.model.device)
                return as_float32(self.model(input_ids=ids, past_key_values=cache).logits[:, -1].float().cpu().numpy())

        room = min(sampling.max_new_tokens, self.context_length - len(tokens) + 1)
        return self._continue_rows(logits, range(sampling.rng_seed, sampling.rng_seed + count), sampling, room, step)

    def close(self) -> None:
        del self.model
