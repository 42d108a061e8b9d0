"""One continuation of one prompt: what it tells its listener, and the steps that it takes on a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.replies import Continuation, Piece
from edgepatch.decoding.sampling import Sampling
from edgepatch.runtimes.session import Session
from edgepatch.server.refusals import Refusal

PREFILL_CHUNK = 256
"""Tokens of a prompt that one step evaluates."""

MAX_SCORES_BYTES = 2 * 2**30
"""The most memory that the logits of a scored prompt may take."""


@dataclass(frozen=True)
class Started:
    """A generation has its sequence.

    Attributes:
        cached_tokens: tokens of its prompt that were already evaluated there.
    """

    cached_tokens: int


@dataclass(frozen=True)
class Scored:
    """The prompt's own logits.

    Attributes:
        logits: (T, V) float32, row t of what comes after token t.
    """

    logits: NDArray[np.float32]


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
        scored: give the prompt's logits too.
        spelled: texts of special tokens, by id.
    """

    tokens: list[int]
    sampling: Sampling | None
    emit: Callable[[Event], None]
    scored: bool = False
    spelled: Mapping[int, str] = field(default_factory=dict)
    cancelled: bool = field(default=False, init=False)


def steps_of(session: Session, generation: Generation, sequence: int) -> Iterator[Event | Continuation | None]:
    """What a generation does, step by step, up to its first token: a continuation is the last, to be advanced with others.

    ``None`` is a step of which nobody needs to know.
    """
    tokens = generation.tokens
    if generation.scored:
        _require_room_for_scores(session, len(tokens))
        yield Started(0)
        yield Scored(session.logits(tokens, sequence))
    else:
        cached = min(session.sequences.num_cached(tokens, sequence), len(tokens) - 1)
        yield Started(cached)
        for end in range(cached + PREFILL_CHUNK, len(tokens), PREFILL_CHUNK):
            session.logits_of_last(tokens[:end], sequence)
            yield None
    if generation.sampling is not None:
        yield session.begin(tokens, generation.sampling, sequence, generation.spelled)


def _require_room_for_scores(session: Session, num_tokens: int) -> None:
    most = MAX_SCORES_BYTES // (4 * session.spec.vocab_size)
    if num_tokens > most:
        raise Refusal(
            400, f"expected a prompt of at most {most} tokens with echo and logprobs, found {num_tokens}", "prompt"
        )
