"""What the replies of all endpoints have in common: an envelope, token counts, and how they stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepatch.decoding.replies import Piece
from edgepatch.server.model import ServedModel
from edgepatch.server.refusals import Refusal
from edgepatch.server.replies.choices import Choice, TokenLogprob
from edgepatch.server.requests import Order

if TYPE_CHECKING:
    from edgepatch.server.schemas.replies import ChatTokenLogprob, TopLogprob, Usage

DONE = b"data: [DONE]\n\n"


class ReplyWriter:
    """Writes the reply to one order: at once, or as server-sent events.

    Args:
        order: what was asked for.
        model: what is served.
    """

    id_prefix: str

    def __init__(self, order: Order, model: ServedModel) -> None:
        self._order, self._model = order, model
        self._id = f"{self.id_prefix}{secrets.token_hex(12)}"
        self._created = int(time.time())

    def reply(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole reply at once."""
        raise NotImplementedError

    def head(self, choices: Sequence[Choice]) -> bytes:
        """The events that a stream begins with."""
        raise NotImplementedError

    def part(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> bytes:
        """The events that a piece brings."""
        raise NotImplementedError

    def tail(self, choices: Sequence[Choice]) -> bytes:
        """The events that a stream ends with."""
        raise NotImplementedError

    def failure(self, refusal: Refusal) -> bytes:
        """The last events of a stream that cannot go on."""
        raise NotImplementedError


class ChunkWriter(ReplyWriter):
    """Writes what has choices, and streams as chunks of them."""

    kind: str
    chunk_kind: str

    def reply(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole reply at once."""
        return {**self._envelope(self.kind, [self._whole(c) for c in choices]), "usage": self._usage(choices)}

    def head(self, choices: Sequence[Choice]) -> bytes:
        """What each choice starts with."""
        return as_events(chunk for choice in choices for chunk in self._first_chunks(choice))

    def part(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> bytes:
        """The chunks of a piece."""
        return as_events(self._chunks(choice, piece, logprobs))

    def tail(self, choices: Sequence[Choice]) -> bytes:
        """The token counts, where they were asked for, and the mark of the end."""
        if not self._order.with_usage:
            return DONE
        return as_event({**self._envelope(self.chunk_kind, []), "usage": self._usage(choices)}) + DONE

    def failure(self, refusal: Refusal) -> bytes:
        """The error in place of a chunk."""
        return as_event(refusal.body())

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
            "choices": choices,
        }

    def _chunk(self, choice: Choice, **values: Any) -> dict[str, Any]:
        chunk = self._envelope(self.chunk_kind, [{"index": choice.index, **values}])
        return {**chunk, "usage": None} if self._order.with_usage else chunk

    def _usage(self, choices: Sequence[Choice]) -> Usage:
        asked = choices[:: self._order.num_choices]  # the choices of one prompt share it
        prompt, completion = sum(len(c.prompt) for c in asked), sum(c.num_tokens for c in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in asked)},
        }

    def _whole(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _first_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        return []

    def _chunks(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
        raise NotImplementedError


def chat_logprobs(model: ServedModel, entries: Sequence[TokenLogprob]) -> list[ChatTokenLogprob]:
    """Log-probabilities of a reply's tokens, each with its text and bytes."""
    return [
        {**_named(model, e.token_id, e.logprob or 0.0), "top_logprobs": [_named(model, i, value) for i, value in e.top]}
        for e in entries
    ]


def _named(model: ServedModel, token_id: int, logprob: float) -> TopLogprob:
    return {"token": model.token_text(token_id), "logprob": logprob, "bytes": list(model.token_bytes(token_id))}


def as_event(value: Mapping[str, Any], name: str = "") -> bytes:
    """A server-sent event, with a name where clients tell events apart by it."""
    line = f"event: {name}\ndata: " if name else "data: "
    return f"{line}{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def as_events(values: Iterable[Mapping[str, Any]]) -> bytes:
    """Server-sent events, one a value."""
    return b"".join(as_event(value) for value in values)
