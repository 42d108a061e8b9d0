"""A model in use: prompts continued behind the patch that is in front of them, which can be exchanged and proved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.constraints import CompiledConstraint
from edgepatch.decoding.replies import (
    Continuation,
    Piece,
    ReplyMaker,
    evaluate_batches,
    next_pieces,
    require_piece,
)
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.patch.file import Patch
from edgepatch.runtimes.patching import PatchSlot, as_parts
from edgepatch.runtimes.prompts import Prompt, token_ids
from edgepatch.runtimes.runtime import Runtime, SeedRoute, Tools
from edgepatch.runtimes.seats import Job, Seats, require_text_only
from edgepatch.runtimes.sequences import Sequences
from edgepatch.text.messages import Message
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions


class Session(AbstractContextManager["Session"]):
    """A runtime with a patch, ready to continue prompts.

    Args:
        runtime: loaded; the session closes it, also where the patch cannot be used.
        patch: one, or several, which act side by side; ``None`` for the bare model.
        pinned: leaves a seed that moves at the start of the text.
        other_template: lets the model have another chat template than the patch was made with.

    Attributes:
        backend: what evaluates, with the verbs that one kind of runtime alone has.
        sequences: what each conversation has evaluated, its snapshots included.
        parts: the active patches, each proven by itself: none for the bare model, several in order of their digests.
        default_sampling: what fills the settings that a ``Sampling`` leaves open: the model's own advice, else the project's.
        slot: which patch is active, where its seed stands, and what is less than it promises.
        seed_route: how the seed got into the cache: "stored" in the patch, "decoded" from the soft prompt by this very
            model, or "" for the bare model.

    The other attributes are the backend's. One thread at a time drives a session; streams on different sequences may be interleaved
    token by token. ``tokens``, ``encode`` and ``encode_chat`` need the vocabulary alone: any thread may call them meanwhile.
    """

    def __init__(
        self,
        runtime: Runtime,
        patch: Patch | Sequence[Patch] | None,
        pinned: bool = False,
        other_template: bool = False,
    ) -> None:
        self.backend = runtime
        self.spec, self.name, self.quantization = runtime.spec, runtime.name, runtime.quantization
        self.kv_type, self.num_threads, self.notes = runtime.kv_type, runtime.num_threads, runtime.notes
        self.num_positions, self.num_sequences = runtime.num_positions, runtime.num_sequences
        self.end_token_ids, self.text_bound = runtime.end_token_ids, runtime.text_bound
        self.chat_template, self.special_tokens = runtime.chat_template, runtime.special_tokens
        self.encode, self.encode_chat, self.token_bytes = runtime.encode, runtime.encode_chat, runtime.token_bytes
        self.sampling_defaults, self.default_sampling = runtime.sampling_defaults, runtime.sampling_defaults.sampling
        self.sequences = Sequences(runtime)
        self.slot = PatchSlot(runtime, self.sequences, pinned, other_template)
        self.replies = ReplyMaker(
            runtime.spec.vocab_size,
            runtime.new_decoder,
            runtime.token_bytes,
            runtime.special_tokens,
            self.default_sampling,
        )
        self.parts = parts = as_parts(patch)
        try:
            self.seed_route: SeedRoute = self.slot.load(parts)
        except BaseException:
            runtime.close()
            raise

    @property
    def patch(self) -> Patch | None:
        """The active patch as it was signed, or what several are together; ``None`` for the bare model."""
        return self.slot.patch

    @property
    def context_length(self) -> int:
        """Positions that a prompt and its continuation may fill: the patch's own are taken off."""
        return self.backend.context_length

    @property
    def system_fingerprint(self) -> str:
        """Names base model and patch, and says where its seed is pinned or the chat template another; the same on every reply."""
        patch = self.patch.digest[:12] if self.patch else "bare"
        replaced = self.chat_template.digest if self.chat_template.is_replaced else ""
        template = replaced or self.slot.other_template
        pinned, named = "-pinned" if self.slot.is_pinned else "", f"-template-{template[:12]}" if template else ""
        return f"{self.spec.weight_fingerprint[:12]}+{patch}{pinned}{named}"

    def tokens(self, prompt: Prompt, tools: Tools | None = None, options: ChatOptions = PLAIN_CHAT) -> list[int]:
        """Token ids of a text, a conversation or token ids; ``tools`` go into the chat template, which ``options`` belong to.

        Raises:
            InputError: the prompt is empty or malformed, or an id is outside the vocabulary, or a text has so many bytes that it fits
                into no context.
        """
        return token_ids(self.backend, prompt, tools, options)

    def reset(self) -> None:
        """Forgets every prompt; the seed stays."""
        self.sequences.reset()

    # The patch.

    def swap(self, patch: Patch | Sequence[Patch] | None) -> None:
        """Exchanges the patch on the loaded model, or takes it off, and proves the new one active.

        Several patches are proven one by one, and then act side by side. Every sequence starts afresh. On failure the old patch is
        back in place.

        Raises:
            MismatchError: the patch was made for another model.
            InputError: the patch cannot be used with this runtime's settings.
            InactivePatchError: the seed was not taken, or the canary says that it does not work as it should.
        """
        parts = as_parts(patch)
        self.seed_route = self.slot.exchange(parts, [1] * len(parts))
        self.parts = parts

    def prove(self) -> None:
        """Asks the whole canary of each active patch again, where it has one.

        Raises:
            InactivePatchError: the patch does not work as it should; the model is not left without it.
        """
        if self.parts:
            self.seed_route = self.slot.exchange(self.parts, [None] * len(self.parts))

    # Logits.

    def logits_of_last(self, prompt: Prompt, sequence: int = 0) -> NDArray[np.float32]:
        """(V,) float32: the next-token logits behind a prompt, reusing what the sequence has already evaluated."""
        logits: NDArray[np.float32] = self.sequences.evaluate({sequence: self.tokens(prompt)})[sequence][-1]
        return logits

    def logits(self, prompt: Prompt, sequence: int = 0, count: int | None = None) -> NDArray[np.float32]:
        """The next-token logits after each token of the prompt, or after each of its last ``count``.

        What the sequence has already evaluated in front of those is reused.

        Returns:
            (T, V) or (count, V) float32.

        Raises:
            InputError: the prompt has fewer than ``count`` tokens, or none, or more than the context holds.
        """
        tokens = self.tokens(prompt)
        count = len(tokens) if count is None else count
        if not 1 <= count <= len(tokens):
            raise InputError(f"count: expected 1 to {len(tokens)}, the tokens of the prompt, found {count}")
        return self.sequences.evaluate({sequence: tokens}, count)[sequence]

    # Replies.

    def begin(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        sequence: int = 0,
        compiled: CompiledConstraint | None = None,
        spelled: Mapping[int, str] | None = None,
    ) -> Continuation:
        """Evaluates a prompt in a sequence, to be continued by ``advance``.

        Args:
            tokens: the prompt.
            sampling: how to draw; what it leaves to the model is taken from ``default_sampling``.
            sequence: to evaluate it in.
            compiled: the sampling's constraint, if it is at hand.
            spelled: a text for special tokens, by id.

        Raises:
            InputError: the prompt is longer than the context, or a setting does not fit the model.
        """
        limits = (self.context_length, self.end_token_ids)
        reply = self.replies.new(sampling, tokens, *limits, compiled=compiled, spelled=spelled or {})
        return Continuation(sequence, reply, self.sequences.evaluate({sequence: tokens})[sequence][-1])

    def advance(self, continuations: Sequence[Continuation]) -> list[Piece | Exception]:
        """The next token of each continuation; what they drew last is evaluated first, as one batch where the runtime can.

        This is the one step of every reply: of a stream, of many texts, of the server's rounds and of what the bench measures.

        Args:
            continuations: not ended, and each in a sequence of its own.

        Returns:
            A piece for each, or the error that ends it and no other.

        Raises:
            EdgepatchError: the model failed; every sequence among them starts afresh.
        """
        seats = [(c.batch, c.sequence) for c in continuations]
        if len(set(seats)) < len(seats):
            sequences = [sequence for _, sequence in seats]
            raise InputError(f"continuations: expected each in a sequence of its own, found them in {sequences}")
        drawn = [c for c in continuations if c.logits is None]
        in_sequences = {c.sequence: c for c in drawn if c.batch is None}
        if in_sequences:
            logits = self.sequences.evaluate({s: c.reply.tokens for s, c in in_sequences.items()})
            for sequence, continuation in in_sequences.items():
                continuation.logits = logits[sequence][-1]
        evaluate_batches([c for c in drawn if c.batch is not None])
        return next_pieces([c.reply for c in continuations], [c.take_logits() for c in continuations])

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        sequence: int = 0,
        tools: Tools | None = None,
        options: ChatOptions = PLAIN_CHAT,
    ) -> Iterator[Piece]:
        """Continues a prompt token by token.

        Args:
            prompt: plain text, chat messages, or token ids.
            sampling: defaults to ``Sampling()``, which leaves all but the length to ``default_sampling``.
            sequence: which of the conversations behind the seed; its cache is reused as far as the prompts agree.
            tools: what the model may call, in OpenAI's form, where its chat template knows tools.
            options: how a conversation is written.

        Raises:
            InputError: the prompt is empty, malformed or longer than the context, or a setting does not fit the model.
        """
        continuation = self.begin(self.tokens(prompt, tools, options), sampling or Sampling(), sequence)
        while True:
            piece = require_piece(self.advance([continuation])[0])
            yield piece
            if piece.finish_reason:
                return

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> str:
        """The whole continuation as text; arguments and errors as in ``stream``, but no log-probabilities."""
        require_text_only(sampling or Sampling())
        return "".join(piece.text for piece in self.stream(prompt, sampling))

    def generate_many(self, prompt: Prompt, sampling: Sampling, count: int) -> list[str]:
        """``count`` continuations of one prompt, with the random seeds ``rng_seed``, ``rng_seed + 1``, ...

        All sequences are used for them, as in ``generate_batch``; a prompt is evaluated once where the runtime can share it.

        Raises:
            InputError: as ``stream`` does, or log-probabilities are asked for, which have no place in texts.
        """
        first = sampling.rng_seed if sampling.rng_seed is not None else time.time_ns()
        tokens = self.tokens(prompt)
        return self._continue_all([Job(tokens, replace(sampling, rng_seed=first + i)) for i in range(count)])

    def generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """One continuation of each prompt, the same as ``generate`` gives: where there is an ``rng_seed``, each has that one.

        As many at a time as the runtime has rows or sequences; what these held before is forgotten.

        Raises:
            InputError: as ``stream`` does, or log-probabilities are asked for, which have no place in texts.
        """
        return self._continue_all([Job(self.tokens(prompt), sampling) for prompt in prompts])

    def _continue_all(self, jobs: Sequence[Job]) -> list[str]:
        """The texts of continuations; what has ended makes room for the next."""
        new_reply = partial(self.replies.new, context_length=self.context_length, end_token_ids=self.end_token_ids)
        texts, seats = [""] * len(jobs), Seats(self.backend, self.sequences, jobs, new_reply)
        running = seats.admit(0)
        while running:
            events = self.advance(list(running.values()))
            for number, piece in zip(list(running), map(require_piece, events), strict=True):
                texts[number] += piece.text
                if piece.finish_reason:
                    seats.release(running.pop(number))
            running |= seats.admit(len(running))
        return texts

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> str:
        """The assistant's reply to a conversation."""
        return self.generate(messages, sampling)

    def close(self) -> None:
        """Frees the model."""
        self.backend.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
