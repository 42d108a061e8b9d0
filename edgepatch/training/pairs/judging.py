"""The filter judges of pairs by name, and what a domain makes of answers with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.judges.classifiers import load_judge
from edgepatch.judges.genders import gender_scores
from edgepatch.judges.scorers import ToxicityScorer, judge_bytes
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
    """A filter judge: "filter", "gender", or a Transformers text-classification folder.

    Raises:
        InputError: there is none, or it is the judge of reports.
        MissingExtraError: a folder needs torch and transformers.
    """
    if choice == "gender":
        return FilterJudge(gender_scores, {"judge": choice})
    scorer = load_judge(choice, unsafe_labels)
    if not isinstance(scorer, ToxicityScorer):
        labels = {"unsafe_labels": list(unsafe_labels)} if unsafe_labels else {}
        return FilterJudge(scorer.score, {"judge": scorer.name, "sha256": digest_of(Path(choice)), **labels})
    if scorer.name == "report":
        raise InputError(
            "--judge: the judge of reports must not filter what is trained on",
            hint="take filter, or a classifier of yours",
        )
    digest = hashlib.sha256(judge_bytes(scorer.judge)).hexdigest()
    return FilterJudge(scorer.score, {"judge": scorer.name, "sha256": digest})


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
