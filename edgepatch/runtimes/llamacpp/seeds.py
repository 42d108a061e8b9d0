"""From a patch to llama.cpp's own state of the seeded positions: the stored seed laid out, or the soft prompt evaluated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.llamacpp import layout as llamacpp_layout
from edgepatch.converters.llamacpp.moving import MovableState, read_seed
from edgepatch.converters.llamacpp.state import SequenceState, read_state
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.runtimes.llamacpp.calibration import Calibration
from edgepatch.runtimes.llamacpp.context import LlamaContext
from edgepatch.runtimes.runtime import SeedRoute

MAX_KEPT_STATES = 8
"""Patches whose state stays in memory, so that a swap back costs a copy."""


class SeedStates:
    """States of patches on one model, each made once.

    Args:
        context: in which they are made; its sequences are empty afterwards, or hold what nobody may rely on.
        calibration: of the model.
        master: the sequence that holds nothing but the seed.
        route: what was asked for; ``None`` for the stored seed where its layout is confirmed by measurement, else the decoded one.

    Attributes:
        reason: why the last state that was made had to be decoded; "" where nothing had.
    """

    def __init__(self, context: LlamaContext, calibration: Calibration, master: int, route: SeedRoute | None) -> None:
        self._context, self._calibration, self._master, self._route = context, calibration, master, route
        self._states: dict[str, tuple[bytes, SeedRoute]] = {}
        self._layouts: dict[str, llamacpp_layout.Layout] = {}
        self._probe: SequenceState | None = None
        self.reason = ""

    def state_of(self, patch: Patch) -> tuple[bytes, SeedRoute]:
        """llama.cpp's own state of the P seeded positions, and how it was made."""
        digest = patch.digest
        if digest not in self._states:
            while len(self._states) >= MAX_KEPT_STATES:
                del self._states[next(iter(self._states))]
            self._states[digest] = self._make_state(patch)
        return self._states[digest]

    def mover_of(self, patch: Patch, sequence: int) -> Callable[[int], NDArray[np.uint8]]:
        """llama.cpp's own state of the P positions directly in front of any token of a text.

        Args:
            patch: its seed moves.
            sequence: that takes the state in; each cell names it.

        Raises:
            InactivePatchError: how this model orders its keys was not confirmed, so they cannot be turned.
        """
        state, route = self.state_of(patch)
        layout = self.layout_of(patch)
        if layout is None or patch.rotation is None:
            raise InactivePatchError(
                f"the seed of {patch.name} {patch.version} cannot be moved: {self.reason or 'the order of the cached keys is not confirmed'}",
                hint="leave it at the start of the text by word (--pinned), or use a tested llama-cpp-python",
            )
        probe, spec = self._moved_to(sequence, state), patch.base
        seed = patch.kv_seed
        if route == "decoded" or seed is None:
            seed = read_seed(probe, layout, spec.num_key_value_heads, spec.head_dim)
        return MovableState(probe, layout, seed, patch.rotation, self._context.model.window).at

    def layout_of(self, patch: Patch) -> llamacpp_layout.Layout | None:
        """How the model's cache orders the seed of a patch; ``None`` where that was not confirmed."""
        state, _ = self.state_of(patch)
        return self._layouts.get(patch.digest) or self._measured_layout(patch, state)

    def _moved_to(self, sequence: int, state: bytes) -> SequenceState:
        """The seed's state as the library writes it of another sequence: header and cells name the sequence."""
        self._context.clear()
        self._context.restore(self._master, state)
        self._context.fork(self._master, sequence)
        self._context.forget(self._master)
        moved = read_state(self._context.state(sequence))
        self._context.forget(sequence)
        return moved

    def _measured_layout(self, patch: Patch, decoded: bytes) -> llamacpp_layout.Layout | None:
        """The layout under which the stored seed is what the model itself has computed, where there is one."""
        if patch.kv_seed is None or self.reason:
            return None
        factor = self._calibration.key_error_factor()
        measured = llamacpp_layout.measure(read_state(decoded), patch.kv_seed, factor)
        return measured.layout if measured.confirmed else None

    def _make_state(self, patch: Patch) -> tuple[bytes, SeedRoute]:
        self.reason = ""
        if self._route == "stored" and patch.kv_seed is None:
            raise InputError(
                "the patch has no stored seed", hint="add it with `edgepatch convert seed`, or use seed_route decoded"
            )
        if patch.kv_seed is None or self._route == "decoded":
            return self._decode(patch), "decoded"
        if self._context.model.has_recurrent_memory:
            return self._fall_back(patch, "the model has recurrent layers, whose memory no KV seed holds")
        # A layout says nothing about another seed: one of another rope theta fits it too. So each seed is compared once.
        confirmed = patch.soft_prompt is None or self._calibration.has_confirmed(patch.digest)
        layout = self._calibration.layout if patch.canary and confirmed else self._layout_of_parts(patch)
        if layout is None and patch.soft_prompt is None:
            layout = self._calibration.layout_by_rope()
        if layout is not None:
            return self._lay_out(patch, layout), "stored"
        return self._measure(patch)

    def _layout_of_parts(self, patch: Patch) -> llamacpp_layout.Layout | None:
        """The layout under which all parts of a composed patch were laid out before it, to be proved each by itself."""
        layouts = {self._layouts.get(digest) for digest in patch.parts}
        return layouts.pop() if len(layouts) == 1 else None

    def _measure(self, patch: Patch) -> tuple[bytes, SeedRoute]:
        """Compares what the model itself makes of the soft prompt with the stored seed, and takes the layout if one fits."""
        assert patch.kv_seed is not None  # _make_state
        decoded = self._decode(patch)
        try:
            self._probe = read_state(decoded)
            measured = llamacpp_layout.measure(self._probe, patch.kv_seed, self._calibration.key_error_factor())
        except InactivePatchError as error:
            return self._fall_back(patch, str(error), decoded)
        if not measured.confirmed:
            errors = (
                f"keys differ from the stored seed by {measured.key_error:.2f}, values by {measured.value_error:.2f}"
            )
            return self._fall_back(patch, f"no layout of its cache fits: {errors}", decoded)
        self._calibration.keep_layout(measured.layout, patch.digest)
        return self._lay_out(patch, measured.layout), "stored"

    def _fall_back(self, patch: Patch, reason: str, decoded: bytes | None = None) -> tuple[bytes, SeedRoute]:
        """The decoded route, unless the stored one was asked for or is the only one; the reason is kept for the user."""
        if self._route == "stored" or patch.soft_prompt is None:
            raise InputError(
                f"the stored seed cannot be used: {reason}",
                hint="use a patch with a soft prompt, and seed_route decoded",
            )
        self.reason = reason
        return decoded or self._decode(patch), "decoded"

    def _lay_out(self, patch: Patch, layout: llamacpp_layout.Layout) -> bytes:
        assert patch.kv_seed is not None  # _make_state
        self._layouts[patch.digest] = layout
        if self._probe is None:  # any token: only the structure of its state is wanted
            if self._context.last_position(0) != 0:  # else the canary has left one there
                self._context.clear()
                self._context.evaluate(0, [0])
            self._context.fork(0, self._master)
            self._context.forget(0)  # a cell names the sequences that share it
            self._probe = read_state(self._context.state(self._master))
        return llamacpp_layout.seeded_state(self._probe, layout, patch.kv_seed, self._context.model.window)

    def _decode(self, patch: Patch) -> bytes:
        """The state of the soft prompt evaluated by this very model."""
        if patch.soft_prompt is None:
            raise InputError("the patch has a KV seed alone: it cannot be decoded", hint="use seed_route stored")
        self._context.clear()
        factor = self._calibration.embedding_factor(self._context, self._master)
        self._context.evaluate_embeddings(self._master, patch.soft_prompt.embeddings * np.float32(factor))
        return self._context.state(self._master)

    def forget(self) -> None:
        """Frees the states of patches that were active before; the next swap to one lays it out anew."""
        self._states.clear()
        self._layouts.clear()
