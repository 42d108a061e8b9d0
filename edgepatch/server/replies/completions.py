"""Replies and chunks of ``/v1/completions``, which have one shape."""

from __future__ import annotations

import codecs
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgepatch.decoding.replies import Piece
from edgepatch.server.model import ServedModel
from edgepatch.server.replies.choices import Choice, TokenLogprob
from edgepatch.server.replies.writer import ChunkWriter
from edgepatch.server.requests import Order

if TYPE_CHECKING:
    from edgepatch.server.schemas.replies import CompletionLogprobs


class CompletionWriter(ChunkWriter):
    """``text_completion``, whose chunks have the same shape."""

    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, order: Order, model: ServedModel) -> None:
        super().__init__(order, model)
        self._offsets: defaultdict[int, int] = defaultdict(int)  # of each choice, as its decoder
        self._decoders: defaultdict[int, codecs.IncrementalDecoder] = defaultdict(
            lambda: codecs.getincrementaldecoder("utf-8")("replace")
        )
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

    def _first_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        if not self._order.echo:
            return []
        logprobs = self._logprobs(choice, self.prompt_logprobs.get(choice.index, []))
        return [self._chunk(choice, text=self._echo(choice), logprobs=logprobs, finish_reason=None)]

    def _chunks(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> list[dict[str, Any]]:
        if not (piece.text or logprobs or piece.finish_reason):
            return []
        reason = piece.finish_reason or None
        return [self._chunk(choice, text=piece.text, logprobs=self._logprobs(choice, logprobs), finish_reason=reason)]

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if self._order.num_logprobs is None:
            return None
        name, offsets, decoder = self._model.token_text, [], self._decoders[choice.index]
        for entry in entries:
            # In the text, where special tokens have no place and a part of a character is none yet.
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(decoder.decode(self._model.token_bytes(entry.token_id)))
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
