"""Training rows: a prompt with one answer or several, packed so that what they share is evaluated once.

A row holds ``prompt | answer | answer ...``. Each answer sees the prompt and itself, at the positions that it would have alone, so a
packed row gives the same logits as one row for each answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgepatch.seeds.anchoring import Anchoring

if TYPE_CHECKING:
    import torch

PADDING = -1


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt (BOS included) and of the answers to it."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of the packed row."""
        return len(self.prompt) + sum(map(len, self.answers))

    def cut(self, max_tokens: int) -> Example:
        """At most so many tokens of prompt and longest answer together: the prompt loses its start (BOS stays), then answers their end."""
        longest = max(map(len, self.answers))
        room = max(1, max_tokens - min(longest, max_tokens // 2))
        prompt = (
            self.prompt if len(self.prompt) <= room else self.prompt[:1] + self.prompt[len(self.prompt) - room + 1 :]
        )
        return Example(prompt, tuple(answer[: max_tokens - len(prompt)] for answer in self.answers))

    def begun(self, count: int) -> Example:
        """The same with so many tokens of the last answer already written: the other answers have to turn back from there."""
        *others, last = self.answers
        count = min(count, len(last) - 1)
        return Example(self.prompt + last[:count], (*others, last[count:]))

    def unpacked(self) -> list[Example]:
        """One row for each answer."""
        return [Example(self.prompt, (answer,)) for answer in self.answers]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, and which position predicts which token of which answer.

    Attributes:
        ids: (B, T) int64.
        positions: (B, T) int64 from the start of the prompt; an answer goes on where the prompt ended.
        segments: (B, T) int64: 0 for the prompt, 1, 2, ... for its answers, ``PADDING``.
        anchors: (B, T) int64: in front of which position each token sees the seed; ``None`` where it never moves.
        rows, sources, targets, owners: (N,) int64 each: position ``sources[i]`` of row ``rows[i]`` predicts the token ``targets[i]``
            of answer ``owners[i]``, counted over the whole batch.
        num_answers: of the whole batch.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    anchors: torch.Tensor | None
    rows: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor
    num_answers: int


def make_batch(examples: Sequence[Example], device: str, anchoring: Anchoring | None = None) -> Batch:
    """Rows of the examples, padded to the longest.

    Args:
        examples: B of them, each with at least one token of prompt.
        device: "cpu" or "cuda".
        anchoring: where the seed moves; ``None`` leaves it at the start.
    """
    import torch

    longest = max(e.length for e in examples)
    ids, positions = (np.zeros((len(examples), longest), dtype=np.int64) for _ in range(2))
    segments = np.full((len(examples), longest), PADDING, dtype=np.int64)
    anchors = np.zeros_like(ids)
    predictions: list[NDArray[np.int64]] = []
    num_answers = 0
    for row, example in enumerate(examples):
        start = len(example.prompt)
        ids[row, :start], positions[row, :start], segments[row, :start] = example.prompt, np.arange(start), 0
        if anchoring:
            anchors[row, : example.length] = _anchors_of(example, anchoring)
        cursor = start
        for segment, answer in enumerate(example.answers, 1):
            end = cursor + len(answer)
            ids[row, cursor:end], segments[row, cursor:end] = answer, segment
            positions[row, cursor:end] = np.arange(start, start + len(answer))
            # The last token of the prompt predicts the first of every answer.
            sources = np.concatenate([[start - 1], np.arange(cursor, end - 1)])[: len(answer)]
            predictions.append(
                np.stack([np.full(len(answer), row), sources, answer, np.full(len(answer), num_answers)]).astype(
                    np.int64
                )
            )
            cursor, num_answers = end, num_answers + 1
    rows, sources, targets, owners = np.concatenate(predictions, axis=1)
    arrays = {
        "ids": ids,
        "positions": positions,
        "segments": segments,
        "rows": rows,
        "sources": sources,
        "targets": targets,
        "owners": owners,
    }
    tensors = {name: torch.from_numpy(a).to(device) for name, a in arrays.items()}
    moved = torch.from_numpy(anchors).to(device) if anchors.any() else None
    return Batch(**tensors, anchors=moved, num_answers=num_answers)


def _anchors_of(example: Example, anchoring: Anchoring) -> list[int]:
    """The anchor of each token of a packed row: an answer goes on from its prompt as if it stood there alone."""
    anchors = anchoring.anchors(example.prompt)
    for answer in example.answers:
        anchors += anchoring.anchors(example.prompt + answer)[len(example.prompt) :]
    return anchors


def attention_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T) additive mask: of what stands before it, a token sees the prompt and its own answer.

    Args:
        segments: of a batch.
        dtype: of the mask.
    """
    import torch

    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    seen = (causal & ((key == 0) | (key == query)))[
        :, None
    ]  # padding sees padding: a row of nothing but -inf would be NaN
    return torch.zeros(seen.shape, dtype=dtype, device=segments.device).masked_fill_(~seen, torch.finfo(dtype).min)


def batch_plan(lengths: Sequence[int], size: int, step: int, rng_name: str) -> list[int]:
    """Which examples step ``step`` reads: a pure function, so that a resumed run reads what an uninterrupted one does.

    Every example comes once in an epoch. Batches hold examples of similar length: the shuffled epoch is sorted within spans of
    eight batches, and the batches of an epoch come in random order.

    Args:
        lengths: of the N examples, in tokens.
        size: of a batch; the last batch of an epoch takes what lacks from the start of its order.
        step: from 0.
        rng_name: names the random order.
    """
    import random

    per_epoch = -(-len(lengths) // size)
    epoch, place = divmod(step, per_epoch)
    rng = random.Random(f"{rng_name}-{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    span = 8 * size
    for start in range(0, len(order), span):
        order[start : start + span] = sorted(order[start : start + span], key=lambda i: lengths[i])
    while len(order) < per_epoch * size:
        order += order[: per_epoch * size - len(order)]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches[place]
