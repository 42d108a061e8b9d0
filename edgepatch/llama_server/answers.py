"""Answers of a server beside the references: what it says of the next token, and what that proves."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from edgepatch.llama_server.client import Reply
from edgepatch.llama_server.references import Distance, Reference, effect_of, make_references, measure
from edgepatch.runtimes.session import Session
from edgepatch.text.messages import Message

USER_1, USER_2, USER_3 = (
    "What should I say to a neighbour who is too loud?",
    "And if that does not help?",
    "Thank you. Is there more?",
)
CONVERSATION: list[Message] = [
    {"role": "user", "content": USER_1},
    {"role": "assistant", "content": "Ask kindly, and say what you need."},
    {"role": "user", "content": USER_2},
    {"role": "assistant", "content": "Write a letter to the landlord."},
    {"role": "user", "content": USER_3},
]
TURNS = (CONVERSATION[:1], CONVERSATION[:3], CONVERSATION)
NUM_LOGPROBS = 20
LEAST_LOGPROB = -1e4
"""A probability of 0 is written as a huge negative number."""


def new_conversations() -> tuple[list[Message], ...]:
    """Three turns of one conversation, and others that nobody can have foreseen: recorded answers prove nothing."""
    drawn = (f"Tell me something about rivers, number {secrets.randbelow(10**6)}." for _ in range(2))
    others: list[list[Message]] = [[{"role": "user", "content": text}] for text in drawn]
    return (*TURNS, *others)


class Examiner:
    """Knows what the patched and the bare model answer, and judges replies by it.

    Args:
        session: of the patch, whose seed stands where the server's does.
        prompts: token ids; as many as ``new_conversations`` gives.
    """

    def __init__(self, session: Session, prompts: Sequence[list[int]]) -> None:
        self.references: list[Reference] = make_references(session, prompts)
        self.silent: list[Reference] = []
        """Answered with a part of a character, for which llama-server gives no log probabilities."""
        self._session = session

    @property
    def telling(self) -> Reference:
        """Of the first turns to which the server gives log probabilities, the one whose answer the patch changes most."""
        first_turns = [self.references[0], *self.references[len(TURNS) :]]
        return max([r for r in first_turns if r not in self.silent] or self.references, key=effect_of)

    def distance(self, replies: Sequence[Reply], references: Sequence[Reference] = ()) -> Distance | None:
        """Of replies from the references, in this order; ``None`` where no reply has log probabilities."""
        asked = references or self.references
        pairs = [(reference, self.logprobs(reply)) for reference, reply in zip(asked, replies, strict=True)]
        self.silent += [reference for reference, logprobs in pairs if not logprobs and reference not in self.silent]
        answers = [(reference, logprobs) for reference, logprobs in pairs if logprobs]
        return measure(answers) if answers else None

    def logprobs(self, reply: Reply) -> Mapping[int, float]:
        """Token id -> log probability of the first generated token; empty where the reply has none."""
        rows = reply.value("completion_probabilities", 0, "top_logprobs") or reply.value(
            "choices", 0, "logprobs", "content", 0, "top_logprobs"
        )
        named = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        pairs = [(self._token_of(row), row.get("logprob")) for row in named]
        return {
            token: float(value)
            for token, value in pairs
            if token is not None and isinstance(value, (int, float)) and math.isfinite(value) and value > LEAST_LOGPROB
        }

    def _token_of(self, row: Mapping[str, Any]) -> int | None:
        """The token of an entry, by its id, or by its bytes where the server gives no ids."""
        token = row.get("id")
        if token is None and isinstance(row.get("bytes"), list):
            token = self._by_bytes.get(repr(row["bytes"]))
        is_known = isinstance(token, int) and 0 <= token < self._session.spec.vocab_size
        return token if is_known else None

    @cached_property
    def _by_bytes(self) -> dict[str, int | None]:
        """Each token's bytes, where no other has the same."""
        tokens: dict[str, int | None] = {}
        for token, data in enumerate(self._session.token_bytes()):
            name = repr(list(data))
            tokens[name] = None if name in tokens else token
        return tokens


def verdict(distance: Distance) -> str:
    """The hazard that a distance speaks of; "" for none."""
    if distance.is_patched:
        return ""
    return {"patched": "weak", "bare": "bare"}.get(distance.nearest, "other")


def evidence_of(distance: Distance) -> str:
    """A distance in words."""
    return f"log probabilities {distance.patched:.4f} from patched, {distance.bare:.4f} from bare"
