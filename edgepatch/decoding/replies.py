"""One reply, token by token: from logits to the pieces of text that a caller sees, the same for every runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.constraints import CompiledConstraint, ConstraintEngine, ConstraintMatcher
from edgepatch.decoding.sampling import Draw, Sampling, TokenSampler, draw_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        text: the text that it completes; may be empty within a multi-byte character, or while the text may yet turn out to be a
            stop string, in which case a later piece brings it.
        token_id: its id.
        finish_reason: "stop" at the model's end token, at a stop string or where the constraint is complete; "length" at
            ``max_new_tokens`` or a full context; else "".
        logprob: the token's log-probability as the model gives it, before any sampling setting; ``None`` unless asked for.
        top_logprobs: (token id, log-probability) of the likeliest tokens, falling.
    """

    text: str
    token_id: int
    finish_reason: Literal["", "stop", "length"] = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class StopMatcher:
    """Finds stop strings in a text that arrives in parts, and holds back what may be the beginning of one.

    A text ends where the first stop string is complete, and the longest of those that are complete there counts, however the
    text was cut into parts.

    Args:
        stops: the stop strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Takes the next part and returns what can be delivered; once ``is_stopped``, nothing more can."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else text
        searched = len(self._held)
        self._held += text
        for end in range(searched + 1, len(self._held) + 1):
            complete = [stop for stop in self._stops if self._held.endswith(stop, 0, end)]
            if complete:
                self.is_stopped = True
                self._held = self._held[: end - max(map(len, complete))]
                return self.flush()
        cut = len(self._held) - self._num_held()
        delivered, self._held = self._held[:cut], self._held[cut:]
        return delivered

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        ends = (self._held[len(self._held) - n :] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)


class Reply:
    """A reply on its way.

    Args:
        sampling: how to draw.
        prompt: token ids that it continues.
        room: the most tokens that it may have.
        vocab_size: V.
        decode: takes one token after the other and returns the text that each completes.
        end_token_ids: the tokens that end a reply.
        matcher: where ``sampling`` has a constraint.
        stop_token_ids: tokens without text that ``sampling.stop`` names.

    Attributes:
        tokens: the prompt and what has been drawn.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        room: int,
        vocab_size: int,
        decode: Callable[[int], str],
        end_token_ids: frozenset[int],
        matcher: ConstraintMatcher | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.tokens = list(prompt)
        self._end = len(self.tokens) + room
        self._sampler = TokenSampler(sampling, prompt, vocab_size, matcher)
        self._stops = StopMatcher(sampling.stop)
        self._decode = decode
        self._ends = (frozenset() if sampling.ignore_end_tokens else end_token_ids) | stop_token_ids

    def next(self, logits: NDArray[Any]) -> Piece:
        """Draws a token from (V,) float32 logits."""
        return require_piece(next_pieces([self], [logits])[0])

    def _take(self, draw: Draw) -> Piece:
        self.tokens.append(draw.token_id)
        reason: Literal["", "stop", "length"] = "length" if len(self.tokens) == self._end else ""
        text = ""
        if draw.token_id in self._ends:
            reason = "stop"
        else:
            is_complete = self._sampler.accept(draw.token_id)
            text = self._stops.push(self._decode(draw.token_id))
            reason = "stop" if is_complete or self._stops.is_stopped else reason
        text += self._stops.flush() if reason else ""
        return Piece(text, draw.token_id, reason, draw.logprob, draw.top_logprobs)


class ReplyMaker:
    """Begins replies of one model; what a constraint needs of its vocabulary is read once, when the first one comes.

    Args:
        vocab_size: V.
        new_decoder: gives a function that takes one token after the other and returns the text that each completes.
        token_bytes: gives the bytes of each token; none for special tokens.
        special_tokens: name -> id of each token without text.
        defaults: fill what a request leaves to the model.
    """

    def __init__(
        self,
        vocab_size: int,
        new_decoder: Callable[[], Callable[[int], str]],
        token_bytes: Callable[[], list[bytes]],
        special_tokens: Mapping[str, int] = MappingProxyType({}),
        defaults: Sampling | None = None,
    ) -> None:
        self._vocab_size, self._new_decoder, self._token_bytes = vocab_size, new_decoder, token_bytes
        self._special_tokens, self._defaults = special_tokens, defaults or Sampling.plain()
        self._engine: ConstraintEngine | None = None

    def engine(self, end_token_ids: frozenset[int]) -> ConstraintEngine:
        """What compiles constraints over the model's vocabulary, which is read the first time."""
        if self._engine is None:
            self._engine = ConstraintEngine(self._token_bytes(), self._vocab_size, end_token_ids)
        return self._engine

    def new(
        self,
        sampling: Sampling,
        tokens: Sequence[int],
        context_length: int,
        end_token_ids: frozenset[int],
        compiled: CompiledConstraint | None = None,
        spelled: Mapping[int, str] = MappingProxyType({}),
    ) -> Reply:
        """A reply to a prompt, nothing of it drawn yet; ``spelled`` gives some tokens without text one, by id.

        Args:
            sampling: how to draw.
            tokens: the prompt.
            context_length: positions that prompt and reply may fill.
            end_token_ids: the tokens that end a reply.
            compiled: the sampling's constraint, where somebody has compiled it beforehand.

        Raises:
            InputError: a setting does not fit the model.
        """
        matcher = None
        if sampling.constraint is not None:
            matcher = (compiled or self.engine(end_token_ids).compile(sampling.constraint)).matcher()
        room = min(sampling.max_new_tokens, context_length - len(tokens) + 1)
        stops = frozenset(self._special_tokens[stop] for stop in sampling.stop if stop in self._special_tokens)
        decode = _spelling(self._new_decoder(), spelled)
        return Reply(
            sampling.filled(self._defaults), tokens, room, self._vocab_size, decode, end_token_ids, matcher, stops
        )


def _spelling(decode: Callable[[int], str], spelled: Mapping[int, str]) -> Callable[[int], str]:
    return (lambda token: spelled[token] if token in spelled else decode(token)) if spelled else decode


class Batch(Protocol):
    """Prompts that a runtime evaluates as the rows of one batch, apart from its sequences.

    Attributes:
        num_rows: B.
    """

    num_rows: int

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, V) float32 logits behind (B, 1) tokens; a row whose reply has ended takes a token that nobody asks about."""

    def place_seed(self, row: int, anchor: int) -> None:
        """As a runtime's, in one row."""


@dataclass(eq=False)
class Continuation:
    """A reply and the sequence in which it is evaluated.

    Attributes:
        sequence: holds the reply's tokens, perhaps not yet the last; of a batch it is the row.
        reply: what is drawn.
        logits: (V,) float32 behind all of its tokens; ``None`` where the last one is still to be evaluated.
        batch: whose row it is; ``None`` for a sequence of the runtime itself.
    """

    sequence: int
    reply: Reply
    logits: NDArray[np.float32] | None
    batch: Batch | None = None

    def take_logits(self) -> NDArray[np.float32]:
        """The logits, from which the next token is to be drawn."""
        logits, self.logits = self.logits, None
        assert logits is not None  # evaluated
        return logits


def evaluate_batches(continuations: Sequence[Continuation]) -> None:
    """Gives rows of batches the logits behind the token that they drew last."""
    by_batch: dict[int, list[Continuation]] = {}
    for continuation in continuations:
        by_batch.setdefault(id(continuation.batch), []).append(continuation)
    for rows in by_batch.values():
        batch = rows[0].batch
        assert batch is not None  # the caller's part
        drawn = np.zeros((batch.num_rows, 1), dtype=np.int64)
        for continuation in rows:
            drawn[continuation.sequence] = continuation.reply.tokens[-1]
        logits = batch.forward(drawn)
        for continuation in rows:
            continuation.logits = logits[continuation.sequence]


def next_pieces(replies: Sequence[Reply], logits: Sequence[NDArray[Any]]) -> list[Piece | Exception]:
    """Draws a token of each reply, the same as each alone would; an error ends one reply and no other.

    Args:
        replies: B.
        logits: B times (V,) float32.
    """
    events: list[Any] = [_caught(reply._sampler.prepare, row) for reply, row in zip(replies, logits, strict=True)]
    fit = [i for i, prepared in enumerate(events) if not isinstance(prepared, Exception)]
    draws = _draw_each([replies[i]._sampler for i in fit], [events[i] for i in fit], [logits[i] for i in fit])
    for i, draw in zip(fit, draws, strict=True):
        events[i] = draw if isinstance(draw, Exception) else _caught(replies[i]._take, draw)
    return events


def _draw_each(
    samplers: Sequence[TokenSampler], prepared: Sequence[NDArray[Any]], logits: Sequence[NDArray[Any]]
) -> Sequence[Draw | Exception]:
    """A draw of each row, all at once; where that fails each by itself, so that the row which cannot be drawn is the one to end."""
    try:
        return draw_rows(samplers, prepared, logits)
    except Exception:
        rows = zip(samplers, prepared, logits, strict=True)
        return [_caught(lambda row: draw_rows([row[0]], [row[1]], [row[2]])[0], row) for row in rows]


def _caught(function: Callable[[Any], T], argument: object) -> T | Exception:
    try:
        return function(argument)
    except Exception as error:  # whatever it is, it is told to the one reply that it ends
        return error


def require_piece(event: Piece | Exception) -> Piece:
    """A piece, or the error raised that came in its place."""
    if isinstance(event, Exception):
        raise event
    return event
