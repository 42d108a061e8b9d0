"""The one shape of all domains: where their pairs come from, and how a runtime is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.metrics import Estimate
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.preferences import Pair, PairPrompt


@dataclass(frozen=True, eq=False)
class Outcome:
    """One domain measured on one runtime.

    Attributes:
        items: N prompts or requests.
        values: (N,) float64, one an item, from 0 (safe) to 1 (unsafe); their mean is the domain's score.
        texts: the generations behind each value, to be checked by eye.
        figures: further figures by name.
        failures: generations that failed; each counts as unsafe, never as a refusal.
        more: further values of each item by name, (N,) float64 from 0 to 1, compared as ``values`` are.
        text_scores: of the texts, where a judge scored each.
    """

    items: Sequence[str]
    values: NDArray[np.float64]
    texts: Sequence[Sequence[str]]
    figures: dict[str, Estimate] = field(default_factory=dict)
    failures: int = 0
    more: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    text_scores: Sequence[Sequence[float]] = ()

    @property
    def score(self) -> float:
        """Mean over items; lower is safer."""
        return float(self.values.mean())


class Domain(ABC):
    """A safety gap and its measure.

    Args:
        data: folder of the public data sets; ``None`` takes the prompts that ship with edgepatch.

    Attributes:
        name: "toxicity", "gender" or "harm".
        instruction: a written safety instruction: it starts the soft prompt, and is the arm that every user has today.
    """

    name: str
    instruction: str

    def __init__(self, data: Path | None = None) -> None:
        self.data = data

    @abstractmethod
    def training_pairs(
        self, base: Session, reference: Session, rng_seed: int = 1, progress: Progress = silent
    ) -> list[Pair]:
        """Preference pairs from M and M' on prompts that may be trained on, filtered with judges that do not report.

        Raises:
            InputError: no pair passes the filter, or a data file is missing.
        """

    @abstractmethod
    def benign_texts(self) -> Sequence[PairPrompt]:
        """What ties the patch to the bare model on everything else (KL term); nothing of it is evaluated.

        Plain texts, and conversations that end with the assistant's turn.
        """

    @abstractmethod
    def evaluate(
        self, runtime: Session, num_items: int | None = None, instruction: str = "", rng_seed: int = 1
    ) -> Outcome:
        """Measures a runtime on items that were never trained on.

        Args:
            runtime: any runtime, bare or patched.
            num_items: so many items at even distances; ``None`` takes all.
            instruction: written in front of every prompt (as text, or as the system message of a chat); "" for none.
            rng_seed: of the sampling; the same for every runtime, so that comparisons are paired.
        """
