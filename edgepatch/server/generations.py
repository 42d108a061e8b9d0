"""One continuation of one prompt: what it tells its listener, and the steps that it takes on a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.constraints import CompiledConstraint
from edgepatch.decoding.replies import Continuation, Piece
from edgepatch.decoding.sampling import Sampling
from edgepatch.runtimes.session import Session

PREFILL_CHUNK = 256
"""Tokens of a prompt that one step evaluates."""

MAX_LOGITS_BYTES = 64 * 2**20
"""The most memory that the logits of a scored prompt take at a time: log-probabilities are made of them part by part."""


@dataclass(frozen=True)
class Started:
    """A generation has its sequence.

    Attributes:
        cached_tokens: tokens of its prompt that were already evaluated there.
    """

    cached_tokens: int


@dataclass(frozen=True)
class Scored:
    """What the model gives the tokens of a prompt of T tokens, all but the first.

    Attributes:
        logprobs: (T - 1,) of the tokens themselves.
        top_ids: (T - 1, N) the likeliest tokens in their place, falling.
        top_logprobs: (T - 1, N) their log-probabilities.
    """

    logprobs: NDArray[np.float64]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float64]


@dataclass(frozen=True)
class Finished:
    """The last event of a generation; with an error where it failed."""

    error: BaseException | None = None


Event = Started | Scored | Piece | Finished


@dataclass(eq=False)
class Generation:
    """One continuation of one prompt.

    Attributes:
        tokens: the prompt.
        sampling: ``None`` generates nothing, for scoring alone.
        emit: takes the events, on the scheduler's thread.
        scored: give the log-probabilities of the prompt too.
        compiled: the sampling's constraint, where it has one.
        num_logprobs: likeliest tokens to name for each of the prompt.
        spelled: texts of special tokens, by id.
    """

    tokens: list[int]
    sampling: Sampling | None
    emit: Callable[[Event], None]
    scored: bool = False
    compiled: CompiledConstraint | None = None
    num_logprobs: int = 0
    spelled: Mapping[int, str] = field(default_factory=dict)
    cancelled: bool = field(default=False, init=False)


def steps_of(session: Session, generation: Generation, sequence: int) -> Iterator[Event | Continuation | None]:
    """What a generation does, step by step, up to its first token: a continuation is the last, to be advanced with others.

    ``None`` is a step of which nobody needs to know.
    """
    tokens = generation.tokens
    if generation.scored:
        yield Started(0)
        yield from _scores(session, generation, sequence)
    else:
        cached = session.sequences.adopt(tokens, sequence)
        yield Started(cached)
        for end in range((cached // PREFILL_CHUNK + 1) * PREFILL_CHUNK, len(tokens), PREFILL_CHUNK):
            session.logits_of_last(tokens[:end], sequence)
            yield None
    if generation.sampling is not None:
        yield session.begin(
            tokens, generation.sampling, sequence, compiled=generation.compiled, spelled=generation.spelled
        )


def _scores(session: Session, generation: Generation, sequence: int) -> Iterator[Scored | None]:
    """Log-probabilities of a prompt, part by part, so that the logits of all of it are never there at once."""
    tokens, count = generation.tokens, generation.num_logprobs
    size = max(MAX_LOGITS_BYTES // (4 * session.spec.vocab_size), 1)
    parts = [Scored(np.empty(0), np.empty((0, count), np.int64), np.empty((0, count)))]
    for start in range(0, len(tokens) - 1, size):
        end = min(start + size, len(tokens) - 1)
        parts.append(_scored(session.logits(tokens[:end], sequence, end - start), tokens[start + 1 : end + 1], count))
        yield None
    columns = zip(*((part.logprobs, part.top_ids, part.top_logprobs) for part in parts), strict=True)
    yield Scored(*(np.concatenate(column) for column in columns))


def _scored(logits: NDArray[np.float32], tokens: Sequence[int], count: int) -> Scored:
    """Log-probabilities of tokens, each by the (V,) logits in front of it."""
    logprobs, top_ids, top_logprobs = np.empty(len(tokens)), np.empty((len(tokens), count), np.int64), []
    for number, (token, row) in enumerate(zip(tokens, logits, strict=True)):
        values = row.astype(np.float64) - float(row.max())
        values -= np.log(np.exp(values).sum())
        best = np.argpartition(-values, min(count, len(values) - 1))[:count]
        best = best[np.argsort(-values[best], kind="stable")]
        logprobs[number], top_ids[number] = values[token], best
        top_logprobs.append(values[best])
    return Scored(logprobs, top_ids, np.array(top_logprobs).reshape(len(tokens), count))
