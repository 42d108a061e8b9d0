"""What each sequence of a runtime holds behind the seed, and the one place where tokens are evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError
from edgepatch.runtimes.runtime import Runtime
from edgepatch.seeds.anchoring import Anchoring


@dataclass(frozen=True)
class Snapshot:
    """What a sequence held; of use to the object that saved it alone.

    Attributes:
        tokens: behind the seed.
        seed: digest of the patch in front of them; "" for the bare model.
        state: the runtime's.
    """

    tokens: tuple[int, ...]
    seed: str
    state: Any


class Sequences:
    """The books of a runtime's sequences.

    Args:
        runtime: loaded; nobody else evaluates on it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._evaluated: list[list[int]] = [[] for _ in range(runtime.num_sequences)]
        self._anchors = [0] * runtime.num_sequences  # of the last token of each

    @property
    def anchoring(self) -> Anchoring | None:
        """Where the seed stands in a text; ``None`` for one that stays at the start."""
        patch = self._runtime.patch
        return None if patch is None else patch.anchoring

    def evaluate(self, texts: Mapping[int, Sequence[int]], count: int = 1) -> dict[int, NDArray[np.float32]]:
        """Brings sequences to hold exactly these tokens behind the seed. Every token of a sequence is evaluated here.

        What a sequence has evaluated already is reused; those that lack one token alone are evaluated together.

        Args:
            texts: sequence -> its token ids, from the start of the prompt.
            count: how many of the last tokens' logits are asked for.

        Returns:
            Sequence -> (count, V) float32.

        Raises:
            InputError: a text is longer than the context, or there is no such sequence.
            EdgepatchError: the model failed; the sequences start afresh.
        """
        for sequence, tokens in texts.items():
            self._require_room(sequence, tokens)
        held = {sequence: self._evaluated[sequence] for sequence in texts}
        for sequence in texts:
            self._evaluated[sequence] = []  # stays empty if the runtime fails half-way
        one_behind = [s for s, tokens in texts.items() if count == 1 and held[s] and held[s] == list(tokens[:-1])]
        logits = {}
        for sequence, tokens in texts.items():
            if sequence not in one_behind:
                reused = self._rewind(sequence, held[sequence], tokens, count)
                rows: list[NDArray[np.float32]] = []
                for start, end in self._spans(sequence, tokens, reused):
                    rows.append(self._runtime.forward(sequence, tokens[start:end], every=count > 1))
                logits[sequence] = (rows[0] if len(rows) == 1 else np.concatenate(rows))[-count:]
        if one_behind:
            self._step_seeds({sequence: texts[sequence] for sequence in one_behind})
            stepped = self._runtime.forward_rows(one_behind, [texts[sequence][-1] for sequence in one_behind])
            logits |= {sequence: stepped[i : i + 1] for i, sequence in enumerate(one_behind)}
        for sequence, tokens in texts.items():
            self._evaluated[sequence] = list(tokens)
        return logits

    def _spans(self, sequence: int, tokens: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
        """Where the tokens from ``first`` on are divided; the seed goes along before each part is asked for."""
        anchoring = self.anchoring
        if anchoring is None:
            yield first, len(tokens)
            return
        for start, end, anchor in anchoring.spans(tokens, first):
            self._runtime.place_seed([sequence], [anchor])
            self._anchors[sequence] = anchor
            yield start, end

    def _step_seeds(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Moves the seeds of sequences that lack their last token alone, where that is an anchor."""
        anchoring = self.anchoring
        if anchoring is None:
            return
        steps = {s: anchoring.step(self._anchors[s], len(tokens) - 1, tokens[-1]) for s, tokens in texts.items()}
        moving = [sequence for sequence, anchor in steps.items() if anchor != self._anchors[sequence]]
        if moving:
            self._runtime.place_seed(moving, [steps[sequence] for sequence in moving])
        for sequence in moving:
            self._anchors[sequence] = steps[sequence]

    def _rewind(self, sequence: int, held: Sequence[int], tokens: Sequence[int], count: int) -> int:
        """Cuts a sequence back to what it shares with a text, all but the last ``count`` of it; how many tokens are kept."""
        shared = _common_prefix(held, tokens, len(tokens) - count)
        return self._runtime.rewind(sequence, shared) if shared < len(held) or not shared else shared

    def _require_room(self, sequence: int, tokens: Sequence[int]) -> None:
        self.require(sequence)
        if len(tokens) > self._runtime.context_length:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, the context holds {self._runtime.context_length}",
                hint="shorten the prompt or load the model with a longer context",
            )

    def require(self, sequence: int) -> int:
        """The sequence itself, if there is such a one."""
        if not 0 <= sequence < len(self._evaluated):
            raise InputError(f"sequence: expected 0 to {len(self._evaluated) - 1}, found {sequence}")
        return sequence

    def evaluated(self, sequence: int = 0) -> list[int]:
        """Token ids behind the seed that a sequence holds."""
        return list(self._evaluated[self.require(sequence)])

    def num_cached(self, tokens: Sequence[int], sequence: int = 0) -> int:
        """How many leading tokens of a prompt need not be evaluated again in a sequence."""
        held = self._evaluated[self.require(sequence)]
        shared = _common_prefix(held, tokens, len(tokens))
        return shared if shared == len(held) or self._runtime.is_cuttable else 0

    def share(self, source: int, target: int, tokens: Sequence[int]) -> bool:
        """Lets a sequence hold a prompt that another, or itself, holds; whether that can be done."""
        if self._evaluated[source][: len(tokens)] != list(tokens):
            return False
        self._evaluated[target] = []
        if not self._runtime.fork(source, target, len(tokens)):
            return False
        self._evaluated[target] = list(tokens)
        if self.anchoring is not None:
            self._anchors[target] = self.anchoring.anchors(tokens)[-1]
            self._runtime.place_seed([target], [self._anchors[target]])
        return True

    def adopt(self, tokens: Sequence[int], sequence: int) -> int:
        """Lets a sequence hold the longest beginning of a prompt that it can go on from, its own or what another sequence holds.

        A text that is held whole is gone on with. One that goes another way is cut where the seed moves, and not where the two part:
        what is evaluated then is what would be without it, in the same parts, and so are the roundings of a quantized model.

        Returns:
            How many leading tokens need not be evaluated again: all but the last at most, behind which logits are asked for.
        """
        others = range(len(self._evaluated)) if self._runtime.is_forkable else ()
        anchors = self.anchoring.anchors(tokens) if self.anchoring is not None else range(len(tokens))
        kept = {source: self._num_adopted(tokens[:-1], source, anchors) for source in (sequence, *others)}
        source = max(kept, key=lambda source: kept[source])  # of equals the sequence itself, which comes first
        if source == sequence and kept[source] == len(self._evaluated[sequence]):
            return kept[source]
        if kept[source] and self.share(source, sequence, tokens[: kept[source]]):
            return kept[source]
        self._evaluated[sequence] = []  # which starts it afresh
        return 0

    def _num_adopted(self, tokens: Sequence[int], source: int, anchors: Sequence[int]) -> int:
        shared = self.num_cached(tokens, source)
        return shared if shared == len(self._evaluated[source]) else anchors[shared]

    def forget(self) -> None:
        """Strikes every prompt off the books, because the runtime starts all sequences afresh or must."""
        self._evaluated = [[] for _ in self._evaluated]

    def reset(self) -> None:
        """Forgets every prompt; the seed stays."""
        self.forget()
        for sequence in range(len(self._evaluated)):
            self._runtime.rewind(sequence, 0)

    # Snapshots.

    def save(self, sequence: int = 0) -> Snapshot:
        """What a sequence holds, to be put back instead of evaluated again."""
        tokens = tuple(self._evaluated[self.require(sequence)])
        return Snapshot(tokens, self._seed(), self._runtime.save_state(sequence))

    def restore(self, snapshot: Snapshot, sequence: int = 0) -> None:
        """Puts a snapshot back into a sequence; every other one starts afresh.

        Raises:
            InputError: it was taken behind another seed.
        """
        self.require(sequence)
        if snapshot.seed != self._seed():
            raise InputError(
                f"the snapshot was taken with {snapshot.seed or 'no patch'}, active is {self._seed() or 'no patch'}",
                hint="swap to the patch that it was taken with, or evaluate the tokens again",
            )
        self.forget()
        self._runtime.restore_state(sequence, snapshot.state)
        self._evaluated[sequence] = list(snapshot.tokens)
        if self.anchoring is not None and snapshot.tokens:
            self._anchors[sequence] = self.anchoring.anchors(snapshot.tokens)[-1]

    def _seed(self) -> str:
        return self._runtime.patch.digest if self._runtime.patch else ""


def _common_prefix(held: Sequence[int], tokens: Sequence[int], most: int) -> int:
    """Length of the common start of two prompts, at most ``most``."""
    shared = min(most, len(held), len(tokens))
    if list(tokens[:shared]) == list(held[:shared]):
        return shared
    return next(i for i in range(shared) if tokens[i] != held[i])
