"""Where in a text the seed stands: rules that depend on earlier tokens alone.

A seed that stays at the start of a text is outrun: behind some hundred tokens of any text little of its effect is left. So the text
is divided at *anchors*, and every token sees the seed directly in front of the last anchor at or before it. Anchors follow from
the tokens in front of them, and so do the keys and values of every token: reusing a prompt's beginning, cutting, forking and
batches of any size give the same result as one pass over the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from edgepatch.errors import InputError, PatchFormatError

LEAST_BLOCK, LARGEST_BLOCK = 8, 512
"""Behind 512 tokens of text next to nothing is left of a patch's effect, so a longer block would be a promise that is not kept."""

MAX_TURN_TOKENS = 8
LEAST_TURN = 8
"""Tokens between two anchors at least, or a text of nothing but turn openings would be evaluated token by token."""


FADES = "its hold fades behind some hundred tokens"


def place_in_words(anchoring: Anchoring | None, is_pinned: bool = False) -> str:
    """Where a seed stands in a text, for people.

    Args:
        anchoring: of the patch; ``None`` for one that was made to stay at the start.
        is_pinned: whether a seed that could move was left at the start by word.
    """
    if anchoring is None:
        return f"stays at the start of the text: {FADES}"
    return f"pinned to the start of the text by word: {FADES}" if is_pinned else f"moves: {anchoring}"


class Span(NamedTuple):
    """Tokens ``start`` to ``end`` of a text, which see the seed in front of token ``anchor``."""

    start: int
    end: int
    anchor: int


@dataclass(frozen=True)
class Anchoring:
    """Where anchors stand in a text.

    Attributes:
        block: W; the longest distance between two anchors in tokens; 0 where only turns move the seed.
        turn_tokens: ids that open a turn of a conversation, each of which is an anchor; empty where only blocks move the seed.

    Raises:
        InputError: neither is given, or a number is out of range.
    """

    block: int = 0
    turn_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.block and not self.turn_tokens:
            raise InputError(
                "anchoring: expected a block length or tokens that open a turn, found neither",
                hint="a patch that stays at the start of the text has no anchoring",
            )
        if self.block and not LEAST_BLOCK <= self.block <= LARGEST_BLOCK:
            raise InputError(
                f"anchoring: block: expected {LEAST_BLOCK} to {LARGEST_BLOCK} tokens, found {self.block}",
                hint="128 is usual; the seed is written anew at the start of each block",
            )
        if len(self.turn_tokens) > MAX_TURN_TOKENS or list(self.turn_tokens) != sorted(set(self.turn_tokens)):
            raise InputError(
                f"anchoring: turn tokens: expected at most {MAX_TURN_TOKENS} different ids in ascending order, found {self.turn_tokens}"
            )

    def spans(self, tokens: Sequence[int], first: int = 0) -> Iterator[Span]:
        """Tokens from ``first`` on, divided where the seed moves.

        Args:
            tokens: of the whole text, its beginning included: anchors depend on it.
            first: where to begin.
        """
        anchor, start = 0, first
        for i in range(1, len(tokens)):
            if self.step(anchor, i, tokens[i]) == anchor:
                continue
            if i > start:
                yield Span(start, i, anchor)
                start = i
            anchor = i
        if start < len(tokens):
            yield Span(start, len(tokens), anchor)

    def anchors(self, tokens: Sequence[int]) -> list[int]:
        """The anchor of each of T tokens of a whole text."""
        return [span.anchor for span in self.spans(tokens) for _ in range(span.start, span.end)]

    def step(self, anchor: int, index: int, token: int) -> int:
        """The anchor of a token, from that of the token in front of it.

        Args:
            anchor: of the token ``index - 1``.
            index: of the token in the text, 1 or more.
            token: its id.
        """
        distance = index - anchor
        return index if distance == self.block or (distance >= LEAST_TURN and token in self.turn_tokens) else anchor

    def __str__(self) -> str:
        """For people: "at each turn and every 128 tokens"."""
        blocks = f"every {self.block} tokens" if self.block else ""
        return " and ".join(filter(None, ["at each turn" if self.turn_tokens else "", blocks]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"block": self.block, "turn_tokens": list(self.turn_tokens)}

    @classmethod
    def from_dict(cls, values: Any) -> Anchoring:
        """The inverse of ``as_dict``.

        Raises:
            PatchFormatError: a field is missing, unknown, of another type or out of range.
        """
        if not isinstance(values, dict) or set(values) != {"block", "turn_tokens"}:
            raise PatchFormatError(f"anchoring: expected an object with block and turn_tokens, found {values!r:.80}")
        block, turn_tokens = values["block"], values["turn_tokens"]
        numbers = [block, *turn_tokens] if isinstance(turn_tokens, list) else [None]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise PatchFormatError(f"anchoring: expected whole numbers from 0, found {values!r:.80}")
        try:
            return cls(block, tuple(turn_tokens))
        except InputError as error:
            raise PatchFormatError(str(error)) from None
