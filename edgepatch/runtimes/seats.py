"""Many continuations on few places: which is evaluated where, and when the next one is let in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.replies import Batch, Continuation, Reply
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.runtimes.runtime import Runtime
from edgepatch.runtimes.sequences import Sequences
from edgepatch.seeds.anchoring import Anchoring


@dataclass(frozen=True)
class Job:
    """A continuation to be made.

    Attributes:
        tokens: the prompt.
        sampling: of the reply.
    """

    tokens: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class _Prompt:
    """A prompt that a sequence has evaluated: its token ids and the (V,) logits behind them."""

    tokens: list[int]
    sequence: int
    logits: NDArray[np.float32]


class Seats:
    """Places for continuations: first the rows of batches, where a runtime has them, then its sequences.

    A batch starts when nothing runs, and all of its rows at once. A sequence that becomes free takes the next job.

    Args:
        runtime: loaded.
        sequences: of it; what they held before is forgotten.
        jobs: in the order in which they are let in.
        new_reply: begins a reply to a prompt.
    """

    def __init__(
        self,
        runtime: Runtime,
        sequences: Sequences,
        jobs: Sequence[Job],
        new_reply: Callable[[Sampling, Sequence[int]], Reply],
    ) -> None:
        for job in jobs:
            require_text_only(job.sampling)
        self._runtime, self._sequences, self._jobs, self._new_reply = runtime, sequences, jobs, new_reply
        self._batches = deque(self._grouped())
        batched = {number for batch in self._batches for number in batch}
        self._waiting = deque(number for number in range(len(jobs)) if number not in batched)
        self._free = deque(range(runtime.num_sequences))
        self._prompt: _Prompt | None = None

    def _grouped(self) -> list[list[int]]:
        """Numbers of the jobs of each batch, by length where a batch takes no others; one row alone is no batch."""
        runtime, jobs = self._runtime, self._jobs
        # A row that has ended goes on beside the others, so all rows of a batch must have room for the longest reply.
        fitting = [
            number
            for number, job in enumerate(jobs)
            if len(job.tokens) + job.sampling.max_new_tokens <= runtime.context_length + 1
        ]
        batches: list[list[int]] = []
        for number in sorted(fitting, key=lambda n: len(jobs[n].tokens)) if runtime.max_batch_rows else ():
            previous = jobs[batches[-1][0]].tokens if batches else []
            is_alike = runtime.has_ragged_batches or len(previous) == len(jobs[number].tokens)
            if batches and is_alike and len(batches[-1]) < runtime.max_batch_rows:
                batches[-1].append(number)
            else:
                batches.append([number])
        return [batch for batch in batches if len(batch) > 1]

    def admit(self, num_running: int) -> dict[int, Continuation]:
        """Number of a job -> its continuation, of the jobs that have a place from now on; none when all are done."""
        if self._batches:
            return {} if num_running else self._open_batch(self._batches.popleft())
        admitted = {}
        while self._waiting and self._free:
            number = self._waiting.popleft()
            admitted[number] = self._seat(self._jobs[number], self._free.popleft())
        return admitted

    def release(self, continuation: Continuation) -> None:
        """Makes room for the next."""
        if continuation.batch is None:
            self._free.append(continuation.sequence)

    def _open_batch(self, numbers: Sequence[int]) -> dict[int, Continuation]:
        jobs = [self._jobs[number] for number in numbers]
        longest = max(len(job.tokens) + job.sampling.max_new_tokens for job in jobs)
        prompts = [job.tokens for job in jobs]
        batch, logits = self._runtime.open_batch(prompts, longest, self._evaluate)
        if self._sequences.anchoring is not None:
            batch = MovingBatch(batch, self._sequences.anchoring, prompts)
        return {
            number: Continuation(row, self._new_reply(job.sampling, job.tokens), logits[row], batch)
            for row, (number, job) in enumerate(zip(numbers, jobs, strict=True))
        }

    def _seat(self, job: Job, sequence: int) -> Continuation:
        """A prompt that was evaluated just before is shared, where the runtime can."""
        prompt = self._prompt
        if (
            prompt is None
            or prompt.tokens != job.tokens
            or not self._sequences.share(prompt.sequence, sequence, job.tokens)
        ):
            prompt = _Prompt(job.tokens, sequence, self._evaluate(job.tokens, sequence))
        self._prompt = prompt
        return Continuation(sequence, self._new_reply(job.sampling, job.tokens), prompt.logits)

    def _evaluate(self, tokens: Sequence[int], sequence: int = 0) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._sequences.evaluate({sequence: tokens})[sequence][-1]
        return logits


class MovingBatch:
    """A batch in whose rows the seed goes along with the text.

    Args:
        batch: holds the prompts, with each row's seed where its prompt ends.
        anchoring: of the seed.
        prompts: token ids of each row.
    """

    def __init__(self, batch: Batch, anchoring: Anchoring, prompts: Sequence[Sequence[int]]) -> None:
        self.num_rows, self._batch, self._anchoring = batch.num_rows, batch, anchoring
        self._anchors = [anchoring.anchors(tokens)[-1] for tokens in prompts]
        self._lengths = [len(tokens) for tokens in prompts]

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """As ``Batch.forward``; a row's seed moves first, where its token is an anchor."""
        for row, token in enumerate(tokens[:, 0].tolist()):
            anchor = self._anchoring.step(self._anchors[row], self._lengths[row], token)
            if anchor != self._anchors[row]:
                self.place_seed(row, anchor)
            self._lengths[row] += 1
        return self._batch.forward(tokens)

    def place_seed(self, row: int, anchor: int) -> None:
        """As ``Batch.place_seed``."""
        self._batch.place_seed(row, anchor)
        self._anchors[row] = anchor


def require_text_only(sampling: Sampling) -> None:
    """Refuses log-probabilities where the answer is texts.

    Raises:
        InputError: they are asked for.
    """
    if sampling.num_logprobs is not None:
        raise InputError("sampling: num_logprobs: text alone comes without log-probabilities", hint="use stream")
