"""Seeds that stand elsewhere than at the start: which cells a sequence of llama.cpp sees, and how a seed is put to another place.

A conversation has two sequences. One is evaluated: it holds the seed and the text. The other keeps the text alone, up to the last move:
the seed's positions overlap the text's, and llama.cpp removes cells by their position, so the text could not be told from
the seed in one sequence. Both share the cells, so that a move copies nothing but the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InactivePatchError
from edgepatch.runtimes.llamacpp.context import LlamaContext


@dataclass(frozen=True)
class SavedText:
    """What a conversation held.

    Attributes:
        anchor: where its seed stands.
        source: llama.cpp's sequence that the state was read from.
        state: of seed and text where the seed stays, else of the text alone; empty where there is none.
    """

    anchor: int
    source: int
    state: bytes


class SeedPlaces:
    """Where the seed stands in each conversation.

    Args:
        context: sequences 0..N-1 are the conversations; the next holds the seed at the start, the next takes a state in, N more keep texts.
        num_sequences: N.

    Attributes:
        loading: the sequence that takes a state in.
        num_virtual_tokens: P of the installed patch.
        state_at: llama.cpp's state of the seed in front of a text position; ``None`` where the seed stays at the start.
    """

    def __init__(self, context: LlamaContext, num_sequences: int) -> None:
        self._context, self.num_virtual_tokens = context, 0
        self._master, self.loading = num_sequences, num_sequences + 1
        self._texts = range(num_sequences + 2, 2 * num_sequences + 2)
        self._anchors: list[int | None] = [0] * num_sequences  # None: the seed must be put there first
        self.state_at: Callable[[int], NDArray[np.uint8]] | None = None

    @staticmethod
    def sequences_for(num_sequences: int) -> int:
        """How many of llama.cpp's sequences so many conversations need."""
        return 2 * num_sequences + 2

    def start(self, sequence: int) -> None:
        """A conversation afresh: the seed at the start, and no text.

        Raises:
            InactivePatchError: llama.cpp did not take it.
        """
        self._context.forget(self._texts[sequence])
        self._context.fork(self._master, sequence)
        self._anchors[sequence] = 0
        if self._context.last_position(sequence) != self.num_virtual_tokens - 1:
            raise InactivePatchError(
                f"llama.cpp did not start sequence {sequence} from the seed", hint="load the model again"
            )

    def cut(self, sequence: int, length: int) -> bool:
        """Keeps the first ``length`` tokens of a text, 1 or more; whether they are still there.

        Where the seed stands behind the cut it is taken off, and must be put elsewhere before the next token.
        """
        end, anchor = self.num_virtual_tokens + length, self._anchors[sequence]
        if self.state_at is None:
            return self._context.truncate(sequence, end)
        self._keep_text(sequence)
        self._context.cut(self._texts[sequence], end)
        if anchor is not None and anchor <= length:
            self._context.cut(sequence, end)
        else:
            self._context.fork(self._texts[sequence], sequence)
            self._anchors[sequence] = None
        # A saved text comes back without what its next token cannot see, which a token further in front can.
        return self._context.holds(self._texts[sequence], end, self.num_virtual_tokens)

    def fork(self, source: int, target: int, length: int) -> bool:
        """Lets a conversation hold the first ``length`` tokens of another."""
        self._context.fork(source, target)
        self._context.fork(self._texts[source], self._texts[target])
        self._anchors[target] = self._anchors[source]
        return self.cut(target, length)

    def move(self, sequences: Sequence[int], anchors: Sequence[int]) -> None:
        """Puts the seed in front of a text position in each of some conversations; those at one place share its cells.

        Raises:
            InactivePatchError: llama.cpp did not take the seed there; the conversation cannot be gone on with.
        """
        targets: dict[int, list[int]] = {}
        for sequence, anchor in zip(sequences, anchors, strict=True):
            if self._anchors[sequence] != anchor:
                targets.setdefault(anchor, []).append(sequence)
        for anchor, group in targets.items():
            for sequence in group:
                self._take_off(sequence)
            self._put_on(group, anchor)

    def _take_off(self, sequence: int) -> None:
        """Leaves a conversation with its text alone."""
        self._keep_text(sequence)
        self._context.fork(self._texts[sequence], sequence)
        self._anchors[sequence] = None

    def _keep_text(self, sequence: int) -> None:
        """The text since the last move stands behind the seed's own positions, so it can be told by them."""
        anchor = self._anchors[sequence]
        if anchor is not None:
            self._context.share(sequence, self._texts[sequence], self.num_virtual_tokens + anchor)

    def _put_on(self, sequences: Sequence[int], anchor: int) -> None:
        source = self._master
        if anchor:
            assert self.state_at is not None  # else nothing moves
            source = self.loading
            self._context.restore(source, self.state_at(anchor))
        for sequence in sequences:
            last = self._context.last_position(sequence)
            self._context.share(source, sequence)
            if self._context.last_position(sequence) != max(last, self.num_virtual_tokens + anchor - 1):
                raise InactivePatchError(
                    f"llama.cpp did not take the seed in front of token {anchor} of sequence {sequence}",
                    hint="load the model again; please report it",
                )
            self._anchors[sequence] = anchor
        if anchor:
            self._context.forget(source)

    def require_seed(self, sequence: int) -> None:
        """The last guard: nothing is evaluated in a sequence without its seed.

        Raises:
            InactivePatchError: it is not there, which nothing that a caller can do should bring about.
        """
        count, anchor = self.num_virtual_tokens, self._anchors[sequence]
        length = self._context.last_position(sequence) + 1
        intact = anchor is not None and length >= count + anchor
        if intact and not anchor:
            intact = self._context.holds(sequence, length)
        if not intact:
            raise InactivePatchError(
                f"sequence {sequence} holds {length} positions, of which the patch's {count} are not intact",
                hint="load the model again; please report it",
            )

    # Saved conversations.

    def save(self, sequence: int) -> SavedText:
        """What a conversation holds."""
        anchor = self._anchors[sequence] or 0
        if self.state_at is None:
            return SavedText(0, sequence, self._context.state(sequence))
        self._take_off(sequence)
        self._context.forget(sequence)  # a cell names the sequences that share it
        source = self._texts[sequence]
        text = self._context.state(source) if self._context.last_position(source) >= 0 else b""
        self._context.fork(source, sequence)
        self._put_on([sequence], anchor)
        return SavedText(anchor, source, text)

    def restore(self, sequence: int, saved: SavedText) -> None:
        """Puts back what was saved, of this or another conversation; every other one must be started afresh.

        Raises:
            InactivePatchError: llama.cpp did not take it.
        """
        if self.state_at is None:
            self._context.clear()
            self._take_in(saved, sequence)
            if self.num_virtual_tokens:  # the seed's cells are shared again, so that none is there twice
                self._context.fork(sequence, self._master)
                self._context.truncate(self._master, self.num_virtual_tokens)
            return
        for i, text in enumerate(self._texts):
            self._context.forget(i)
            self._context.forget(text)
            self._anchors[i] = None
        if saved.state:
            self._take_in(saved, self._texts[sequence])
        self._context.fork(self._texts[sequence], sequence)
        self._put_on([sequence], saved.anchor)

    def _take_in(self, saved: SavedText, target: int) -> None:
        """A state names the sequence that it was read from, so it goes into that one first; both are empty."""
        self._context.restore(saved.source, saved.state)
        if saved.source != target:
            self._context.fork(saved.source, target)
            self._context.forget(saved.source)
