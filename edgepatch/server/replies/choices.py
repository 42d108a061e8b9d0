"""One choice of a reply on its way: its pieces, and what the model gave its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgepatch.decoding.replies import Piece
from edgepatch.server.generations import Scored, Started


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
