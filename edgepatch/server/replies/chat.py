"""Replies and chunks of ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgepatch.decoding.replies import Piece
from edgepatch.server.model import ServedModel
from edgepatch.server.replies.choices import Choice, TokenLogprob
from edgepatch.server.replies.streams import ReplyStream
from edgepatch.server.replies.writer import ChunkWriter, chat_logprobs
from edgepatch.server.requests import Order


class ChatWriter(ChunkWriter):
    """``chat.completion`` and its chunks."""

    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

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

    def _first_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(choice, delta=delta, logprobs=None, finish_reason=None)]

    def _chunks(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
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
        return {"content": chat_logprobs(self._model, entries), "refusal": None}
