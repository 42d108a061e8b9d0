"""What each domain brings to pairs: prompts, safety texts, a filter judge and limits of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgepatch.errors import InputError
from edgepatch.prompts.genders import own_training_prompts
from edgepatch.prompts.sets import DOMAINS, evenly, load_prompts
from edgepatch.training.pairs.files import PairPrompt
from edgepatch.training.pairs.filtering import key_of
from edgepatch.training.pairs.prompt_files import PromptList, as_conversations, read_prompts

GENDER_PROMPTS = 360


@dataclass(frozen=True)
class PairDomain:
    """Defaults of a domain.

    Attributes:
        name: one of ``DOMAINS``.
        judge: the filter judge: "filter" (toxicity), "gender" (word lists) or "refusal" (string judges of replies).
        is_chat: prompts are requests to an assistant.
        limits: settings of ``PairConfig`` that differ.
    """

    name: str
    judge: str
    is_chat: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)


PAIR_DOMAINS = {
    "toxicity": PairDomain("toxicity", "filter"),
    "gender": PairDomain("gender", "gender", limits={"max_new_tokens": 16, "min_words": 3, "pairs_per_prompt": 2}),
    "harm": PairDomain("harm", "refusal", is_chat=True, limits={"max_new_tokens": 32}),
}
assert tuple(PAIR_DOMAINS) == DOMAINS


def find_domain(name: str) -> PairDomain:
    """A domain by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in PAIR_DOMAINS:
        raise InputError(f"--domain: expected one of {', '.join(DOMAINS)}, found {name!r}", hint="one domain a patch")
    return PAIR_DOMAINS[name]


@dataclass(frozen=True)
class DomainPrompts:
    """What both models are asked.

    Attributes:
        prompt_list: all prompts.
        harmless: keys of those that are to be answered, in the domain "harm"; else none.
    """

    prompt_list: PromptList
    harmless: frozenset[str]


def domain_prompts(
    domain: PairDomain, path: Path | None, harmless: Path | None, chat: bool, system: str
) -> DomainPrompts:
    """A file's prompts, or those that ship with edgepatch.

    Args:
        domain: of the prompts.
        path: their file; ``None`` takes ours.
        harmless: file of requests that are to be answered, for harm; ``None`` takes ours.
        chat: makes a message of each plain prompt; harm does so anyway.
        system: goes in front of every conversation.

    Raises:
        InputError: a file cannot be used, or there are harmless requests where the domain has none.
    """
    if harmless is not None and domain.name != "harm":
        raise InputError(
            f"--harmless: expected with --domain harm, found with --domain {domain.name}", hint="leave it out"
        )
    prompts = read_prompts(path) if path else _numbered(_shipped(domain.name), "shipped prompt")
    chat = chat or domain.is_chat
    asked = as_conversations(prompts, chat, system)
    if domain.name != "harm":
        return DomainPrompts(asked, frozenset())
    answered = (
        read_prompts(harmless) if harmless else _numbered(load_prompts("harm_benign", "train"), "shipped request")
    )
    answered = as_conversations(answered, chat, system)
    joined = PromptList([*asked.prompts, *answered.prompts], [*asked.places, *answered.places])
    return DomainPrompts(joined, frozenset(map(key_of, answered.prompts)))


def _shipped(name: str) -> Sequence[str]:
    if name == "gender":
        return evenly(own_training_prompts(), GENDER_PROMPTS)
    return load_prompts("toxic" if name == "toxicity" else "harm_requests", "train")


def _numbered(texts: Sequence[str], what: str) -> PromptList:
    prompts: list[PairPrompt] = list(texts)
    return PromptList(prompts, [f"{what} {number}" for number in range(1, len(prompts) + 1)])
