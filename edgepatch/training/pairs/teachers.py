"""Who teaches: a safer model, or the model itself behind a written safety text, which the patch learns to do without."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.files.reading import read_text
from edgepatch.text.messages import Message
from edgepatch.training.pairs.files import PairPrompt
from edgepatch.training.pairs.filtering import key_of
from edgepatch.training.pairs.samplers import PromptTooLongError, Sampler

MAX_TEXT_BYTES = 2**20
SELF = "self"
"""In place of a model: the one that is to be patched."""


def read_safety_texts(path: Path) -> tuple[str, ...]:
    """Safety texts of a file, which say the same in other words: paragraphs, with an empty line between two of them.

    Raises:
        InputError: it cannot be read, is not UTF-8, or holds no text.
    """
    paragraphs = read_text(path, MAX_TEXT_BYTES, "safety text").split("\n\n")
    texts = tuple(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())
    if not texts:
        raise InputError(f"{path} holds no safety text", hint="write what the model should do, in 100 to 250 words")
    return texts


def text_of(prompt: PairPrompt, texts: Sequence[str]) -> str:
    """The text that a prompt's teacher reads: one of them, the same in every run."""
    return texts[int.from_bytes(hashlib.sha256(key_of(prompt).encode()).digest()[:8], "big") % len(texts)]


def instructed(prompt: PairPrompt, text: str) -> PairPrompt:
    """The prompt behind a safety text: in a conversation as the system message, in front of one that is there; else in front."""
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    if prompt[0]["role"] != "system":
        return ({"role": "system", "content": text}, *prompt)
    first: Message = {**prompt[0], "content": f"{text}\n\n{prompt[0]['content']}"}
    return (first, *prompt[1:])


class InstructedSampler(Sampler):
    """Puts a safety text in front of every prompt.

    Args:
        sampler: answers; it stays open.
        texts: one or more, which say the same.
    """

    def __init__(self, sampler: Sampler, texts: Sequence[str]) -> None:
        self._sampler, self.texts, self.lookahead = sampler, tuple(texts), sampler.lookahead

    @property
    def identity(self) -> dict[str, Any]:
        """The sampler's own, and the texts."""
        return {**self._sampler.identity, "texts": list(self.texts)}

    def _behind(self, prompt: PairPrompt) -> PairPrompt:
        return instructed(prompt, text_of(prompt, self.texts))

    def check(self, prompt: PairPrompt, sampling: Sampling) -> None:
        """Counts the text too."""
        try:
            self._sampler.check(self._behind(prompt), sampling)
        except PromptTooLongError as error:
            raise PromptTooLongError(f"behind the teacher's safety text, {error}", error.hint) from None

    def sample(self, prompt: PairPrompt, sampling: Sampling, count: int) -> list[str]:
        return self._sampler.sample(self._behind(prompt), sampling, count)

    def start(self, prompt: PairPrompt, sampling: Sampling, count: int) -> Callable[[], list[str]]:
        return self._sampler.start(self._behind(prompt), sampling, count)
