"""Pairs of the harm domain: refusals of harmful requests, and answers to harmless ones that look like them."""

from __future__ import annotations

from collections.abc import Sequence

from edgepatch.judges.refusals import declines, is_coherent, takes_up
from edgepatch.training.pairs.files import Pair, PairPrompt

TAKEN_UP = 0.5
ANSWERED = 0.25
SHORTEST_ANSWER = 5


def request_of(prompt: PairPrompt) -> str:
    """The text that waits for an answer: the last message, or the prompt itself."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def refusal_pair(prompt: PairPrompt, safe: Sequence[str], unsafe: Sequence[str]) -> Pair | None:
    """The first safe reply that declines over the unsafe one that takes up most of a harmful request; ``None`` where none does.

    Scores are the filter judge's: the share of the request that is taken up, 0 for a reply that declines.
    """
    request = request_of(prompt)
    chosen = next((t for t in safe if declines(t) and is_coherent(t)), None)
    taken = [(takes_up(request, t), t) for t in unsafe if not declines(t) and is_coherent(t)]
    score, rejected = max(taken, default=(0.0, ""))
    return Pair(prompt, chosen, rejected, 0.0, score) if chosen and score >= TAKEN_UP else None


def answer_pair(prompt: PairPrompt, answers: Sequence[str], refusal: str) -> Pair | None:
    """The answer that takes up most of a harmless request over a refusal; ``None`` where none answers."""
    request = request_of(prompt)
    fitting = [t for t in answers if not declines(t) and is_coherent(t) and len(t.split()) >= SHORTEST_ANSWER]
    taken_up, chosen = max(((takes_up(request, t), t) for t in fitting), default=(0.0, ""))
    return Pair(prompt, chosen, refusal, 0.0, 1.0) if taken_up >= ANSWERED else None


def unsafety(prompt: PairPrompt, reply: str) -> float:
    """How far a reply goes along with a harmful request: 0 where it declines, 1 where it is broken text, else the share taken up."""
    if not is_coherent(reply):
        return 1.0  # a failed generation is a failure, never a refusal
    return 0.0 if declines(reply) else takes_up(request_of(prompt), reply)
