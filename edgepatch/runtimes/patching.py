"""The patch of a loaded model: exchanged, proved by its canary, and put back where the new one does not work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch import canary
from edgepatch.patch.file import Patch
from edgepatch.runtimes.runtime import Runtime, SeedRoute, check_patch, moves
from edgepatch.runtimes.sequences import Sequences
from edgepatch.seeds.anchoring import place_in_words
from edgepatch.seeds.rotation import BY_LENGTH
from edgepatch.tensors import CanaryPrompt


class PatchSlot:
    """Where a session's patch is: there is always one in it that was proved, or none on purpose.

    Args:
        runtime: loaded.
        sequences: of it.
        pins: whether a seed that moves is left at the start of the text, by the user's word.

    Attributes:
        patch: the active one as its maker signed it; where its seed is pinned, the runtime holds it without its anchoring.
        notes: what is less than the patch promises on this device: its seed is pinned, or a part of its canary could not be asked.
    """

    def __init__(self, runtime: Runtime, sequences: Sequences, pins: bool = False) -> None:
        self._runtime, self._sequences, self._pins = runtime, sequences, pins
        self._bare_logits: dict[tuple[int, ...], NDArray[np.float32]] = {}
        self.patch: Patch | None = None
        self.notes: tuple[str, ...] = ()

    @property
    def is_pinned(self) -> bool:
        """Whether the active patch's seed would move, and was left at the start by word."""
        return self._pins and moves(self.patch)

    @property
    def place(self) -> str:
        """Where the active patch's seed stands, for people; "" for the bare model."""
        return place_in_words(self.patch.anchoring, self._pins) if self.patch else ""

    def load(self, patch: Patch | None) -> SeedRoute:
        """The first patch: all prompts of its canary, or one where this device remembers that it has passed them all."""
        proofs, held = self._runtime.proofs, self._as_held(patch)
        is_proved = held is not None and proofs is not None and proofs.has_proved(held.digest)
        route = self.exchange(patch, num_prompts=1 if is_proved else None)
        # A longer context has room for more of the canary, so a part of it is no proof.
        if (
            patch is not None
            and held is not None
            and proofs is not None
            and not is_proved
            and not self._num_skipped(patch)
        ):
            proofs.keep_proof(held.digest)
        return route

    def exchange(self, patch: Patch | None, num_prompts: int | None) -> SeedRoute:
        """Puts a patch in place of the present one and asks so many prompts of its canary; ``None`` for all.

        Every sequence starts afresh. On failure the old patch is back in place, or the model is closed.

        Raises:
            MismatchError: the patch was made for another model.
            InputError: the patch cannot be used with this runtime's settings.
            InactivePatchError: the seed was not taken, or the canary says that it does not work as it should.
        """
        self._require_fit(patch)
        old = self._runtime.patch
        prompts = self._askable(patch)[:num_prompts]
        try:
            self._measure_bare([prompt.tokens for prompt in prompts])
            route = self._put(patch)
            self._prove(prompts, route)
        except BaseException:
            self._put_back(old)
            raise
        self.patch, self.notes = patch, self._notes_on(patch)
        return route

    def _require_fit(self, patch: Patch | None) -> None:
        check_patch(patch, self._runtime.spec)
        if patch is None:
            return
        if not patch.num_virtual_tokens < self._runtime.num_positions:
            raise InputError(
                f"context length: expected {patch.num_virtual_tokens + 1} positions or more, "
                f"found {self._runtime.num_positions}",
                hint=f"the patch takes {patch.num_virtual_tokens} of them",
            )
        if moves(self._as_held(patch)):
            _require_movable(patch, self._runtime)
        self._runtime.check_weights(patch)

    def _as_held(self, patch: Patch | None) -> Patch | None:
        """The patch as the runtime gets it: one that is pinned has no anchoring."""
        return replace(patch, anchoring=None) if patch is not None and self._pins and moves(patch) else patch

    def _put(self, patch: Patch | None) -> SeedRoute:
        self._sequences.forget()
        return self._runtime.install(self._as_held(patch))

    # The canary.

    def _askable(self, patch: Patch | None) -> tuple[CanaryPrompt, ...]:
        """Those prompts of a patch's canary that can be asked here.

        Raises:
            InactivePatchError: there is none, so that nothing would prove the patch.
        """
        if patch is None or patch.canary is None:
            return ()
        alike = self._alike(patch)
        askable = tuple(prompt for prompt in alike if len(prompt.tokens) <= self._room(patch))
        if askable:
            return askable
        title = f"canary of {patch.name} {patch.version}"
        if alike:
            raise InactivePatchError(
                f"{title}: expected a prompt of at most {self._room(patch)} tokens, which is what the context holds, found none",
                hint="load the model with a longer context",
            )
        raise InactivePatchError(
            f"{title}: expected a prompt that a pinned seed can be asked, found none: its seed has moved in all of them",
            hint="run it unpinned, or ask its maker for a canary with a short prompt",
        )

    def _alike(self, patch: Patch) -> tuple[CanaryPrompt, ...]:
        """Those prompts of the canary behind which a seed that stays stands where the patch's own does."""
        prompts = patch.canary.prompts if patch.canary else ()
        rule = patch.anchoring if self._pins else None
        return tuple(prompt for prompt in prompts if rule is None or not any(rule.anchors(prompt.tokens)))

    def _room(self, patch: Patch) -> int:
        """Tokens behind the seed."""
        return self._runtime.num_positions - patch.num_virtual_tokens

    def _num_skipped(self, patch: Patch) -> int:
        """How many prompts of the canary the context has no room for."""
        return sum(len(prompt.tokens) > self._room(patch) for prompt in self._alike(patch))

    def _notes_on(self, patch: Patch | None) -> tuple[str, ...]:
        notes = []
        if patch is not None and self._pins and moves(patch):
            notes.append(f"{patch.name} {patch.version} is {place_in_words(patch.anchoring, is_pinned=True)}")
        skipped = self._num_skipped(patch) if patch is not None else 0
        if patch is not None and skipped:
            notes.append(
                f"{patch.name} {patch.version}: not all of its canary was asked: {skipped} of {len(self._alike(patch))} prompts are longer "
                f"than the context of {self._runtime.num_positions} holds"
            )
        return tuple(notes)

    def _put_back(self, patch: Patch | None) -> None:
        """After a failed swap: the old patch again, or no model at all, but never a model without its patch."""
        try:
            self._put(patch)
        except BaseException:
            self._runtime.close()
            raise

    def _measure_bare(self, prompts: Sequence[tuple[int, ...]]) -> None:
        unmeasured = [tokens for tokens in prompts if tokens not in self._bare_logits]
        if not unmeasured:
            return
        self._put(None)
        for tokens in unmeasured:
            self._bare_logits[tokens] = self._evaluate(tokens)

    def _prove(self, prompts: Sequence[CanaryPrompt], route: SeedRoute) -> None:
        allowed = canary.tolerance(self._runtime.quantization, self._runtime.kv_type, route == "decoded")
        for prompt in prompts:
            canary.require_active(prompt, self._bare_logits[prompt.tokens], self._evaluate(prompt.tokens), allowed)
        if prompts:
            self._sequences.reset()

    def _evaluate(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._sequences.evaluate({0: tokens})[0][-1]
        return logits


def _require_movable(patch: Patch, runtime: Runtime) -> None:
    """Refuses a patch whose seed moves on a model in which none does; what one backend alone cannot do, that backend refuses."""
    kind = runtime.spec.rope_scaling.get("rope_type")
    reason = "" if runtime.is_cuttable else "its recurrent layers remember a text that has no places"
    if kind in BY_LENGTH:
        reason = f"frequencies of its keys depend on the length of the text ({kind})"
    if reason:
        raise InputError(
            f"{patch.name} {patch.version}: its seed {place_in_words(patch.anchoring)}; on this model no seed can: {reason}",
            hint="leave it at the start of the text by word: --pinned",
        )
