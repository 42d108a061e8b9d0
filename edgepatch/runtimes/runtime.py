"""What a backend gives: text to tokens, a seed in front of every sequence, and logits behind it.

A runtime keeps P positions for the patch. Everything a caller sends lies behind them: ``rewind`` and ``forward`` count positions
from the end of the seed, so no request can name or evict it. It keeps no books: what a sequence holds, where its seed stands,
whether a patch works and how a reply is drawn is the session's part (``runtimes.session``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.defaults import SamplingDefaults
from edgepatch.decoding.replies import Batch
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.tensors import ModelSpec
from edgepatch.text.limits import TextBound
from edgepatch.text.messages import Message
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions, ChatTemplate

Tools = Sequence[Mapping[str, Any]]
SeedRoute = Literal["", "stored", "decoded"]
Evaluate = Callable[[Sequence[int]], NDArray[np.float32]]
"""Token ids -> (V,) logits behind them, evaluated in the first sequence; what that holds already is reused."""

MAX_SEQUENCES = 64


class ProofMemory(Protocol):
    """Remembers on this device which patches have passed their whole canary under the present settings."""

    def has_proved(self, patch_digest: str) -> bool:
        """Whether a patch has."""

    def keep_proof(self, patch_digest: str) -> None:
        """Remembers that it has."""


class Runtime(Protocol):
    """A loaded model.

    Attributes:
        name: "torch", "llamacpp" or "onnx".
        quantization: "F32", "F16", "Q8_0", "Q4_K_M", "Q4_0", "int8", "int4", ...
        spec: the model.
        patch: whose seed is in front of every sequence, or ``None``.
        num_positions: of a sequence, the patch's own included.
        num_sequences: conversations held at once, each behind the same seed.
        end_token_ids: the tokens that end a reply.
        special_tokens: name -> id of each token that has no text of its own.
        chat_template: how conversations are written.
        text_bound: how many bytes of text its tokens can stand for.
        sampling_defaults: how its makers want it sampled, or how we do where they say nothing.
        kv_type: of the cache.
        notes: what is slower or turned off because a library died of it on this machine, why, and what mends it.
        num_threads: of a forward pass on the CPU; ``None`` where the library decides.
        is_cuttable: whether a sequence can be cut back; recurrent memory goes on from its end or starts afresh.
        is_forkable: whether ``fork`` lets a sequence hold what another has evaluated.
        max_batch_rows: of ``open_batch``; 0 where a batch is nothing but several sequences.
        has_ragged_batches: whether the prompts of a batch may differ in length.
        proofs: of patches; ``None`` where each load asks the whole canary.

    One thread at a time drives a runtime. ``encode`` and ``encode_chat`` need the vocabulary alone: any thread may call them meanwhile.
    """

    name: str
    quantization: str
    spec: ModelSpec
    patch: Patch | None = None
    num_positions: int
    num_sequences: int
    end_token_ids: frozenset[int]
    special_tokens: Mapping[str, int]
    chat_template: ChatTemplate
    text_bound: TextBound = TextBound()
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    kv_type: str = "f32"
    notes: tuple[str, ...] = ()
    num_threads: int | None = None
    is_cuttable: bool = True
    is_forkable: bool = False
    max_batch_rows: int = 0
    has_ragged_batches: bool = False
    proofs: ProofMemory | None = None

    # Text.

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with BOS where the model wants one."""

    def encode_probe(self, text: str, *, trusted: bool) -> list[int]:
        """As ``encode``; special tokens that a ``trusted`` text spells are read as such."""

    def encode_chat(
        self, messages: Sequence[Message], tools: Tools | None = None, options: ChatOptions = PLAIN_CHAT
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, with the opening of the assistant's turn.

        Special tokens that a message spells are text. ``tools`` are objects in OpenAI's form.
        """

    def new_decoder(self) -> Callable[[int], str]:
        """A function that takes one token after the other and returns the text that each completes."""

    def token_bytes(self) -> list[bytes]:
        """The bytes of each token in order of its id; none for special tokens.

        Raises:
            InputError: the model's tokens have no bytes of their own.
        """

    # The seed.

    def check_weights(self, patch: Patch) -> None:
        """Compares the patch's sketch of its base with the model's own weights.

        Raises:
            MismatchError: they are not those of its base, whatever their quantization.
        """

    def install(self, patch: Patch | None) -> SeedRoute:
        """Puts a patch that fits the model, or none, in place of the present one; every sequence starts afresh.

        Returns:
            How the seed got into the cache: "stored" in the patch, "decoded" from the soft prompt by this very model, or "" for
            the bare model.

        Raises:
            InputError: the patch cannot be used with this runtime's settings.
            InactivePatchError: the seed was not taken.
        """

    def place_seed(self, sequences: Sequence[int], anchors: Sequence[int]) -> None:
        """Puts the seed directly in front of a token of the text, for all that is evaluated next; the text's cells stay as they are.

        Args:
            sequences: each of which holds at least as many tokens as its anchor.
            anchors: text positions, one a sequence; after ``rewind`` to 0 it is 0, after a shorter one it must be told again.

        Raises:
            InactivePatchError: the seed was not taken there.
        """

    # Evaluation.

    def rewind(self, sequence: int, length: int) -> int:
        """Forgets all but the first ``length`` positions behind the seed; 0 starts afresh from the seed.

        Returns:
            How many positions are kept: ``length``, or 0 where the model's memory cannot be cut there (then it was
            started afresh from the seed).
        """

    def forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        """Evaluates tokens behind those already evaluated in a sequence.

        Returns:
            (T, V) float32 logits of all tokens when ``every``, else (1, V) of the last.
        """

    def forward_rows(self, sequences: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Evaluates one token behind each of B different sequences; a runtime that can evaluates them as one batch.

        Returns:
            (B, V) float32 logits.
        """
        rows = [self.forward(s, [token], every=False) for s, token in zip(sequences, tokens, strict=True)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def fork(self, source: int, target: int, length: int) -> bool:
        """Lets a sequence hold the first ``length`` positions behind the seed that another, or itself, holds.

        Returns:
            Whether it does; if not, it must be rewound to 0 before its next use.
        """
        return source == target and self.rewind(source, length) == length

    def open_batch(
        self, prompts: Sequence[list[int]], length: int, evaluate: Evaluate
    ) -> tuple[Batch, list[NDArray[np.float32]]]:
        """Evaluates prompts behind the seed as the rows of one batch, apart from all sequences.

        Args:
            prompts: at most ``max_batch_rows``, of one length unless ``has_ragged_batches``.
            length: positions behind the seed that a row may come to hold.
            evaluate: for prompts that must be evaluated one by one; it uses the first sequence.

        Returns:
            The batch, and (V,) float32 logits behind each prompt.
        """
        raise EdgepatchError(f"{self.name} evaluates batches in its sequences")  # max_batch_rows is 0

    def save_state(self, sequence: int) -> Any:
        """What a sequence's memory holds, the seed included, for ``restore_state`` of this very object."""

    def restore_state(self, sequence: int, state: Any) -> None:
        """Puts a state back that was saved behind the present seed; other sequences must be rewound to 0 before their next use."""

    def close(self) -> None:
        """Frees the model."""

    # What follows from the above.

    @property
    def num_virtual_tokens(self) -> int:
        """P of the installed patch; 0 for the bare model."""
        return self.patch.num_virtual_tokens if self.patch else 0

    @property
    def context_length(self) -> int:
        """Positions that a prompt and its continuation may fill: the patch's own are taken off."""
        return self.num_positions - self.num_virtual_tokens

    @property
    def chat_template_digest(self) -> str:
        """SHA-256 of the chat template; "" where there is none."""
        return self.chat_template.digest

    def require_fit(self, text: str) -> None:
        """Refuses a text by its size, before it is tokenized.

        Raises:
            TooLongError: no text of so many bytes fits into the context.
            InputError: it holds halves of characters.
        """
        self.text_bound.require_fit(text, self.context_length)


def moves(patch: Patch | None) -> bool:
    """Whether a patch's seed goes along with the text."""
    return patch is not None and patch.anchoring is not None


def checked_number(num_sequences: int) -> int:
    """The number of sequences, if a runtime can have so many."""
    if not 1 <= num_sequences <= MAX_SEQUENCES:
        raise InputError(f"number of sequences: expected 1 to {MAX_SEQUENCES}, found {num_sequences}")
    return num_sequences


def check_patch(patch: Patch | None, spec: ModelSpec) -> None:
    """Refuses a patch that was made for another model.

    Raises:
        MismatchError: naming every field that differs.
    """
    if patch is not None:
        patch.base.require_same(spec)
