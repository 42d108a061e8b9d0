"""The PyTorch runtime: full precision, the oracle of every parity test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import weight_sketches
from edgepatch.converters.hf import folders, seeds
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.runtimes.runtime import Evaluate, Runtime, SeedRoute, Tools, check_patch, checked_number
from edgepatch.tensors import as_float32
from edgepatch.text.messages import Message
from edgepatch.text.tokenizers import FolderTokenizer

MAX_BATCH_ROWS = 64


class TorchRuntime(Runtime):
    """A Transformers folder in float32.

    Args:
        folder: model and tokenizer.
        planned: the patch that is installed next; where it does not fit the model, the weights are not even read.
        device: "cpu" or "cuda".
        num_sequences: conversations held at once.

    Raises:
        InputError: the folder cannot be read.
        MismatchError: the patch was made for another model.
    """

    name = "torch"
    quantization = "F32"
    max_batch_rows = MAX_BATCH_ROWS

    def __init__(self, folder: Path, planned: Patch | None = None, device: str = "cpu", num_sequences: int = 1) -> None:
        self.num_sequences = checked_number(num_sequences)
        self._folder, self.spec = folder, folders.read_spec(folder)
        check_patch(planned, self.spec)
        self._tokenizer = FolderTokenizer(folder)
        self.end_token_ids, self.text_bound = self._tokenizer.end_token_ids, self._tokenizer.bound
        self.model = folders.load_model(folder, device)
        self.num_positions = int(folders.text_config(self.model.config).max_position_embeddings)
        self._caches: list[Any] = [None] * num_sequences
        self.is_cuttable = seeds.is_attention_only(self.model)

    def check_weights(self, patch: Patch) -> None:
        if patch.weight_sketch is not None:
            compare(
                patch.weight_sketch,
                weight_sketches.sketch_of_folder(self._folder, patch.weight_sketch),
                self.quantization,
            )

    def install(self, patch: Patch | None) -> SeedRoute:
        self.patch = patch
        if patch is None:
            self._memory = seeds.new_cache(self.model)
        elif patch.soft_prompt is not None:
            # A stored seed is rounded to float16 for shipping; the oracle wants the soft prompt's own float32 seed.
            self._memory = seeds.prefill(self.model, patch.soft_prompt)
        else:
            assert patch.kv_seed is not None  # a patch has one of them
            self._memory = seeds.seeded_cache(self.model, patch.kv_seed)
        for sequence in range(self.num_sequences):
            self.rewind(sequence, 0)
        if patch is None:
            return ""
        return "decoded" if patch.soft_prompt is not None else "stored"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        return self._tokenizer.encode_chat(messages, tools, self.require_fit)

    def new_decoder(self) -> Callable[[int], str]:
        return self._tokenizer.new_decoder()

    def token_bytes(self) -> list[bytes]:
        return self._tokenizer.token_bytes(self.spec.vocab_size)

    def rewind(self, sequence: int, length: int) -> int:
        if length and self.is_cuttable:
            cache = self._caches[sequence]
            cache.crop(self.num_virtual_tokens + length - cache.get_seq_length())  # negative: so many are taken off
            return length
        self._caches[sequence] = copy.deepcopy(self._memory)
        return 0

    def forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        import torch

        ids = torch.tensor([list(tokens)], device=self.model.device)
        with torch.inference_mode():
            output = self.model(input_ids=ids, past_key_values=self._caches[sequence], logits_to_keep=0 if every else 1)
        return as_float32(output.logits[0].float().cpu().numpy())

    def open_batch(
        self, prompts: Sequence[list[int]], length: int, evaluate: Evaluate
    ) -> tuple[TorchBatch, list[NDArray[np.float32]]]:
        """Prompts of one length need no padding; one that all rows share is evaluated once."""
        if all(tokens == prompts[0] for tokens in prompts):
            logits = evaluate(prompts[0])
            batch = TorchBatch(self.model, self._caches[0], len(prompts))
            return batch, [logits] * len(prompts)
        batch = TorchBatch(self.model, self._memory, len(prompts))
        return batch, list(batch.forward(np.array(prompts)))

    def save_state(self, sequence: int) -> Any:
        return copy.deepcopy(self._caches[sequence])

    def restore_state(self, sequence: int, state: Any) -> None:
        self._caches[sequence] = copy.deepcopy(state)

    def close(self) -> None:
        vars(self).pop("model", None)


class TorchBatch:
    """Rows that start from one memory and have one length.

    Args:
        model: in float32.
        memory: a cache of one row, which is copied.
        num_rows: B.
    """

    def __init__(self, model: Any, memory: Any, num_rows: int) -> None:
        self.num_rows, self._model = num_rows, model
        self._cache = copy.deepcopy(memory)
        self._cache.batch_repeat_interleave(num_rows)

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, V) behind (B, T) tokens, which go into the cache."""
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(tokens).to(self._model.device)
            output = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1)
        return as_float32(output.logits[:, -1].float().cpu().numpy())
