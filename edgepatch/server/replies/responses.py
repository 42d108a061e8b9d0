"""Replies of ``/v1/responses``: items that grow, and the events that tell of it. A reply at once is what the last event holds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgepatch.decoding.replies import Piece
from edgepatch.server.model import ServedModel
from edgepatch.server.refusals import Refusal
from edgepatch.server.replies.choices import Choice, TokenLogprob
from edgepatch.server.replies.streams import ReplyStream
from edgepatch.server.replies.writer import ReplyWriter, as_event, chat_logprobs
from edgepatch.server.requests import Order

Kind = Literal["message", "reasoning"]
Events = Iterator[dict[str, Any]]
ID_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
PART_KINDS = {"message": "output_text", "reasoning": "reasoning_text"}


def _identifier(kind: str) -> str:
    return f"{ID_PREFIXES[kind]}{secrets.token_hex(12)}"


@dataclass
class TextItem:
    """A message or a thought, which has one part.

    Attributes:
        kind: which of them.
        place: its number among the items.
        text: what has come so far.
        logprobs: of a message's tokens.
    """

    kind: Kind
    place: int
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    id: str = ""

    def __post_init__(self) -> None:
        self.id = _identifier(self.kind)

    @property
    def part(self) -> dict[str, Any]:
        """Its one part, as it is now."""
        part = {"type": PART_KINDS[self.kind], "text": self.text}
        return {**part, "annotations": [], "logprobs": list(self.logprobs)} if self.kind == "message" else part

    def entry(self, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The item with some parts."""
        kind: dict[str, Any] = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
        return {"id": self.id, "type": self.kind, "status": status, **kind, "content": parts}

    def event(self, name: str, **values: Any) -> dict[str, Any]:
        """An event about its part."""
        return {
            "type": f"response.{name}",
            "item_id": self.id,
            "output_index": self.place,
            "content_index": 0,
            **values,
        }


class Output:
    """The items of a reply, complete ones and the one that grows.

    Attributes:
        items: the complete ones.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._growing: TextItem | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been said, thoughts left out."""
        growing = self._growing is not None and self._growing.kind == "message"
        return not growing and all(item["type"] == "reasoning" for item in self.items)

    def add_text(self, kind: Kind, text: str, logprobs: Sequence[Any] = ()) -> Events:
        """Adds to the item that grows, or begins one."""
        item = self._growing
        if item is None or item.kind != kind:
            yield from self.close()
            item = self._growing = TextItem(kind, len(self.items))
            yield _item_event("added", item.place, item.entry("in_progress", []))
            yield item.event("content_part.added", part=item.part)
        item.text += text
        item.logprobs += logprobs
        more = {"logprobs": list(logprobs)} if kind == "message" else {}
        yield item.event(f"{PART_KINDS[kind]}.delta", delta=text, **more)

    def close(self, status: str = "completed", logprobs: Sequence[Any] = ()) -> Events:
        """Ends the item that grows."""
        item, self._growing = self._growing, None
        if item is None:
            return
        item.logprobs += logprobs if item.kind == "message" else ()
        more = {"logprobs": list(item.logprobs)} if item.kind == "message" else {}
        yield item.event(f"{PART_KINDS[item.kind]}.done", text=item.text, **more)
        yield item.event("content_part.done", part=item.part)
        yield from self._end(item.entry(status, [item.part]))

    def add_call(self, call: dict[str, Any]) -> Events:
        """Adds a call, which is complete at once."""
        yield from self.close()
        function, place = call["function"], len(self.items)
        entry = {"id": _identifier("function_call"), "type": "function_call", "status": "completed"}
        entry |= {"call_id": call["id"], "name": function["name"], "arguments": function["arguments"]}
        yield _item_event("added", place, {**entry, "status": "in_progress", "arguments": ""})
        event = {"item_id": entry["id"], "output_index": place}
        kind = "response.function_call_arguments"
        yield {"type": f"{kind}.delta", **event, "delta": function["arguments"]}
        yield {"type": f"{kind}.done", **event, "name": function["name"], "arguments": function["arguments"]}
        yield from self._end(entry)

    def _end(self, entry: dict[str, Any]) -> Events:
        self.items.append(entry)
        yield _item_event("done", len(self.items) - 1, entry)


def _item_event(name: str, place: int, entry: dict[str, Any]) -> dict[str, Any]:
    return {"type": f"response.output_item.{name}", "output_index": place, "item": entry}


class ResponseWriter(ReplyWriter):
    """``response`` and its events."""

    id_prefix = "resp_"

    def __init__(self, order: Order, model: ServedModel) -> None:
        super().__init__(order, model)
        self._stream, self._output = ReplyStream(order.format), Output()
        self._num_events = self._num_tokens = self._num_thought = 0
        self._held, self._logprobs = "", list[TokenLogprob]()

    def reply(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole reply at once."""
        (choice,) = choices
        for number, text in enumerate(choice.texts):
            self._drain(self._grow(text, choice.logprobs[number : number + 1]))
        self._drain(self._finish(choice))
        return self._response(choice)

    def head(self, choices: Sequence[Choice]) -> bytes:
        """The reply without anything in it."""
        begun = self._response(None)
        return self._sent({"type": f"response.{name}", "response": begun} for name in ("created", "in_progress"))

    def part(self, choice: Choice, piece: Piece, logprobs: list[TokenLogprob]) -> bytes:
        """What a piece adds to the items."""
        return self._sent(self._grow(piece.text, logprobs))

    def tail(self, choices: Sequence[Choice]) -> bytes:
        """The ends of the items, and the whole reply."""
        (choice,) = choices
        ends, response = self._sent(self._finish(choice)), self._response(choice)
        return ends + self._sent([{"type": f"response.{response['status']}", "response": response}])

    def failure(self, refusal: Refusal) -> bytes:
        """The error, and the reply as far as it came."""
        error = {"code": refusal.code or "server_error", "message": str(refusal), "param": refusal.param or None}
        failed = self._response(None) | {"status": "failed"}
        failed["error"] = {
            "code": "server_error" if refusal.status >= 500 else "invalid_prompt",
            "message": str(refusal),
        }
        return self._sent([{"type": "error", **error}, {"type": "response.failed", "response": failed}])

    def _sent(self, events: Iterable[dict[str, Any]]) -> bytes:
        sent = []
        for event in events:
            sent.append(as_event({**event, "sequence_number": self._num_events}, event["type"]))
            self._num_events += 1
        return b"".join(sent)

    @staticmethod
    def _drain(events: Events) -> None:
        for _ in events:
            pass

    def _grow(self, text: str, logprobs: Sequence[TokenLogprob]) -> Events:
        thought, said = self._stream.push(text)
        self._num_tokens += 1
        if thought:
            self._num_thought, self._logprobs = self._num_tokens, []
            yield from self._output.add_text("reasoning", thought)
        else:
            self._logprobs += logprobs
        yield from self._say(said)

    def _say(self, said: str) -> Events:
        """What is said; blanks wait where a call may follow, of which they are no part."""
        self._held += said
        ready = self._held.rstrip() if self._order.format.tools else self._held
        self._held = self._held[len(ready) :]
        if ready:
            yield from self._output.add_text("message", ready, self._taken_logprobs())

    def _taken_logprobs(self) -> list[Any]:
        entries, self._logprobs = self._logprobs, []
        return list(chat_logprobs(self._model, entries)) if self._order.num_logprobs is not None else []

    def _finish(self, choice: Choice) -> Events:
        thought, rest, calls = self._stream.finish()
        if thought:
            yield from self._output.add_text("reasoning", thought)
        left = rest if calls else self._held + rest
        if left or (self._output.is_empty and not calls):
            yield from self._output.add_text("message", left, self._taken_logprobs())
        yield from self._output.close(self._status(choice), self._taken_logprobs())
        for call in calls:
            yield from self._output.add_call(call)

    def _status(self, choice: Choice) -> str:
        return "incomplete" if choice.finish_reason == "length" else "completed"

    def _response(self, choice: Choice | None) -> dict[str, Any]:
        """The reply; without its choice as it begins."""
        status = self._status(choice) if choice else "in_progress"
        sampling = self._order.sampling
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if choice else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
            "output": list(self._output.items),
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature if sampling else None,
            "top_p": sampling.top_p if sampling else None,
            "truncation": "disabled",
            "usage": self._usage(choice) if choice else None,
            **self._order.repeated,
        }

    def _usage(self, choice: Choice) -> dict[str, Any]:
        num_read, num_cached = len(choice.prompt), choice.cached_tokens
        return {
            "input_tokens": num_read,
            "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": num_read - num_cached},
            "output_tokens": choice.num_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_thought},
            "total_tokens": num_read + choice.num_tokens,
        }
