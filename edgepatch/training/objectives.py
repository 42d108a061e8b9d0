"""What a step lowers: cross-entropy of the chosen answers, the distance to a teacher, or DPO with an anchor on the chosen answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepatch.progress import Progress, silent
from edgepatch.training.distillation import Targets
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.frozen.memory import Memory
from edgepatch.training.frozen.rows import Example

if TYPE_CHECKING:
    import torch

TABLE_ROWS = 16


@dataclass(frozen=True)
class Student:
    """The model with the policy in front of it, as it is in one step.

    Attributes:
        models: the frozen ones.
        model: what evaluates the text.
        memory, embeddings: of the virtual tokens, as ``FrozenModels.logits`` takes them.
    """

    models: FrozenModels
    model: Any
    memory: Memory
    embeddings: torch.Tensor | None = None

    def log_probabilities(self, examples: Sequence[Example]) -> torch.Tensor:
        """(B, A) of each example's A answers."""
        return self.models.log_probabilities(self.model, examples, self.memory, self.embeddings)

    def logits(self, examples: Sequence[Example]) -> torch.Tensor:
        """(N, V) of all answers' tokens."""
        return self.models.logits_of(examples, self.model, self.memory, self.embeddings)


class Objective(ABC):
    """A stage's loss.

    Args:
        examples: of one task, prompt, chosen and rejected each.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    @abstractmethod
    def loss(self, student: Student, part: Sequence[int], batch: Sequence[int]) -> torch.Tensor:
        """The share that some examples have in the loss of a batch."""

    def _first_answers(self, part: Sequence[int]) -> list[Example]:
        return [Example(self.examples[i].prompt, self.examples[i].answers[:1]) for i in part]

    def _tokens(self, batch: Sequence[int]) -> int:
        return sum(len(self.examples[i].answers[0]) for i in batch)


class CrossEntropy(Objective):
    """SFT: nats a token of the chosen answers."""

    def loss(self, student: Student, part: Sequence[int], batch: Sequence[int]) -> torch.Tensor:
        return -student.log_probabilities(self._first_answers(part)).sum() / self._tokens(batch)


class Distillation(Objective):
    """KL(teacher || student) in nats a token of the chosen answers, where early tokens weigh more.

    Args:
        examples: of one task.
        targets: of all tasks.
        first: number of the task's first example among them.
    """

    def __init__(self, examples: Sequence[Example], targets: Targets, first: int) -> None:
        super().__init__(examples)
        self._targets, self._first = targets, first

    def loss(self, student: Student, part: Sequence[int], batch: Sequence[int]) -> torch.Tensor:
        from edgepatch.training.losses import distillation_losses

        logits = student.logits(self._first_answers(part))
        device = student.models.device
        numbers, whole = ([self._first + i for i in items] for items in (part, batch))
        losses = distillation_losses(logits, *self._targets.of(numbers, device))
        return (losses * self._targets.weights(numbers, device)).sum() / self._targets.weights(whole, device).sum()


class Preference(Objective):
    """DPO, and the cross-entropy of the chosen answers as an anchor: DPO alone lowers their likelihood (Pal et al., arXiv 2402.13228).

    Args:
        examples: of one task.
        reference: (N, 2) log-probabilities of chosen and rejected answers under the reference.
        beta: strength of the tie to it.
        nll_weight: of the anchor.
    """

    def __init__(self, examples: Sequence[Example], reference: torch.Tensor, beta: float, nll_weight: float) -> None:
        super().__init__(examples)
        self._reference, self._beta, self._nll_weight = reference, beta, nll_weight

    def loss(self, student: Student, part: Sequence[int], batch: Sequence[int]) -> torch.Tensor:
        from edgepatch.training.losses import dpo_losses

        policy, reference = student.log_probabilities([self.examples[i] for i in part]), self._reference[list(part)]
        losses = dpo_losses(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], self._beta)
        anchor = -policy[:, 0].sum() / self._tokens(batch)
        return losses.sum() / len(batch) + self._nll_weight * anchor


def answer_table(student: Student, examples: Sequence[Example], progress: Progress = silent) -> torch.Tensor:
    """(N, 2) answer log-probabilities, without a gradient."""
    import torch

    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    table = torch.empty(len(examples), 2, device=student.models.device)
    with torch.no_grad():
        for start in range(0, len(order), TABLE_ROWS):
            progress("reference", start, len(order))
            part = order[start : start + TABLE_ROWS]
            table[part] = student.log_probabilities([examples[i] for i in part])
    progress("reference", len(order), len(order))
    return table
