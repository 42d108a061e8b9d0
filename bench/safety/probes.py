"""What is asked of a model, and where: a domain's prompts behind other text and in later turns, and the value of what comes back.

What stands in front is foreign: texts that no training has seen.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench import datasets
from edgepatch.bench.likelihoods import tokens_behind
from edgepatch.bench.safety import gender, gender_prompts, harm
from edgepatch.bench.safety.continuations import SampleConfig, sample_prompt, score_rows
from edgepatch.bench.safety.domain import Outcome
from edgepatch.bench.safety.toxicity import ToxicityDomain
from edgepatch.errors import InputError
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.prompts.sets import evenly, load_benign_text, load_prompts
from edgepatch.runtimes.session import Session
from edgepatch.text.messages import Message

FRONTS = (128, 512, 800, 1500)
"""Tokens in front; a length that the model's context has no room for is left out."""

KINDS = ("toxic", "benign")
TURN = 5
REPLY_WORDS = 30
ROOM = 96
"""Tokens for a prompt and its continuation."""


@dataclass(frozen=True)
class Place:
    """Where a prompt stands.

    Attributes:
        front_tokens: of other text in front of it.
        front_kind: "toxic", "benign", "" for none, or "conversation".
        turn: of the conversation that the prompt is.
    """

    front_tokens: int = 0
    front_kind: str = ""
    turn: int = 1

    @classmethod
    def of(cls, name: str) -> Place:
        """The place with such a name: "toxic-512", or "turn-5"."""
        kind, _, number = name.rpartition("-")
        return cls(0, "conversation", int(number)) if kind == "turn" else cls(int(number), kind)

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"turn-{self.turn}" if self.turn > 1 else f"{self.front_kind}-{self.front_tokens}"


def places(context_length: int, has_chat: bool, fronts: Sequence[int] = FRONTS) -> list[Place]:
    """All places that a context has room for, the plain one first."""
    behind = [Place(n, kind) for n in fronts if n + ROOM <= context_length for kind in KINDS]
    return [Place(), *behind, *([Place(0, "conversation", TURN)] if has_chat else [])]


@dataclass(frozen=True)
class Texts:
    """Prompts, and foreign texts to put in front of them."""

    prompts: list[str]
    toxic: list[str]
    benign: list[str]


def choose_texts(data: Path | None, num_prompts: int, domain: str = "toxicity") -> Texts:
    """A domain's prompts for evaluation; in front of them public texts where a data folder is named, else toxic prompts of our own."""
    toxic = load_prompts("toxic", "eval")
    if domain == "toxicity":
        prompts, rest = toxic[:num_prompts], toxic[num_prompts:] or toxic
    else:
        prompts, rest = evenly(_prompts_of(domain, data), num_prompts), toxic
    if data is None:
        return Texts(prompts, rest, load_benign_text("eval"))
    rows = [case.prompt for case in datasets.rtp_challenging(data)][datasets.RTP_SPLIT :]
    return Texts(prompts, rows, datasets.wikitext_paragraphs(data, "test", 200))


def _prompts_of(domain: str, data: Path | None) -> list[str]:
    if domain == "gender":
        return [prompt.text for prompt in gender_prompts.evaluation_prompts(None)]
    return [request for _, request in harm.evaluation_requests(data)]


def passage(runtime: Session, texts: Sequence[str], start: int, length: int) -> list[int]:
    """``length`` tokens of texts one behind the other, from number ``start`` on; BOS in front where the model wants one."""
    tokens = runtime.encode("")
    for i in itertools.count(start):
        tokens = tokens + tokens_behind(runtime, texts[i % len(texts)] + "\n")
        if len(tokens) >= length:
            return tokens[:length]
    raise AssertionError("count has no end")


def _front_text(runtime: Session, texts: Sequence[str], start: int, length: int) -> str:
    """About ``length`` tokens of texts one behind the other, cut between words, for a message of a conversation."""
    words: list[str] = []
    for i in itertools.count(start):
        words += texts[i % len(texts)].split()
        count = len(tokens_behind(runtime, " ".join(words)))
        if count >= length:
            return " ".join(words[: len(words) * length // count])
    raise AssertionError("count has no end")


class Probe(ABC):
    """A domain, asked anywhere.

    Args:
        texts: its prompts, and what stands in front.
        config: continuations a prompt, where they are sampled.

    Attributes:
        domain: its name.
        fronts: tokens in front.
    """

    domain: str
    fronts: tuple[int, ...] = FRONTS[:2]

    def __init__(self, texts: Texts, config: SampleConfig) -> None:
        self.texts, self.config = texts, config

    def tokens(self, runtime: Session, place: Place, number: int) -> list[int]:
        """Token ids of prompt ``number`` in its place; each prompt has other texts in front of it."""
        if place.turn > 1:
            return self._in_turn(runtime, self._earlier(place, number), self.texts.prompts[number])
        return self._behind(runtime, place, number)

    @abstractmethod
    def values(self, runtime: Session, rows: Sequence[list[int]]) -> NDArray[np.float32]:
        """(N, S) from 0 (safe) to 1 behind N prompts; a failed generation is unsafe. The largest of each row counts."""

    def _earlier(self, place: Place, number: int) -> list[Message]:
        """The turns in front of the last one: toxic messages, benign replies."""
        messages: list[Message] = []
        for turn in range(place.turn - 1):
            i = number * place.turn + turn
            reply = " ".join(self.texts.benign[i % len(self.texts.benign)].split()[:REPLY_WORDS])
            messages += [
                {"role": "user", "content": self.texts.toxic[i % len(self.texts.toxic)]},
                {"role": "assistant", "content": reply},
            ]
        return messages

    def _front(self, place: Place) -> list[str]:
        return self.texts.toxic if place.front_kind == "toxic" else self.texts.benign

    def _in_turn(self, runtime: Session, earlier: list[Message], prompt: str) -> list[int]:
        return runtime.tokens([*earlier, {"role": "user", "content": prompt}])

    def _behind(self, runtime: Session, place: Place, number: int) -> list[int]:
        prompt = self.texts.prompts[number]
        if not place.front_tokens:
            return runtime.tokens(prompt)
        front = passage(runtime, self._front(place), 7 * number, place.front_tokens)
        return front + tokens_behind(runtime, prompt)


class ToxicityProbe(Probe):
    """Continuations under the report judge (RealToxicityPrompts' protocol): the mean of the largest values is EMT."""

    domain = "toxicity"
    fronts = FRONTS

    def values(self, runtime: Session, rows: Sequence[list[int]]) -> NDArray[np.float32]:
        names = self.texts.prompts
        texts = [sample_prompt(runtime, row, self.config, names[i % len(names)]) or [] for i, row in enumerate(rows)]
        return score_rows(texts, ToxicityScorer.load("report").score, self.config.samples_per_prompt)


class GenderProbe(Probe):
    """How uneven the next word is; in a later turn the prompt opens the model's own reply."""

    domain = "gender"

    def values(self, runtime: Session, rows: Sequence[list[int]]) -> NDArray[np.float32]:
        return gender.gender_values(gender.masses(runtime, rows)).astype(np.float32)[:, None]

    def _in_turn(self, runtime: Session, earlier: list[Message], prompt: str) -> list[int]:
        asked: Message = {"role": "user", "content": "Write something."}
        return runtime.tokens([*earlier, asked]) + tokens_behind(runtime, prompt)


class HarmProbe(Probe):
    """Replies to requests in a chat; what stands in front is the beginning of the same message."""

    domain = "harm"

    def values(self, runtime: Session, rows: Sequence[list[int]]) -> NDArray[np.float32]:
        replies = runtime.generate_batch(rows, harm.GREEDY)
        return np.array([[harm.is_success(reply)] for reply in replies], dtype=np.float32)

    def _behind(self, runtime: Session, place: Place, number: int) -> list[int]:
        request = self.texts.prompts[number]
        if place.front_tokens:
            request = f"{_front_text(runtime, self._front(place), 7 * number, place.front_tokens)}\n{request}"
        return runtime.tokens(harm.chat(request))


def outcome(domain: ToxicityDomain, runtime: Session, place: Place, num_items: int, rng_seed: int) -> Outcome:
    """Toxicity behind other text, on the prompts that the plain measure has too, each with other texts in front of it."""
    every = domain.evaluation_prompts()
    items = evenly(every, num_items)
    foreign = choose_texts(domain.data, 0)
    texts = Texts(items, [text for text in foreign.toxic if text not in items] or every, foreign.benign)
    probe = ToxicityProbe(texts, domain.config)
    prompts = (probe.tokens(runtime, place, number) for number in range(len(items)))
    return domain.measure(runtime, items, prompts, rng_seed)


PROBES: dict[str, type[Probe]] = {probe.domain: probe for probe in (ToxicityProbe, GenderProbe, HarmProbe)}


def probe_of(domain: str) -> type[Probe]:
    """What is asked in a domain.

    Raises:
        InputError: the domain is not known.
    """
    if domain not in PROBES:
        raise InputError(f"domain: expected one of {', '.join(PROBES)}, found {domain}")
    return PROBES[domain]
