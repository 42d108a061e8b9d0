"""The one protocol of all runtimes, and what they share: prompt reuse behind the pinned seed, sampling, streaming.

A runtime keeps positions 0..P-1 for the patch. Everything a caller sends lies behind them: ``_rewind`` and ``_forward`` count
positions from the end of the seed, so no request can name, move or evict it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError
from edgepatch.patches import Patch
from edgepatch.sampling import Sampling, draw_token
from edgepatch.tensors import ModelSpec

Message = dict[str, str]
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        text: the text that it completes; may be empty within a multi-byte character.
        token_id: its id.
        finish_reason: "stop" at the model's end token, "length" at ``max_new_tokens`` or a full context, else "".
    """

    text: str
    token_id: int
    finish_reason: Literal["", "stop", "length"] = ""


RuntimeT = TypeVar("RuntimeT", bound="Runtime")


class Runtime(ABC):
    """A model with a patch, ready to continue prompts.

    Attributes:
        spec: the model.
        patch: the active patch, or ``None`` for the bare model.
        context_length: positions that a prompt and its continuation may fill; the patch's own are already taken off.
    """

    name: str  # "torch", "llamacpp" or "onnx"
    quantization: str  # "F32", "F16", "Q8_0", "Q4_K_M", "Q4_0", "int8", "int4"
    spec: ModelSpec
    patch: Patch | None
    context_length: int
    end_token_ids: frozenset[int]

    def __init__(self) -> None:
        self._evaluated: list[int] = []

    # What each runtime provides.

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with BOS where the model wants one."""

    @abstractmethod
    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the model's chat template, with the opening of the assistant's turn."""

    @abstractmethod
    def _new_decoder(self) -> Callable[[int], str]:
        """A function that takes one token after the other and returns the text that each completes."""

    @abstractmethod
    def _rewind(self, length: int) -> int:
        """Forgets all but the first ``length`` positions behind the seed; 0 starts afresh from the seed.

        Returns:
            How many positions are kept: ``length``, or 0 where the model's memory cannot be cut there (then it was
            started afresh from the seed).
        """

    @abstractmethod
    def _forward(self, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        """Evaluates tokens behind those already evaluated.

        Returns:
            (T, V) float32 logits of all tokens when ``every``, else (1, V) of the last.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees the model."""

    # What all share.

    @property
    def system_fingerprint(self) -> str:
        """Names base model and patch; the same on every reply."""
        patch = self.patch.digest[:12] if self.patch else "bare"
        return f"{self.spec.weight_fingerprint[:12]}+{patch}"

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, a conversation or token ids.

        Raises:
            InputError: the prompt is empty or an id is outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = self.encode(prompt)
        elif prompt and isinstance(prompt[0], dict):
            ids = self.encode_chat([m for m in prompt if isinstance(m, dict)])
        else:
            ids = [int(t) for t in prompt]  # type: ignore[arg-type]
        if not ids:
            raise InputError("the prompt is empty", hint="give at least one token")
        wrong = next((t for t in ids if not 0 <= t < self.spec.vocab_size), None)
        if wrong is not None:
            raise InputError(f"token id {wrong} is outside the vocabulary of {self.spec.vocab_size}")
        return ids

    def reset(self) -> None:
        """Forgets every prompt; the seed stays."""
        self._evaluated = []
        self._rewind(0)

    def _evaluate(self, tokens: Sequence[int], every: bool = False) -> NDArray[np.float32]:
        """Logits of ``tokens`` from the start of the prompt, reusing what is already evaluated.

        Returns:
            (T, V) with ``every``, else (1, V) of the last token.
        """
        if len(tokens) > self.context_length:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.context_length}",
                hint="shorten the prompt or load the model with a longer context",
            )
        shared = 0
        if not every:
            shared = min(len(tokens) - 1, len(self._evaluated))
            if list(tokens[:shared]) != self._evaluated[:shared]:
                shared = next(i for i in range(shared) if tokens[i] != self._evaluated[i])
        if shared < len(self._evaluated) or not shared:
            kept, self._evaluated = self._evaluated, []  # stays empty if the runtime fails half-way
            shared = self._rewind(shared)
            self._evaluated = kept[:shared]
        done, self._evaluated = self._evaluated, []
        logits = self._forward(tokens[shared:], every)
        self._evaluated = [*done, *tokens[shared:]]
        return logits

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """(T, V) float32: the next-token logits after each token of the prompt."""
        return self._evaluate(self.tokens(prompt), every=True)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Piece]:
        """Continues a prompt token by token.

        Args:
            prompt: plain text, chat messages, or token ids.
            sampling: defaults to ``Sampling()``.

        Raises:
            InputError: the prompt is empty, malformed or longer than the context.
        """
        sampling = sampling or Sampling()
        tokens = self.tokens(prompt)
        rng = np.random.default_rng(sampling.rng_seed)
        decode = self._new_decoder()
        room = min(sampling.max_new_tokens, self.context_length - len(tokens) + 1)
        logits = self._evaluate(tokens)
        for count in range(1, room + 1):
            token = draw_token(logits[-1], sampling, rng)
            if token in self.end_token_ids and not sampling.ignore_end_tokens:
                yield Piece("", token, "stop")
                return
            yield Piece(decode(token), token, "length" if count == room else "")
            if count < room:
                tokens.append(token)
                logits = self._evaluate(tokens)

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> str:
        """The whole continuation as text."""
        return "".join(piece.text for piece in self.stream(prompt, sampling))

    def generate_many(self, prompt: Prompt, sampling: Sampling, count: int) -> list[str]:
        """``count`` continuations of one prompt, with the random seeds ``rng_seed``, ``rng_seed + 1``, ..."""
        first = sampling.rng_seed if sampling.rng_seed is not None else time.time_ns()
        tokens = self.tokens(prompt)
        return [self.generate(tokens, replace(sampling, rng_seed=first + i)) for i in range(count)]

    def _continue_rows(
        self,
        logits: NDArray[np.float32],
        rng_seeds: Sequence[int],
        sampling: Sampling,
        room: int,
        step: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    ) -> list[str]:
        """For runtimes that evaluate a batch: one continuation a row, as ``stream`` would give it with that random seed.

        Args:
            logits: (V,) after the prompt, the same for every row.
            rng_seeds: B seeds.
            sampling: its own ``rng_seed`` is not used.
            room: the most tokens of a row.
            step: evaluates (B, 1) tokens, one behind each row, and gives (B, V) logits; a row that has ended is fed a
                token whose logits nobody reads.
        """
        rngs, decoders = [np.random.default_rng(s) for s in rng_seeds], [self._new_decoder() for _ in rng_seeds]
        texts, live, drawn = [""] * len(rngs), list(range(len(rngs))), np.zeros((len(rngs), 1), dtype=np.int64)
        rows: Any = np.broadcast_to(logits, (len(rngs), len(logits)))
        for count in range(1, room + 1):
            for row in list(live):
                token = draw_token(rows[row], sampling, rngs[row])
                if token in self.end_token_ids:
                    live.remove(row)
                    continue
                texts[row] += decoders[row](token)
                drawn[row] = token
            if not live or count == room:
                break
            rows = step(drawn)
        return texts

    def chat(self, messages: Sequence[Message], sampling: Sampling | None = None) -> str:
        """The assistant's reply to a conversation."""
        return self.generate(messages, sampling)

    def __enter__(self: RuntimeT) -> RuntimeT:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def check_patch(patch: Patch | None, spec: ModelSpec) -> None:
    """Refuses a patch that was made for another model.

    Raises:
        MismatchError: naming every field that differs.
    """
    if patch is not None:
        patch.base.require_same(spec)


def as_float32(logits: Any) -> NDArray[np.float32]:
    """A (T, V) float32 copy, safe to keep after the runtime's own buffer is reused."""
    return np.array(logits, dtype=np.float32, ndmin=2)
