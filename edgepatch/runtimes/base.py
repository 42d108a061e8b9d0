"""The one protocol of all runtimes, and what they share: prompt reuse behind the pinned seed, sampling, streaming.

A runtime keeps positions 0..P-1 for the patch. Everything a caller sends lies behind them: ``_rewind`` and ``_forward`` count
positions from the end of the seed, so no request can name, move or evict it. Several sequences share one seed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.constraints import ConstraintEngine
from edgepatch.decoding.replies import Continuation, Reply, next_pieces, require_piece
from edgepatch.decoding.replies import Piece as Piece
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.patch import canary
from edgepatch.patch.file import Patch
from edgepatch.tensors import CanaryPrompt, ModelSpec
from edgepatch.tensors import as_float32 as as_float32
from edgepatch.text.limits import TextBound
from edgepatch.text.messages import Message as Message

Prompt = str | Sequence[Message] | Sequence[int]
Tools = Sequence[Mapping[str, Any]]

SeedRoute = Literal["", "stored", "decoded"]
MAX_SEQUENCES = 64

RuntimeT = TypeVar("RuntimeT", bound="Runtime")


@dataclass(frozen=True)
class _Prompt:
    """A prompt that a sequence has evaluated: its token ids and the (V,) logits behind them."""

    tokens: list[int]
    sequence: int
    logits: NDArray[np.float32]


class Runtime(ABC):
    """A model with a patch, ready to continue prompts.

    Attributes:
        spec: the model.
        patch: the active patch, or ``None`` for the bare model.
        num_positions: of a sequence, the patch's own included.
        num_sequences: conversations held at once, each behind the same seed.
        seed_route: how the seed got into the cache: "stored" in the patch, "decoded" from the soft prompt by this very
            model, or "" for the bare model.
        notes: what is slower or turned off because a library died of it on this machine, why, and what mends it.
        text_bound: how many bytes of text its tokens can stand for.

    One thread at a time drives a runtime; streams on different sequences may be interleaved token by token. ``tokens``, ``encode`` and
    ``encode_chat`` need the vocabulary alone: any thread may call them meanwhile.
    """

    name: str  # "torch", "llamacpp" or "onnx"
    quantization: str  # "F32", "F16", "Q8_0", "Q4_K_M", "Q4_0", "int8", "int4"
    spec: ModelSpec
    patch: Patch | None
    num_positions: int
    end_token_ids: frozenset[int]
    text_bound: TextBound = TextBound()
    kv_type: str = "f32"
    seed_route: SeedRoute = ""
    notes: tuple[str, ...] = ()
    num_threads: int | None = None  # of a forward pass on the CPU; None where the library decides

    def __init__(self, num_sequences: int = 1) -> None:
        if not 1 <= num_sequences <= MAX_SEQUENCES:
            raise InputError(f"number of sequences: expected 1 to {MAX_SEQUENCES}, found {num_sequences}")
        self.num_sequences = num_sequences
        self.patch = None
        self._evaluated: list[list[int]] = [[] for _ in range(num_sequences)]
        self._bare_logits: dict[tuple[int, ...], NDArray[np.float32]] = {}
        self._constraint_engine: ConstraintEngine | None = None

    # What each runtime provides.

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with BOS where the model wants one."""

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        """Token ids of a conversation in the model's chat template, with the opening of the assistant's turn.

        Special tokens that a message spells are text. ``tools`` are objects in OpenAI's form.
        """

    @abstractmethod
    def _new_decoder(self) -> Callable[[int], str]:
        """A function that takes one token after the other and returns the text that each completes."""

    @abstractmethod
    def _token_bytes(self) -> list[bytes]:
        """The bytes of each token in order of its id; none for special tokens."""

    @abstractmethod
    def _install(self, patch: Patch | None) -> SeedRoute:
        """Puts a patch that fits the model, or none, in place of the present one; every sequence starts afresh.

        Returns:
            The seed's route.

        Raises:
            InputError: the patch cannot be used with this runtime's settings.
            InactivePatchError: the seed was not taken.
        """

    def _check_weights(self, patch: Patch) -> None:  # noqa: B027  a runtime that cannot read weights has the canary alone
        """Compares the patch's sketch of its base with the model's own weights.

        Raises:
            MismatchError: they are not those of its base, whatever their quantization.
        """

    @abstractmethod
    def _rewind(self, sequence: int, length: int) -> int:
        """Forgets all but the first ``length`` positions behind the seed; 0 starts afresh from the seed.

        Returns:
            How many positions are kept: ``length``, or 0 where the model's memory cannot be cut there (then it was
            started afresh from the seed).
        """

    @abstractmethod
    def _forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        """Evaluates tokens behind those already evaluated in a sequence.

        Returns:
            (T, V) float32 logits of all tokens when ``every``, else (1, V) of the last.
        """

    def _forward_rows(self, sequences: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Evaluates one token behind each of B different sequences; a runtime that can evaluates them as one batch.

        Returns:
            (B, V) float32 logits.
        """
        rows = [self._forward(s, [token], every=False) for s, token in zip(sequences, tokens, strict=True)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _fork(self, source: int, target: int, length: int) -> bool:
        """Lets a sequence hold the first ``length`` positions behind the seed that another, or itself, holds.

        Returns:
            Whether it does; if not, it must be rewound to 0 before its next use.
        """
        return source == target and self._rewind(source, length) == length

    @abstractmethod
    def close(self) -> None:
        """Frees the model."""

    # What all share.

    @property
    def num_virtual_tokens(self) -> int:
        """P of the active patch; 0 for the bare model."""
        return self.patch.num_virtual_tokens if self.patch else 0

    @property
    def context_length(self) -> int:
        """Positions that a prompt and its continuation may fill: the patch's own are taken off."""
        return self.num_positions - self.num_virtual_tokens

    @property
    def system_fingerprint(self) -> str:
        """Names base model and patch; the same on every reply."""
        patch = self.patch.digest[:12] if self.patch else "bare"
        return f"{self.spec.weight_fingerprint[:12]}+{patch}"

    def tokens(self, prompt: Prompt, tools: Tools | None = None) -> list[int]:
        """Token ids of a text, a conversation or token ids; ``tools`` go into the chat template.

        Raises:
            InputError: the prompt is empty or malformed, or an id is outside the vocabulary, or a text has so many bytes that it fits
                into no context.
        """
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if tools and not is_chat:
            raise InputError("tools need chat messages as a prompt", hint="leave them out, or send messages")
        if isinstance(prompt, str):
            self.require_fit(prompt)
            ids = self.encode(prompt)
        elif is_chat:
            ids = self.encode_chat(cast(Sequence[Message], prompt), tools)
        else:
            ids = _checked_ids(prompt)
        if not ids:
            raise InputError("the prompt is empty", hint="give at least one token")
        wrong = next((t for t in ids if not 0 <= t < self.spec.vocab_size), None)
        if wrong is not None:
            raise InputError(f"token id {wrong} is outside the vocabulary of {self.spec.vocab_size}")
        return ids

    def require_fit(self, text: str) -> None:
        """Refuses a text by its size, before it is tokenized.

        Raises:
            TooLongError: no text of so many bytes fits into the context.
            InputError: it holds halves of characters.
        """
        self.text_bound.require_fit(text, self.context_length)

    def swap(self, patch: Patch | None) -> None:
        """Exchanges the patch on the loaded model, or takes it off, and proves the new one active.

        Every sequence starts afresh. On failure the old patch is back in place.

        Raises:
            MismatchError: the patch was made for another model.
            InputError: the patch cannot be used with this runtime's settings.
            InactivePatchError: the seed was not taken, or the canary says that it does not work as it should.
        """
        self._exchange(patch, num_prompts=1)

    def prove(self) -> None:
        """Asks the whole canary of the active patch again, where it has one.

        Raises:
            InactivePatchError: the patch does not work as it should; the model is not left without it.
        """
        if self.patch is not None:
            self._exchange(self.patch, num_prompts=None)

    def _load_patch(self, patch: Patch | None) -> None:
        """The first patch of a runtime; every prompt of its canary is checked."""
        self._exchange(patch, num_prompts=None)

    def _exchange(self, patch: Patch | None, num_prompts: int | None) -> None:
        check_patch(patch, self.spec)
        if patch is not None and not patch.num_virtual_tokens < self.num_positions:
            raise InputError(
                f"context length: expected {patch.num_virtual_tokens + 1} positions or more, found {self.num_positions}",
                hint=f"the patch takes {patch.num_virtual_tokens} of them",
            )
        if patch is not None:
            self._check_weights(patch)
        old = self.patch
        prompts = patch.canary.prompts[:num_prompts] if patch and patch.canary else ()
        try:
            self._measure_bare([prompt.tokens for prompt in prompts])
            self._put(patch)
            self._prove(prompts)
        except BaseException:
            self._put_back(old)
            raise

    def _put(self, patch: Patch | None) -> None:
        self._evaluated = [[] for _ in range(self.num_sequences)]
        self.patch = patch
        self.seed_route = self._install(patch)

    def _put_back(self, patch: Patch | None) -> None:
        """After a failed swap: the old patch again, or no model at all, but never a model without its patch."""
        try:
            self._put(patch)
        except BaseException:
            self.close()
            raise

    def _measure_bare(self, prompts: Sequence[tuple[int, ...]]) -> None:
        unknown = [tokens for tokens in prompts if tokens not in self._bare_logits]
        if not unknown:
            return
        self._put(None)
        for tokens in unknown:
            self._bare_logits[tokens] = self._evaluate(tokens)[-1]

    def _prove(self, prompts: Sequence[CanaryPrompt]) -> None:
        allowed = canary.tolerance(self.quantization, self.kv_type, self.seed_route == "decoded")
        for prompt in prompts:
            canary.require_active(prompt, self._bare_logits[prompt.tokens], self._evaluate(prompt.tokens)[-1], allowed)
        if prompts:
            self.reset()

    def reset(self) -> None:
        """Forgets every prompt; the seed stays."""
        for sequence in range(self.num_sequences):
            self._evaluated[sequence] = []
            self._rewind(sequence, 0)

    def _checked(self, sequence: int) -> int:
        if not 0 <= sequence < self.num_sequences:
            raise InputError(f"sequence: expected 0 to {self.num_sequences - 1}, found {sequence}")
        return sequence

    def _evaluate(self, tokens: Sequence[int], sequence: int = 0, count: int = 1) -> NDArray[np.float32]:
        """Logits of ``tokens`` from the start of the prompt, reusing what is already evaluated.

        Returns:
            (count, V) of the last tokens.
        """
        self._checked(sequence)
        if len(tokens) > self.context_length:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.context_length}",
                hint="shorten the prompt or load the model with a longer context",
            )
        known, self._evaluated[sequence] = self._evaluated[sequence], []  # stays empty if the runtime fails half-way
        shared = _common_prefix(known, tokens, len(tokens) - count)
        if shared < len(known) or not shared:
            shared = self._rewind(sequence, shared)
        logits = self._forward(sequence, tokens[shared:], every=count > 1)
        self._evaluated[sequence] = list(tokens)
        return logits[-count:]

    def evaluated(self, sequence: int = 0) -> list[int]:
        """Token ids behind the seed that a sequence holds."""
        return list(self._evaluated[self._checked(sequence)])

    def logits_of_last(self, prompt: Prompt, sequence: int = 0) -> NDArray[np.float32]:
        """(V,) float32: the next-token logits behind a prompt, reusing what the sequence has already evaluated."""
        logits: NDArray[np.float32] = self._evaluate(self.tokens(prompt), sequence=sequence)[-1]
        return logits

    def num_cached(self, tokens: Sequence[int], sequence: int = 0) -> int:
        """How many leading tokens of a prompt a sequence has already evaluated."""
        return _common_prefix(self._evaluated[sequence], tokens, len(tokens))

    def token_bytes(self) -> list[bytes]:
        """The bytes of each token in order of its id; none for special tokens.

        Raises:
            InputError: the model's tokens have no bytes of their own.
        """
        return self._token_bytes()

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
        return self._evaluate(tokens, sequence, count)

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, sequence: int = 0, tools: Tools | None = None
    ) -> Iterator[Piece]:
        """Continues a prompt token by token.

        Args:
            prompt: plain text, chat messages, or token ids.
            sampling: defaults to ``Sampling()``.
            sequence: which of the conversations behind the seed; its cache is reused as far as the prompts agree.
            tools: what the model may call, in OpenAI's form, where its chat template knows tools.

        Raises:
            InputError: the prompt is empty, malformed or longer than the context, or a setting does not fit the model.
        """
        continuation = self.begin(self.tokens(prompt, tools), sampling or Sampling(), sequence)
        while True:
            piece = require_piece(self.advance([continuation])[0])
            yield piece
            if piece.finish_reason:
                return

    def begin(self, tokens: Sequence[int], sampling: Sampling, sequence: int = 0) -> Continuation:
        """Evaluates a prompt in a sequence, to be continued by ``advance``.

        Raises:
            InputError: the prompt is longer than the context, or a setting does not fit the model.
        """
        reply = self._new_reply(sampling, tokens)
        return Continuation(sequence, reply, self._evaluate(tokens, sequence=sequence)[-1])

    def advance(self, continuations: Sequence[Continuation]) -> list[Piece | Exception]:
        """The next token of each continuation; what they drew last is evaluated first, as one batch where the runtime can.

        Args:
            continuations: not ended, and each in a sequence of its own.

        Returns:
            A piece for each, or the error that ends it and no other.

        Raises:
            EdgepatchError: the model failed; every sequence among them starts afresh.
        """
        sequences = [self._checked(c.sequence) for c in continuations]
        if len(set(sequences)) < len(sequences):
            raise InputError(f"continuations: expected each in a sequence of its own, found them in {sequences}")
        self._evaluate_rows([c for c in continuations if c.logits is None])
        return next_pieces([c.reply for c in continuations], [c.take_logits() for c in continuations])

    def _evaluate_rows(self, continuations: Sequence[Continuation]) -> None:
        """Logits behind the last token of each; a sequence that was used for something else is evaluated by itself."""
        together = [c for c in continuations if self._evaluated[c.sequence] == c.reply.tokens[:-1]]
        for continuation in continuations:
            if continuation not in together:
                continuation.logits = self._evaluate(continuation.reply.tokens, sequence=continuation.sequence)[-1]
        if not together:
            return
        sequences = [c.sequence for c in together]
        held = [self._evaluated[sequence] for sequence in sequences]
        for sequence in sequences:
            self._evaluated[sequence] = []  # stays empty if the runtime fails half-way
        logits = self._forward_rows(sequences, [c.reply.tokens[-1] for c in together])
        for continuation, tokens, row in zip(together, held, logits, strict=True):
            tokens.append(continuation.reply.tokens[-1])
            self._evaluated[continuation.sequence] = tokens
            continuation.logits = row

    def _new_reply(self, sampling: Sampling, tokens: Sequence[int]) -> Reply:
        """A reply to a prompt, nothing of it drawn yet."""
        matcher = None
        if sampling.constraint is not None:
            if self._constraint_engine is None:
                self._constraint_engine = ConstraintEngine(
                    self._token_bytes(), self.spec.vocab_size, self.end_token_ids
                )
            matcher = self._constraint_engine.matcher(sampling.constraint)
        room = min(sampling.max_new_tokens, self.context_length - len(tokens) + 1)
        return Reply(sampling, tokens, room, self.spec.vocab_size, self._new_decoder(), self.end_token_ids, matcher)

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
        return self._generate_all([(tokens, replace(sampling, rng_seed=first + i)) for i in range(count)])

    def generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """One continuation of each prompt, the same as ``generate`` gives: where there is an ``rng_seed``, each has that one.

        As many at a time as the runtime has sequences; what these held before is forgotten.

        Raises:
            InputError: as ``stream`` does, or log-probabilities are asked for, which have no place in texts.
        """
        return self._generate_all([(self.tokens(prompt), sampling) for prompt in prompts])

    def _generate_all(self, jobs: Sequence[tuple[list[int], Sampling]]) -> list[str]:
        """The texts of continuations of token ids; a sequence that becomes free takes the next."""
        for _, sampling in jobs:
            require_text_only(sampling)
        texts, waiting, free = [""] * len(jobs), deque(enumerate(jobs)), deque(range(self.num_sequences))
        running: dict[int, Continuation] = {}
        known: _Prompt | None = None
        while waiting or running:
            while waiting and free:
                job, (tokens, sampling) = waiting.popleft()
                sequence = free.popleft()
                if known is None or not self._share(known, tokens, sequence):
                    known = _Prompt(tokens, sequence, self._evaluate(tokens, sequence=sequence)[-1])
                running[job] = Continuation(sequence, self._new_reply(sampling, tokens), known.logits)
            for job, found in zip(list(running), self.advance(list(running.values())), strict=True):
                piece = require_piece(found)
                texts[job] += piece.text
                if piece.finish_reason:
                    free.append(running.pop(job).sequence)
        return texts

    def _share(self, known: _Prompt, tokens: list[int], sequence: int) -> bool:
        """Puts a sequence behind a prompt that is evaluated already; whether that can be done."""
        if tokens != known.tokens or self._evaluated[known.sequence][: len(tokens)] != tokens:
            return False
        self._evaluated[sequence] = []
        if not self._fork(known.sequence, sequence, len(tokens)):
            return False
        self._evaluated[sequence] = list(tokens)
        return True

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> str:
        """The assistant's reply to a conversation."""
        return self.generate(messages, sampling)

    def __enter__(self: RuntimeT) -> RuntimeT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _checked_ids(prompt: Sequence[Any]) -> list[int]:
    """The prompt's token ids, if it is made of them alone."""
    if not all(isinstance(token, (int, np.integer)) and not isinstance(token, bool) for token in prompt):
        raise InputError("prompt: expected a text, messages, or token ids alone", hint="do not mix them")
    return [int(token) for token in prompt]


def require_text_only(sampling: Sampling) -> None:
    """Refuses log-probabilities where the answer is texts.

    Raises:
        InputError: they are asked for.
    """
    if sampling.num_logprobs is not None:
        raise InputError("sampling: num_logprobs: text alone comes without log-probabilities", hint="use stream")


def _common_prefix(known: Sequence[int], tokens: Sequence[int], most: int) -> int:
    """Length of the common start of two prompts, at most ``most``."""
    shared = min(most, len(known), len(tokens))
    if list(tokens[:shared]) == list(known[:shared]):
        return shared
    return next(i for i in range(shared) if tokens[i] != known[i])


def check_patch(patch: Patch | None, spec: ModelSpec) -> None:
    """Refuses a patch that was made for another model.

    Raises:
        MismatchError: naming every field that differs.
    """
    if patch is not None:
        patch.base.require_same(spec)
