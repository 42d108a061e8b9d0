"""Where a pair stands in life: behind a text, in a later turn of a conversation, with the wrong answer already begun.

A patch that was trained on bare prompts alone acts on bare prompts alone. What stands in front is made of the pairs themselves, prompts
with good and with bad answers, and of the benign texts, so that a seed learns to act behind either.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import exp, log
from typing import Any

from edgepatch.text.messages import Message
from edgepatch.training.frozen.rows import Example
from edgepatch.training.pairs.preferences import Pair

LEAST_FRONT = 20
WORDS_A_TOKEN = 0.7
"""Of English text; lengths are drawn, so they need not be exact."""

BEHIND_TEXT, LATER_TURN, ANSWER_BEGUN = 0.5, 0.25, 0.25
"""Shares of the pairs. A begun answer may come on top of either (Qi et al., arXiv 2406.05946, section 4.1)."""

MOST_BEGUN = 16


class Contexts:
    """Puts pairs and benign texts behind others.

    Args:
        pairs: what is put in front of pairs, with their chosen and their rejected answers.
        benign_texts: what is put in front of both.
        most: longest text in front in tokens, about.
        rng_seed: of what is drawn.
        has_turns: whether the model knows conversations; else what would be a later turn stands behind a text as well.
    """

    def __init__(
        self, pairs: Sequence[Pair], benign_texts: Sequence[Any], most: int, rng_seed: int, has_turns: bool = True
    ) -> None:
        self._pairs, self._most, self._rng_seed, self._has_turns = list(pairs), most, rng_seed, has_turns
        self._benign = [text for text in benign_texts if isinstance(text, str)]

    def pair(self, pair: Pair, index: int) -> Pair:
        """The pair in its place; the same for every run with the same seed."""
        rng = random.Random(f"{self._rng_seed}-context-{index}")
        place = rng.random()
        if place < BEHIND_TEXT + (0 if self._has_turns else LATER_TURN):
            return replace(pair, prompt=_behind(pair.prompt, self._front(rng)))
        if place < BEHIND_TEXT + LATER_TURN:
            return replace(pair, prompt=self._later_turn(pair.prompt, rng))
        return pair

    def begun(self, example: Example, index: int) -> Example:
        """The example, one in four with some tokens of the rejected answer written."""
        rng = random.Random(f"{self._rng_seed}-begun-{index}")
        return example.begun(rng.randint(1, MOST_BEGUN)) if rng.random() < ANSWER_BEGUN else example

    def benign(self, text: Any, index: int) -> Any:
        """A benign text behind others like it, so that the tie to the bare model holds at every length."""
        rng = random.Random(f"{self._rng_seed}-benign-{index}")
        if not isinstance(text, str) or len(self._benign) < 2:
            return text
        return _joined(lambda: rng.choice(self._benign), self._words(rng)) + "\n" + text

    def _words(self, rng: random.Random) -> int:
        least = min(LEAST_FRONT, self._most)
        return max(1, int(WORDS_A_TOKEN * exp(rng.uniform(log(least), log(self._most)))))

    def _front(self, rng: random.Random) -> str:
        """A text of one kind: answers that were rejected, answers that were chosen, or benign text."""
        kind = rng.choice(["rejected", "chosen", "benign"] if self._benign else ["rejected", "chosen"])

        def one() -> str:
            if kind == "benign":
                return rng.choice(self._benign)
            pair = rng.choice(self._pairs)
            return f"{_last_text(pair.prompt)}{getattr(pair, kind)}"

        return _joined(one, self._words(rng))

    def _later_turn(self, prompt: str | Sequence[Message], rng: random.Random) -> tuple[Message, ...]:
        """The prompt as the last of two to four turns."""
        turns: list[Message] = []
        for _ in range(rng.randint(1, 3)):
            pair = rng.choice(self._pairs)
            answer = rng.choice([pair.chosen, pair.rejected])
            turns += [
                {"role": "user", "content": _last_text(pair.prompt)},
                {"role": "assistant", "content": answer.strip()},
            ]
        last: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        system = [message for message in last[:1] if message["role"] == "system"]
        return (*system, *turns, *last[len(system) :])


def _behind(prompt: str | Sequence[Message], front: str) -> str | tuple[Message, ...]:
    """The prompt with a text in front of it; in a conversation, in front of the first message that is the user's."""
    if isinstance(prompt, str):
        return f"{front}\n{prompt}"
    messages = list(prompt)
    place = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    messages[place] = {**messages[place], "content": f"{front}\n{messages[place]['content']}"}
    return tuple(messages)


def _last_text(prompt: str | Sequence[Message]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _joined(one: Any, num_words: int) -> str:
    """Texts in a row until there are so many words, cut to them."""
    words: list[str] = []
    while len(words) < num_words:
        words += one().split() or ["-"]
    return " ".join(words[:num_words])
