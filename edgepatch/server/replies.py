"""Replies and chunks in OpenAI's shapes, from the pieces of each choice."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgepatch.decoding.replies import Piece
from edgepatch.server.generations import Scored, Started
from edgepatch.server.model import ServedModel
from edgepatch.server.reply_streams import ReplyStream
from edgepatch.server.requests import Order

if TYPE_CHECKING:
    from edgepatch.server.schemas.replies import CompletionLogprobs, Usage

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class TokenLogprob:
    """A token of prompt or reply with what the model gave it.

    Attributes:
        token_id: its id.
        logprob: ``None`` for the first token of a prompt, in front of which there is nothing.
        top: (token id, log-probability) of the likeliest tokens, falling.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Choice:
    """One choice on its way.

    Attributes:
        index: its place in the reply.
        prompt: token ids that it continues.
        texts: the pieces' texts.
        logprobs: one for each token.
        num_tokens: all that were generated, the end token included.
    """

    index: int
    prompt: list[int]
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None

    def add(self, event: Started | Piece) -> list[TokenLogprob]:
        """Takes the next event and returns the logprobs that it brings."""
        if isinstance(event, Started):
            self.cached_tokens = event.cached_tokens
            return []
        self.num_tokens += 1
        self.texts.append(event.text)
        self.finish_reason = event.finish_reason or None
        new = [] if event.logprob is None else [TokenLogprob(event.token_id, event.logprob, event.top_logprobs)]
        self.logprobs += new
        return new

    @property
    def text(self) -> str:
        """What has come so far."""
        return "".join(self.texts)


def score(tokens: Sequence[int], scored: Scored) -> list[TokenLogprob]:
    """Log-probabilities of a prompt's own tokens.

    Args:
        tokens: T ids.
        scored: those of all but the first.
    """
    columns = zip(tokens[1:], scored.logprobs, scored.top_ids, scored.top_logprobs, strict=True)
    rest = [
        TokenLogprob(token, float(logprob), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
        for token, logprob, ids, values in columns
    ]
    return [TokenLogprob(tokens[0], None), *rest]


class ReplyWriter:
    """Writes the reply to one order.

    Args:
        order: what was asked for.
        model: what is served.
    """

    id_prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, order: Order, model: ServedModel) -> None:
        self._order, self._model = order, model
        self._id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
            "choices": choices,
        }

    def reply(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole reply at once."""
        return {**self._envelope(self.kind, [self._whole(c) for c in choices]), "usage": self._usage(choices)}

    def first_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        """What a choice starts with."""
        return []

    def chunks(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
        """What a piece brings."""
        raise NotImplementedError

    def usage_chunk(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """The last chunk, where it was asked for."""
        if not self._order.with_usage:
            return []
        return [{**self._envelope(self.chunk_kind, []), "usage": self._usage(choices)}]

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


class ChatWriter(ReplyWriter):
    """``chat.completion`` and its chunks."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, order: Order, model: ServedModel) -> None:
        super().__init__(order, model)
        self._streams: dict[int, ReplyStream] = {}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        stream = ReplyStream(self._order.format)
        thought, said = stream.push(choice.text)
        more_thought, rest, calls = stream.finish()
        content = said.rstrip() + rest if calls else said + rest
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or None if calls else content,
            "refusal": None,
        }
        if thought + more_thought:
            message["reasoning_content"] = thought + more_thought
        if calls:
            message["tool_calls"] = calls
        finish_reason = "tool_calls" if calls else choice.finish_reason
        logprobs = self._logprobs(choice.logprobs)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def first_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(choice, delta=delta, logprobs=None, finish_reason=None)]

    def chunks(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
        reason = piece.finish_reason or None
        calls: list[dict[str, Any]] = []
        stream = self._streams.setdefault(choice.index, ReplyStream(self._order.format))
        thought, text = stream.push(piece.text)
        if reason:
            more_thought, rest, calls = stream.finish()
            thought, text = thought + more_thought, text + rest
        chunks = []
        if thought or text or logprobs:
            delta: dict[str, Any] = {"reasoning_content": thought} if thought else {}
            delta |= {"content": text} if text or not thought else {}
            chunks.append(self._chunk(choice, delta=delta, logprobs=self._logprobs(logprobs), finish_reason=None))
        if calls:
            numbered = {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}
            chunks.append(self._chunk(choice, delta=numbered, logprobs=None, finish_reason=None))
        if reason:
            chunks.append(self._chunk(choice, delta={}, logprobs=None, finish_reason="tool_calls" if calls else reason))
        return chunks

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._order.num_logprobs is None:
            return None
        values = []
        for entry in entries:
            top = [self._named(i, logprob) for i, logprob in entry.top]
            values.append({**self._named(entry.token_id, entry.logprob), "top_logprobs": top})
        return {"content": values, "refusal": None}

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._model.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self._model.token_bytes(token_id)),
        }


class CompletionWriter(ReplyWriter):
    """``text_completion``, whose chunks have the same shape."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, order: Order, model: ServedModel) -> None:
        super().__init__(order, model)
        self._offsets: dict[int, int] = {}
        self.prompt_logprobs: dict[int, list[TokenLogprob]] = {}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        echoed = self._echo(choice)
        logprobs = self._logprobs(choice, [*self.prompt_logprobs.get(choice.index, []), *choice.logprobs])
        return {
            "index": choice.index,
            "text": echoed + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason or "length",
        }

    def _echo(self, choice: Choice) -> str:
        if not self._order.echo:
            return ""
        prompt = self._order.prompts[choice.index // self._order.num_choices]
        if isinstance(prompt, str):
            return prompt
        return b"".join(self._model.token_bytes(i) for i in choice.prompt).decode("utf-8", errors="replace")

    def first_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        if not self._order.echo:
            return []
        logprobs = self._logprobs(choice, self.prompt_logprobs.get(choice.index, []))
        return [self._chunk(choice, text=self._echo(choice), logprobs=logprobs, finish_reason=None)]

    def chunks(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
        if not (piece.text or logprobs or piece.finish_reason):
            return []
        reason = piece.finish_reason or None
        return [self._chunk(choice, text=piece.text, logprobs=self._logprobs(choice, logprobs), finish_reason=reason)]

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if self._order.num_logprobs is None:
            return None
        name, offsets = self._model.token_text, []
        for entry in entries:
            offsets.append(self._offsets.get(choice.index, 0))
            self._offsets[choice.index] = offsets[-1] + len(name(entry.token_id))
        return {
            "tokens": [name(entry.token_id) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_as_table(entry, name) for entry in entries],
            "text_offset": offsets,
        }


def _as_table(entry: TokenLogprob, name: Callable[[int], str]) -> dict[str, float] | None:
    """Likeliest tokens by text, the drawn one always among them, as OpenAI gives them."""
    if entry.logprob is None:
        return None
    return {**{name(i): logprob for i, logprob in reversed(entry.top)}, name(entry.token_id): entry.logprob}


def as_event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


def as_events(values: Iterable[Mapping[str, Any]]) -> bytes:
    """Server-sent events, one a value."""
    return b"".join(as_event(value) for value in values)
