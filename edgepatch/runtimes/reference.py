"""The PyTorch runtime: full precision, the oracle of every parity test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import weight_sketches
from edgepatch.converters.hf import caches, folders
from edgepatch.decoding.replies import drain
from edgepatch.decoding.sampling import Sampling
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.runtimes.base import (
    Message,
    Prompt,
    Runtime,
    SeedRoute,
    Tools,
    as_float32,
    check_patch,
    require_text_only,
)
from edgepatch.text.tokenizers import FolderTokenizer

MAX_BATCH = 64


class TorchRuntime(Runtime):
    """A Transformers folder in float32, seeded with the patch.

    Args:
        folder: model and tokenizer.
        patch: ``None`` for the bare model.
        device: "cpu" or "cuda".
        num_sequences: conversations held at once.

    Raises:
        InputError: the folder cannot be read.
        MismatchError: the patch was made for another model.
    """

    name = "torch"
    quantization = "F32"

    def __init__(self, folder: Path, patch: Patch | None = None, device: str = "cpu", num_sequences: int = 1) -> None:
        super().__init__(num_sequences)
        self._folder, self.spec = folder, folders.read_spec(folder)
        check_patch(patch, self.spec)
        self._tokenizer = FolderTokenizer(folder)
        self.end_token_ids, self.text_bound = self._tokenizer.end_token_ids, self._tokenizer.bound
        self.model = folders.load_model(folder, device)
        self.num_positions = int(folders.text_config(self.model.config).max_position_embeddings)
        self._caches: list[Any] = [None] * num_sequences
        self._is_croppable = caches.is_attention_only(self.model)
        self._load_patch(patch)

    def _check_weights(self, patch: Patch) -> None:
        if patch.weight_sketch is not None:
            compare(
                patch.weight_sketch,
                weight_sketches.sketch_of_folder(self._folder, patch.weight_sketch),
                self.quantization,
            )

    def _install(self, patch: Patch | None) -> SeedRoute:
        if patch is None:
            self._memory = caches.new_cache(self.model)
        elif patch.soft_prompt is not None:
            # A stored seed is rounded to float16 for shipping; the oracle wants the soft prompt's own float32 seed.
            self._memory = caches.prefill(self.model, patch.soft_prompt)
        else:
            assert patch.kv_seed is not None  # a patch has one of them
            self._memory = caches.seeded_cache(self.model, patch.kv_seed)
        for sequence in range(self.num_sequences):
            self._rewind(sequence, 0)
        if patch is None:
            return ""
        return "decoded" if patch.soft_prompt is not None else "stored"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        return self._tokenizer.encode_chat(messages, tools, self.require_fit)

    def _new_decoder(self) -> Callable[[int], str]:
        return self._tokenizer.new_decoder()

    def _token_bytes(self) -> list[bytes]:
        return self._tokenizer.token_bytes(self.spec.vocab_size)

    def _rewind(self, sequence: int, length: int) -> int:
        if length and self._is_croppable:
            cache = self._caches[sequence]
            cache.crop(self.num_virtual_tokens + length - cache.get_seq_length())  # negative: so many are taken off
            return length
        self._caches[sequence] = copy.deepcopy(self._memory)
        return 0

    def _forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        import torch

        ids = torch.tensor([list(tokens)], device=self.model.device)
        with torch.inference_mode():
            output = self.model(input_ids=ids, past_key_values=self._caches[sequence], logits_to_keep=0 if every else 1)
        return as_float32(output.logits[0].float().cpu().numpy())

    def generate_many(self, prompt: Prompt, sampling: Sampling, count: int) -> list[str]:
        """As the base class, with the continuations evaluated as one batch."""
        require_text_only(sampling)
        if sampling.rng_seed is None:
            return super().generate_many(prompt, sampling, count)
        tokens = self.tokens(prompt)
        logits = self._evaluate(tokens)[-1]
        cache = copy.deepcopy(self._caches[0])
        cache.batch_repeat_interleave(count)
        samplings = [replace(sampling, rng_seed=sampling.rng_seed + i) for i in range(count)]
        return drain(
            [self._new_reply(one, tokens) for one in samplings],
            [logits] * count,
            lambda drawn: self._step(cache, drawn),
        )

    def generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """As the base class, with prompts of equal length evaluated as one batch: they need no padding."""
        require_text_only(sampling)
        texts, tokens = [""] * len(prompts), [self.tokens(prompt) for prompt in prompts]
        if max(map(len, tokens), default=0) > self.context_length:
            return super().generate_batch(prompts, sampling)  # which says so
        for rows in _equal_lengths(tokens):
            cache = copy.deepcopy(self._memory)
            cache.batch_repeat_interleave(len(rows))
            logits = self._step(cache, np.array([tokens[row] for row in rows]))
            replies = [self._new_reply(sampling, tokens[row]) for row in rows]
            found = drain(replies, list(logits), lambda drawn, cache=cache: self._step(cache, drawn))  # type: ignore[misc]
            for row, text in zip(rows, found, strict=True):
                texts[row] = text
        return texts

    def _step(self, cache: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, V) behind (B, T) tokens, which go into the cache."""
        import torch

        with torch.inference_mode():
            output = self.model(
                input_ids=torch.from_numpy(tokens).to(self.model.device), past_key_values=cache, logits_to_keep=1
            )
        return as_float32(output.logits[:, -1].float().cpu().numpy())

    def close(self) -> None:
        del self.model


def _equal_lengths(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the prompts in batches of one length each, at most ``MAX_BATCH``."""
    found: dict[int, list[list[int]]] = {}
    for index, tokens in enumerate(prompts):
        batches = found.setdefault(len(tokens), [[]])
        if len(batches[-1]) == MAX_BATCH:
            batches.append([])
        batches[-1].append(index)
    return [batch for batches in found.values() for batch in batches]
