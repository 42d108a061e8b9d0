"""The PyTorch runtime: full precision, the oracle of every parity test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import weight_sketches
from edgepatch.converters.hf import caches, folders
from edgepatch.decoding import defaults
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.runtimes.runtime import Evaluate, Runtime, SeedRoute, Tools, check_patch, checked_number, moves
from edgepatch.tensors import as_float32
from edgepatch.text.messages import Message
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions
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
        self.chat_template, self.special_tokens = self._tokenizer.template, self._tokenizer.special_tokens
        self.sampling_defaults = defaults.of_folder(folder)
        self.model = folders.load_model(folder, device)
        self.num_positions = int(folders.text_config(self.model.config).max_position_embeddings)
        self._caches: list[Any] = [None] * num_sequences
        self._anchors = [0] * num_sequences
        self.is_cuttable = caches.is_attention_only(self.model)

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
            self._memory = caches.new_cache(self.model)
        elif patch.soft_prompt is not None:
            # A stored seed is rounded to float16 for shipping; the oracle wants the soft prompt's own float32 seed.
            self._memory = caches.prefill(self.model, patch.soft_prompt)
        else:
            assert patch.kv_seed is not None  # a patch has one of them
            self._memory = caches.seeded_cache(self.model, patch.kv_seed)
        self._at_start = [layer.keys[0].float().cpu().numpy() for layer in self._memory.layers] if moves(patch) else []
        # The rows of a batch share one mask, and layers with a window need one for each place of the seed.
        self.max_batch_rows = MAX_BATCH_ROWS if not moves(patch) or caches.has_full_attention(self.model) else 0
        for sequence in range(self.num_sequences):
            self.rewind(sequence, 0)
        if patch is None:
            return ""
        return "decoded" if patch.soft_prompt is not None else "stored"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_probe(self, text: str, *, trusted: bool) -> list[int]:
        return self._tokenizer.encode(text, trusted=trusted)

    def encode_chat(
        self, messages: Sequence[Message], tools: Tools | None = None, options: ChatOptions = PLAIN_CHAT
    ) -> list[int]:
        return self._tokenizer.encode_chat(messages, tools, self.require_fit, options, self.chat_template)

    def new_decoder(self) -> Callable[[int], str]:
        return self._tokenizer.new_decoder()

    def token_bytes(self) -> list[bytes]:
        return self._tokenizer.token_bytes(self.spec.vocab_size)

    def rewind(self, sequence: int, length: int) -> int:
        if length and self.is_cuttable:
            cache = self._caches[sequence]
            cache.crop(self.num_virtual_tokens + length - cache.get_seq_length())  # negative: so many are taken off
            return length
        self._caches[sequence], self._anchors[sequence] = copy.deepcopy(self._memory), 0
        return 0

    def place_seed(self, sequences: Sequence[int], anchors: Sequence[int]) -> None:
        for sequence, anchor in zip(sequences, anchors, strict=True):
            if self._anchors[sequence] != anchor:
                caches.replace_keys(self._caches[sequence], self._keys_at(anchor))
                self._anchors[sequence] = anchor

    def _keys_at(self, anchor: int) -> list[NDArray[np.float32]]:
        """L keys (K, P, H) of the seed in front of text position ``anchor``."""
        assert self.patch is not None and self.patch.rotation is not None  # the session moves such patches alone
        return [self.patch.rotation.turned(key, layer, anchor) for layer, key in enumerate(self._at_start)]

    def forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        import torch

        cache, anchor = self._caches[sequence], self._anchors[sequence]
        ids, options = torch.tensor([list(tokens)], device=self.model.device), {}
        if anchor:
            held = cache.get_seq_length() - self.num_virtual_tokens
            masks = caches.masks_behind(self.model, self.num_virtual_tokens, anchor, held, len(tokens))
            options = {"attention_mask": masks}
        with torch.inference_mode():
            output = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=0 if every else 1, **options)
        return as_float32(output.logits[0].float().cpu().numpy())

    def open_batch(
        self, prompts: Sequence[list[int]], length: int, evaluate: Evaluate
    ) -> tuple[TorchBatch, list[NDArray[np.float32]]]:
        """Prompts of one length need no padding; one that all rows share is evaluated once."""
        if all(tokens == prompts[0] for tokens in prompts):
            logits = evaluate(prompts[0])
            batch = TorchBatch(self.model, [self._caches[0]] * len(prompts), self._keys_at)
            return batch, [logits] * len(prompts)
        if moves(self.patch):  # each row's seed stands elsewhere
            rows = []
            for tokens in prompts:
                rows.append((evaluate(tokens), copy.deepcopy(self._caches[0])))
            return TorchBatch(self.model, [cache for _, cache in rows], self._keys_at), [logits for logits, _ in rows]
        batch = TorchBatch(self.model, [self._memory] * len(prompts), self._keys_at)
        return batch, list(batch.forward(np.array(prompts)))

    def save_state(self, sequence: int) -> Any:
        return copy.deepcopy((self._caches[sequence], self._anchors[sequence]))

    def restore_state(self, sequence: int, state: Any) -> None:
        self._caches[sequence], self._anchors[sequence] = copy.deepcopy(state)

    def close(self) -> None:
        vars(self).pop("model", None)


class TorchBatch:
    """Rows of one length.

    Args:
        model: in float32.
        memories: B caches of one row, which are copied.
        keys_at: L keys (K, P, H) of the seed in front of a text position.
    """

    def __init__(
        self, model: Any, memories: Sequence[Any], keys_at: Callable[[int], list[NDArray[np.float32]]]
    ) -> None:
        self.num_rows, self._model, self._keys_at = len(memories), model, keys_at
        self._cache = copy.deepcopy(memories[0])
        self._cache.batch_repeat_interleave(self.num_rows)
        if any(memory is not memories[0] for memory in memories):
            import torch

            for i, layer in enumerate(self._cache.layers):
                layer.keys = torch.cat([memory.layers[i].keys for memory in memories])
                layer.values = torch.cat([memory.layers[i].values for memory in memories])

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, V) behind (B, T) tokens, which go into the cache."""
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(tokens).to(self._model.device)
            output = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=1)
        return as_float32(output.logits[:, -1].float().cpu().numpy())

    def place_seed(self, row: int, anchor: int) -> None:
        """As a runtime's, in one row."""
        import torch

        for layer, key in zip(self._cache.layers, self._keys_at(anchor), strict=True):
            keys = layer.keys.clone()
            keys[row, :, : key.shape[1]] = torch.from_numpy(key).to(keys.device, keys.dtype)
            layer.keys = keys
