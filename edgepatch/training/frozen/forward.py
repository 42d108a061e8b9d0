"""The frozen models of a training run: rows of token ids, and the logits that are needed of them.

Only the policy is trained, so a step costs what it must: the virtual tokens are evaluated once for all rows, chosen and rejected share
their prompt, logits are computed where an answer is predicted, and no weight of a base gets a gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepatch.converters.hf import caches, rotary
from edgepatch.converters.hf import folders as hf_folders
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.seeds.anchoring import place_in_words
from edgepatch.seeds.rotation import Rotation
from edgepatch.text.messages import Message
from edgepatch.text.tokenizers import FolderTokenizer
from edgepatch.training.config import TrainConfig
from edgepatch.training.frozen import attention, placing
from edgepatch.training.frozen.attention import SharedSeed, sharing
from edgepatch.training.frozen.memory import Memory, Turn
from edgepatch.training.frozen.rows import Batch, Example, attention_mask, make_batch
from edgepatch.training.pairs.preferences import Pair

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BenignText = str | tuple[Message, ...]
"""A text, or a conversation whose last turn is the assistant's."""

KEPT_BYTES = 1 << 28
"""What a bare model's head reads on benign text is kept up to this size, and computed again beyond it."""


def tokenizer_of(model: Path) -> FolderTokenizer:
    """The tokenizer of a Transformers folder or GGUF file."""
    with hf_folders.tokenizer_folder(model) as folder:
        return FolderTokenizer(folder)


class FrozenModels:
    """What a run trains on.

    Args:
        folders: the frozen models, of which each step draws one: the base in full precision, a quantized GGUF file of it whose weights are
            dequantized, or several ("one patch for all quantizations"). The first gives the tokenizer.
        config: hyperparameters; its dtype "auto" is float32 until ``settle``.
        device: "cpu" or "cuda"; the default is a GPU where there is one.
        trusted: read special tokens that texts spell as such; for texts rendered by the caller.

    Attributes:
        config: as given, with what it left open filled in.
        anchoring: where the seed moves; ``None`` leaves it at the start.
        place: a line on where it stands, for people; "" where the configuration says it.

    Raises:
        InputError: a folder cannot be read, or the models are not one model.
        MissingExtraError: torch, transformers or peft is not installed.
    """

    def __init__(
        self, folders: Sequence[Path], config: TrainConfig, device: str | None = None, trusted: bool = False
    ) -> None:
        try:
            import torch
        except ImportError:
            raise MissingExtraError("torch", "train") from None
        if device is not None:
            hf_folders.require_device(device)
        self.config, self.folders, self.trusted = config, list(folders), trusted
        self.spec = hf_folders.read_spec(self.folders[0])
        for folder in self.folders[1:]:
            self.spec.require_same(hf_folders.read_spec(folder))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.num_virtual_tokens, self.place = config.num_virtual_tokens, ""
        self.context = int(hf_folders.read_text_config(self.folders[0], self.spec).max_position_embeddings)
        self._require_room()
        self.tokenizer = tokenizer_of(self.folders[0])
        self.anchoring = placing.asked_anchoring(config, self.tokenizer, self.folders[0])
        dtype = "float32" if config.dtype == "auto" else config.dtype
        self.bases = [hf_folders.load_model(folder, self.device, dtype) for folder in self.folders]
        packable = caches.has_full_attention(self.base) and not config.gradient_checkpointing
        installed = [attention.install(base) for base in self.bases]
        self.packs = packable and all(installed)
        for base in self.bases:
            if config.gradient_checkpointing:
                _checkpoint_activations(base)
        self._settle_place()
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def base(self) -> PreTrainedModel:
        """The first frozen model."""
        return self.bases[0]

    def _require_room(self) -> None:
        config = self.config
        if config.num_virtual_tokens >= self.context:
            raise InputError(
                f"num_virtual_tokens: expected fewer than the model's context of {self.context}, found {config.num_virtual_tokens}",
                hint="50 are usual: they are taken from the context of whoever runs the patch",
            )
        longest = config.num_virtual_tokens + config.longest_row
        if config.front_tokens and longest > self.context:
            raise InputError(
                f"front_tokens: expected at most {self._room()}, found {config.front_tokens}: with "
                f"max_tokens {config.max_tokens} and {config.num_virtual_tokens} virtual tokens they make {longest}, and the model's "
                f"context is {self.context}",
                hint="put shorter texts in front, or train on shorter pairs",
            )

    def _room(self) -> int:
        """Tokens of text in front that the context has room for."""
        return max(0, self.context - self.config.num_virtual_tokens - self.config.max_tokens)

    def _settle_place(self) -> None:
        """Leaves the seed at the start where it cannot move and nobody asked for it; fills in what the configuration leaves open.

        Raises:
            InputError: it was asked for, and cannot be done; before anything is tokenized.
        """
        was_open, reason = None in (self.config.block, self.config.turns), ""
        try:
            _ = self.anchoring and self.rotation
        except InputError as error:
            if self.config.must_move:
                raise
            self.anchoring, reason = None, f"; it cannot move: {error}"
        self.config = placing.settled(self.config, self.anchoring, self._room())
        if was_open:
            self.place = f"the seed {place_in_words(self.anchoring)}{reason}"

    @cached_property
    def rotation(self) -> Rotation:
        """How keys of the model turn: what it takes to train seeds that move, or that stand beside others.

        Raises:
            InputError: they do not turn, or the model's rows cannot be packed.
        """
        import torch

        if not self.packs:
            raise InputError(
                f"{self.spec.model_type}: seeds that move or stand side by side are trained on models with full attention in every layer, "
                "without gradient checkpointing",
                hint="train one patch alone, with block 0 and without turns",
            )
        if self.base.dtype == torch.float32 and self.config.dtype != "4bit":
            return rotary.read_rotation(self.base)
        # Rounded as they are computed, keys prove nothing.
        return rotary.read_rotation(hf_folders.load_model(self.folders[0], self.device))

    def settle(self, dtype: str) -> None:
        """Takes the models, loaded with dtype "auto", to the type that was chosen: "float32" or "bfloat16"."""
        self.config = replace(self.config, dtype=dtype)
        for base in self.bases:
            hf_folders.cast(base, dtype)

    # Rows.

    def encode_prompt(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """Token ids in front of an answer: BOS and text, or a conversation with the opening of the assistant's turn.

        Raises:
            InputError: there is no token.
        """
        if not isinstance(prompt, str):
            return tuple(self.tokenizer.encode_chat(prompt))
        ids = tuple(self.tokenizer.encode(prompt, bos=True, trusted=self.trusted))
        if not ids:
            raise InputError(
                "a prompt is empty and the tokenizer has no BOS: nothing predicts the answer's first token",
                hint="give every pair a prompt",
            )
        return ids

    def pair_example(self, pair: Pair) -> Example:
        """A pair as one packed row: prompt, chosen, rejected.

        Raises:
            InputError: the prompt alone fills the model's context, or an answer has no token.
        """
        prompt = self.encode_prompt(pair.prompt)
        is_cut = bool(self.config.front_tokens)  # to what has room: its start is a text that was put there
        if not is_cut and len(prompt) + self.num_virtual_tokens >= self.context:
            raise InputError(
                f"a prompt has {len(prompt)} tokens: with {self.num_virtual_tokens} virtual tokens the context of "
                f"{self.context} is full: {str(pair.prompt)[:60]!r}...",
                hint="leave the pair out, or cut its prompt",
            )
        answers = tuple(
            tuple(self.tokenizer.encode(text, bos=False, trusted=self.trusted)) for text in (pair.chosen, pair.rejected)
        )
        if not all(answers):
            raise InputError(f"an answer to {str(pair.prompt)[:60]!r} has no token", hint="leave the pair out")
        return Example(prompt, answers).cut(self.config.longest_row)

    def benign_example(self, text: BenignText) -> Example:
        """A benign text as a row whose tokens are all predicted but those of a conversation's earlier turns."""
        if isinstance(text, str):
            ids = self.encode_prompt(text)
            if len(ids) < 2:
                raise InputError(
                    f"benign text {text[:60]!r}: expected two tokens or more, found {len(ids)}", hint="leave it out"
                )
            return Example(ids[:1], (ids[1:],)).cut(self.config.longest_row)
        answer = tuple(self.tokenizer.encode(str(text[-1]["content"]), bos=False))
        return Example(self.encode_prompt(text[:-1]), (answer,)).cut(self.config.longest_row)

    # Forward passes.

    def logits(self, model: Any, batch: Batch, memory: Memory, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """(N, V) at the positions that predict the answers' tokens.

        Args:
            model: evaluates the text.
            batch: packed rows only where the model's attention can be masked by hand, which is where ``memory`` is given or there is none.
            memory: of the virtual tokens, shared by all rows; may be empty.
            embeddings: (P, D) in front of each row instead, for models whose memory cannot be shared (windows, recurrent layers).
        """
        ahead = 0 if embeddings is None else len(embeddings)
        if self.packs:
            inputs = self._packed_inputs(batch, memory)
        else:
            inputs = {**_plain_inputs(model, batch, embeddings), "use_cache": False}
        with sharing(self._shared_seed(batch, memory)), _head_at(model, batch.rows, batch.sources + ahead):
            logits: torch.Tensor = model(**inputs).logits
        return logits

    def _packed_inputs(self, batch: Batch, memory: Memory) -> dict[str, Any]:
        num_virtual = memory[0][0].shape[2] if memory else 0
        return {
            "input_ids": batch.ids,
            "position_ids": batch.positions + num_virtual,
            "attention_mask": attention_mask(batch.segments, self.base.dtype),
            "use_cache": False,
        }

    def _shared_seed(self, batch: Batch, memory: Memory) -> SharedSeed | None:
        if not memory:
            return None
        back = None if batch.anchors is None else Turn(self.rotation, -batch.anchors[:, None])
        return SharedSeed(memory, back)

    def _examples(self, examples: Sequence[Example]) -> Batch:
        rows = examples if self.packs else [row for example in examples for row in example.unpacked()]
        return make_batch(rows, self.device, self.anchoring)

    def log_probabilities(
        self, model: Any, examples: Sequence[Example], memory: Memory, embeddings: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, A): each example's A answers."""
        from edgepatch.training.losses import answer_log_probabilities

        batch = self._examples(examples)
        logits = self.logits(model, batch, memory, embeddings)
        return answer_log_probabilities(logits, batch.targets, batch.owners, batch.num_answers).view(len(examples), -1)

    def logits_of(
        self, examples: Sequence[Example], model: Any, memory: Memory, embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """(N, V) of all answers' tokens, example by example; arguments as ``logits``."""
        return self.logits(model, self._examples(examples), memory, embeddings)

    def predictions(self, examples: Sequence[Example], model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, V) logits of all answers' tokens without virtual tokens, and (N,) each: those tokens, and which answer has them."""
        batch = self._examples(examples)
        return self.logits(model, batch, []), batch.targets, batch.owners

    def bare_logits(self, which: int, key: int, example: Example) -> torch.Tensor:
        """(N, V) of bare model number ``which`` on benign text number ``key``."""
        import torch

        head = self.bases[which].get_output_embeddings()
        with torch.no_grad():
            kept = self._kept.get((which, key))
            if kept is not None:
                logits: torch.Tensor = head(kept)
                return logits
            inputs: list[torch.Tensor] = []
            hook = head.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
            try:
                logits = self.logits_of([example], self.bases[which], [], None)
            finally:
                hook.remove()
            size = sum(t.numel() * t.element_size() for t in self._kept.values())
            # A model that does more to its logits behind the head (caps, scales) is asked again.
            if size < KEPT_BYTES and torch.equal(head(inputs[-1]), logits):
                self._kept[which, key] = inputs[-1]
            return logits


@contextmanager
def _head_at(model: Any, rows: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
    """Lets a model compute logits at these places alone, (N, V) in place of (B, T, V).

    The hidden states reach the head as a matrix: of three dimensions and sliced, they make PyTorch multiply row by row and copy the
    head for it. Whatever a model does to its logits behind the head (caps, scales) stays in place.

    Args:
        model: a causal LM whose head is a module.
        rows, positions: (N,) int64 each.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][rows, positions], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _plain_inputs(model: Any, batch: Batch, embeddings: torch.Tensor | None) -> dict[str, Any]:
    """One answer a row, as every model takes it: the virtual tokens' embeddings, then the text, padded on the right."""
    import torch

    attention = (batch.segments >= 0).long()
    if embeddings is None:
        return {"input_ids": batch.ids, "attention_mask": attention}
    text = model.get_input_embeddings()(batch.ids)
    ahead = embeddings.to(text.dtype)[None].expand(len(batch.ids), -1, -1)
    seen = attention.new_ones(len(batch.ids), len(embeddings))
    return {"inputs_embeds": torch.cat([ahead, text], dim=1), "attention_mask": torch.cat([seen, attention], dim=1)}


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Recomputes the activations of each layer in the backward pass; nothing else of the model leaves evaluation mode."""
    with warnings.catch_warnings():  # the name that Transformers 6 wants is not in 5.0
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
