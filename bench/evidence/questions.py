"""What a user wants to know of a model, and the cells that answer it: a plan of the evidence runner's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgepatch.bench.columns import Column
from edgepatch.bench.evidence.cells import SHARED, CellKey, EvidenceConfig
from edgepatch.bench.evidence.forms import reference_of
from edgepatch.bench.evidence.probing import Probe
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.length import LARGEST_SEED
from edgepatch.bench.safety.probes import KINDS, ROOM, TURN, Place
from edgepatch.bench.safety.retained import Sizes
from edgepatch.errors import InputError

PLAIN_CONTEXT, CONTEXT_STEP = 512, 128
EVERY_TEXT = 10**6
RESERVED = ("bare", "patch", "safe_prompt", "reference")
"""Arms that mean something else."""


FULL_RETAINED = Sizes(30, 6, 400)


@dataclass(frozen=True)
class Amounts:
    """How much is measured of every form.

    Attributes:
        prompts, samples: of toxicity.
        items: prompts of gender, requests of harm.
        retained: of what must stay.
        fronted: prompts behind other text.
        fronts: tokens in front.
        pairs: of each domain, for margins.
    """

    prompts: int = 350
    samples: int = 25
    items: int = 200
    retained: Sizes = FULL_RETAINED
    fronted: int = 60
    fronts: tuple[int, ...] = (128, 512, 1500)
    pairs: int = 300


QUICK = Amounts(24, 8, 16, Sizes(6, 1, 16), 6, (512,), 48)
"""About two minutes for a model of 135 million parameters on two cores; intervals are wide."""


@dataclass(frozen=True)
class Scope:
    """What an arm is measured on, where that is not everything.

    Attributes:
        domains: those; none for all.
        num_forms: the first so many, in the order in which they are named; ``None`` for all.
    """

    domains: tuple[str, ...] = ()
    num_forms: int | None = None


EVERYTHING = Scope()


@dataclass(frozen=True)
class Question:
    """What the user wants to know.

    Attributes:
        model: GGUF file, ONNX folder or Transformers folder.
        patches: files; none measures the bare model alone.
        types: further forms, as ``made_columns`` takes them.
        domains: those that were named; none takes all that can be measured.
        amounts: how much.
        judge, unsafe_labels: who reports toxicity.
        harm_judge: who reports harm: "rules", which know "Sure, here is ...", or "semantic".
        num_workers, num_threads: processes, and threads of each.
        is_quick: whether the amounts are those of a first impression.
        beside: name -> files of further patches that are measured on the same prompts.
        is_instructed: whether the written safety text that people use without a patch is measured too.
        cluster: address of a Ray cluster that measures instead of processes here; "" for none.
        scopes: arm -> what it is measured on; an arm that is not named is measured on everything.
    """

    model: Path
    patches: tuple[Path, ...] = ()
    types: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    amounts: Amounts = Amounts()
    judge: str = "report"
    harm_judge: str = "rules"
    unsafe_labels: tuple[str, ...] = ()
    num_workers: int = 2
    num_threads: int = 1
    is_quick: bool = False
    cluster: str = ""
    beside: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    is_instructed: bool = False
    scopes: Mapping[str, Scope] = field(default_factory=dict)

    @property
    def arms(self) -> dict[str, tuple[Path, ...]]:
        """Arm -> files of its patches, in the order of tables: the bare model, what is judged, what stands beside."""
        judged = {"patch": self.patches} if self.patches else {}
        return {"bare": (), **({"safe_prompt": ()} if self.is_instructed else {}), **judged, **self.beside}

    def require_names(self) -> None:
        """Looks at the names of what stands beside.

        Raises:
            InputError: one is another arm's, or cannot be the name of a file.
        """
        for name in self.beside:
            if name in RESERVED or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,30}", name):
                raise InputError(
                    f"--beside: expected a name of small letters and digits, none of {', '.join(RESERVED)}; found {name!r}",
                    hint="for example --beside next=next.safetensors",
                )


# What is measured.


def plan_model(
    config: EvidenceConfig, arms: Sequence[str], fronts: Sequence[str], scopes: Mapping[str, Scope] | None = None
) -> list[CellKey]:
    """Every cell, those of one opening together.

    Args:
        config: domains and columns.
        arms: the bare model first; behind it whatever is compared with it.
        fronts: places behind other text; measured on the first column.
        scopes: arm -> what it is measured on.
    """
    keys = list[CellKey]()
    for number, column in enumerate(config.chosen_columns()):
        for arm in arms:
            scope = (scopes or {}).get(arm, EVERYTHING)
            if scope.num_forms is None or number < scope.num_forms:
                domains = [name for name in config.domains if name in (scope.domains or config.domains)]
                keys += _arm_on(arm, column.name, domains, fronts if number == 0 else (), has_margins=len(arms) > 1)
    return keys


def _arm_on(
    arm: str, column: str, domains: Sequence[str], fronts: Sequence[str], has_margins: bool
) -> Iterator[CellKey]:
    """Every cell of an arm on a form."""
    yield from (CellKey("safety", domain, arm, column) for domain in domains)
    if arm == "safe_prompt":
        # Each domain has a text of its own, and held-out pairs behind a text would be other pairs.
        yield from (CellKey("retained", domain, arm, column) for domain in domains)
        return
    yield CellKey("retained", SHARED, arm, column)
    if has_margins:
        yield from (CellKey("margins", domain, arm, column) for domain in domains)
    if "toxicity" in domains:
        yield from (CellKey("safety", "toxicity", arm, column, front=front) for front in fronts)


def config_of(question: Question, columns: Sequence[Column], probe: Probe, num_virtual_tokens: int) -> EvidenceConfig:
    """The evidence runner's settings for a question."""
    amounts, domains = question.amounts, question.domains or ("toxicity", "gender", "harm")
    sizes = amounts.retained if probe.has_chat else replace(amounts.retained, num_requests=0)
    counts = {"toxicity": amounts.prompts, "gender": amounts.items, "harm": amounts.items}
    longest = max((0, *amounts.fronts)) + ROOM
    return EvidenceConfig(
        items={domain: (count,) * 3 for domain, count in counts.items()},
        retained=(sizes, sizes),
        rng_seeds=(),
        domains=tuple(domain for domain in domains if probe.has_chat or domain != "harm"),
        arms=("bare", "patch"),
        composition=False,
        samples=SampleConfig(amounts.samples),
        num_sequences=min(amounts.samples, 25),
        context_length=_context(PLAIN_CONTEXT + num_virtual_tokens, probe),
        long_context=_context(longest + max(num_virtual_tokens, LARGEST_SEED), probe),
        num_texts_kept=EVERY_TEXT,
        known_columns=tuple(columns),
        reference=reference_of(columns),
        num_threads=question.num_threads,
        num_sentence_pairs=0,
        num_margin_pairs=amounts.pairs,
        num_fronted=min(amounts.fronted, amounts.prompts),
        judge=question.judge,
        harm_judge=question.harm_judge,
        unsafe_labels=question.unsafe_labels,
    )


def _context(positions: int, probe: Probe) -> int:
    return min(-(-positions // CONTEXT_STEP) * CONTEXT_STEP, probe.num_positions)


def fronts_of(amounts: Amounts, probe: Probe, num_virtual_tokens: int) -> tuple[list[str], list[str]]:
    """Places that the context has room for, and why others are skipped."""
    room = probe.num_positions - max(num_virtual_tokens, LARGEST_SEED)
    skipped = [
        f"{count} tokens in front: the context of {probe.num_positions} tokens has no room for them"
        for count in amounts.fronts
        if count + ROOM > room
    ]
    places = [Place(count, KINDS[0]).name for count in amounts.fronts if count + ROOM <= room]
    if probe.has_chat:
        return [*places, Place(0, "conversation", TURN).name], skipped
    return places, [*skipped, f"turn {TURN}: the model has no chat template"]


def require_domains(question: Question, probe: Probe) -> list[str]:
    """Why a domain is skipped.

    Raises:
        InputError: a domain that was named cannot be measured.
    """
    if probe.has_chat:
        return []
    reason = f"{question.model.name} has no chat template, and harm is asked in conversations"
    if "harm" in question.domains:
        raise InputError(f"--domain harm: {reason}", hint="name an instructed model, or leave harm out")
    return [f"harm: {reason}", "over-refusal: the same"]
