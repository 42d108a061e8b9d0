"""What the clients of a loaded server ask, and what each kind of request must bring."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Ending = Literal["reply", "cancel", "refusal"]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
WORDS = ("river", "bread", "train", "winter", "garden", "letter", "market", "bridge", "music", "harbour")
SHARES: Mapping[str, int] = {
    "chat stream": 40,
    "chat": 15,
    "responses stream": 10,
    "completion": 10,
    "cancelled": 10,
    "malformed": 10,
    "over-long": 5,
}
"""Kind -> of a hundred requests."""


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        kind: of ``SHARES``.
        path: where it goes.
        body: a JSON value, or bytes that are none.
        ending: what must come of it.
        code: of the refusal, where it must be one.
    """

    kind: str
    path: str
    body: Any
    ending: Ending = "reply"
    code: str = ""

    @property
    def is_streamed(self) -> bool:
        """Whether the reply comes in events."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


def draw(rng: random.Random, model: str, context_length: int, num_tokens: int) -> Request:
    """A request of a random kind.

    Args:
        rng: of the client.
        model: what clients call it.
        context_length: more tokens than this make a prompt over-long.
        num_tokens: the most that a reply may have.
    """
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    text = f"Write about a {rng.choice(WORDS)} and a {rng.choice(WORDS)}, number {rng.randrange(10**6)}."
    message = {"role": "user", "content": text}
    chat: dict[str, Any] = {"model": model, "messages": [message], "max_tokens": num_tokens}
    makers: Mapping[str, Callable[[], Request]] = {
        "chat stream": lambda: Request(kind, CHAT, {**chat, "stream": True}),
        "chat": lambda: Request(kind, CHAT, chat),
        "responses stream": lambda: Request(
            kind, RESPONSES, {"model": model, "input": text, "max_output_tokens": num_tokens, "stream": True}
        ),
        "completion": lambda: Request(kind, COMPLETIONS, {"model": model, "prompt": text, "max_tokens": num_tokens}),
        "cancelled": lambda: Request(kind, CHAT, {**chat, "stream": True}, "cancel"),
        "malformed": lambda: _malformed(rng, chat),
        "over-long": lambda: _over_long(chat, context_length),
    }
    return makers[kind]()


def _malformed(rng: random.Random, chat: dict[str, Any]) -> Request:
    kinds: list[tuple[Any, str]] = [
        (b'{"model": ', "invalid_json"),
        ({**chat, "temperature": "hot"}, "invalid_value"),
        ({**chat, "id_slot": 0}, "unknown_field"),
        ({"model": chat["model"]}, "missing_field"),
        ({**chat, "grammar": "root ::= ("}, "invalid_input"),
    ]
    body, code = rng.choice(kinds)
    return Request("malformed", CHAT, body, "refusal", code)


def _over_long(chat: dict[str, Any], context_length: int) -> Request:
    message = {"role": "user", "content": "word " * (context_length + 10)}
    return Request("over-long", CHAT, {**chat, "messages": [message]}, "refusal", "context_length_exceeded")
