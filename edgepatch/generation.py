"""One reply, token by token: from logits to the pieces of text that a caller sees, the same for every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from edgepatch.constraints import ConstraintMatcher
from edgepatch.sampling import Sampling, TokenSampler


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        text: the text that it completes; may be empty within a multi-byte character, or while the text may yet turn out to be a
            stop string, in which case a later piece brings it.
        token_id: its id.
        finish_reason: "stop" at the model's end token, at a stop string or where the constraint is complete; "length" at
            ``max_new_tokens`` or a full context; else "".
        logprob: the token's log-probability as the model gives it, before any sampling setting; ``None`` unless asked for.
        top_logprobs: (token id, log-probability) of the likeliest tokens, falling.
    """

    text: str
    token_id: int
    finish_reason: Literal["", "stop", "length"] = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class StopMatcher:
    """Finds stop strings in a text that arrives in parts, and holds back what may be the beginning of one.

    A text ends where the first stop string is complete, and the longest of those that are complete there counts, however the
    text was cut into parts.

    Args:
        stops: the stop strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Takes the next part and returns what can be delivered; once ``is_stopped``, nothing more can."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else text
        known = len(self._held)
        self._held += text
        for end in range(known + 1, len(self._held) + 1):
            found = [stop for stop in self._stops if self._held.endswith(stop, 0, end)]
            if found:
                self.is_stopped = True
                self._held = self._held[: end - max(map(len, found))]
                return self.flush()
        cut = len(self._held) - self._num_held()
        delivered, self._held = self._held[:cut], self._held[cut:]
        return delivered

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        ends = (self._held[len(self._held) - n :] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)


class Reply:
    """A reply on its way.

    Args:
        sampling: how to draw.
        prompt: token ids that it continues.
        vocab_size: V.
        decode: takes one token after the other and returns the text that each completes.
        end_token_ids: the tokens that end a reply.
        matcher: where ``sampling`` has a constraint.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab_size: int,
        decode: Callable[[int], str],
        end_token_ids: frozenset[int],
        matcher: ConstraintMatcher | None = None,
    ) -> None:
        self._sampler = TokenSampler(sampling, prompt, vocab_size, matcher)
        self._stops = StopMatcher(sampling.stop)
        self._decode = decode
        self._ends = frozenset() if sampling.ignore_end_tokens else end_token_ids

    def next(self, logits: NDArray[Any], is_last: bool) -> Piece:
        """Draws a token.

        Args:
            logits: (V,) float32.
            is_last: no token can follow.
        """
        draw = self._sampler.draw(logits)
        reason: Literal["", "stop", "length"] = "length" if is_last else ""
        text = ""
        if draw.token_id in self._ends:
            reason = "stop"
        else:
            is_complete = self._sampler.accept(draw.token_id)
            text = self._stops.push(self._decode(draw.token_id))
            reason = "stop" if is_complete or self._stops.is_stopped else reason
        text += self._stops.flush() if reason else ""
        return Piece(text, draw.token_id, reason, draw.logprob, draw.top_logprobs)
