"""The filter judges of pairs by name, and what a domain makes of answers with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.judges.classifiers import TransformersClassifier, load_judge
from edgepatch.judges.genders import gender_scores
from edgepatch.training.pairs.domains import DomainPrompts, PairDomain
from edgepatch.training.pairs.filtering import PairConfig, Score
from edgepatch.training.pairs.makers import PairMaker, RefusalPairs, ScoredPairs
from edgepatch.training.pairs.provenance import digest_of


@dataclass(frozen=True)
class FilterJudge:
    """A filter judge: what scores, and what the provenance says of it."""

    score: Score
    identity: dict[str, Any]


def load_filter(choice: str, unsafe_labels: Sequence[str] = ()) -> FilterJudge:
    """A filter judge: "filter", "semantic", "gender", or a Transformers text-classification folder.

    Raises:
        InputError: there is none, or it is the judge of reports.
        MissingExtraError: a folder needs torch and transformers.
    """
    if choice == "gender":
        return FilterJudge(gender_scores, {"judge": choice})
    scorer = load_judge(choice, unsafe_labels, purpose="filter")
    if not isinstance(scorer, TransformersClassifier):
        return FilterJudge(scorer.score, {"judge": scorer.name, "sha256": scorer.sha256})
    labels = {"unsafe_labels": list(unsafe_labels)} if unsafe_labels else {}
    return FilterJudge(scorer.score, {"judge": scorer.name, "sha256": digest_of(Path(choice)), **labels})


def pair_maker(
    domain: PairDomain, choice: str | None, unsafe_labels: Sequence[str], asked: DomainPrompts, config: PairConfig
) -> tuple[PairMaker, dict[str, Any]]:
    """What makes pairs of answers, and what the provenance says of it.

    Args:
        domain: of the prompts.
        choice: a judge in place of the domain's own.
        unsafe_labels: of a classifier.
        asked: the prompts.
        config: limits of scored pairs.

    Raises:
        InputError: as ``load_filter``, or the domain takes no judge.
    """
    if domain.judge == "refusal":
        if choice is not None:
            raise InputError(
                f"--judge {choice}: pairs of the domain harm are made by whether a reply declines", hint="leave it out"
            )
        return RefusalPairs(asked.harmless), {"judge": domain.judge, "harmless": len(asked.harmless)}
    judge = load_filter(choice or domain.judge, unsafe_labels)
    return ScoredPairs(judge.score, config), judge.identity
