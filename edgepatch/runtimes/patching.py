"""The patch of a loaded model: exchanged, proved by its canary, and put back where the new one does not work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError
from edgepatch.patch import canary
from edgepatch.patch.file import Patch
from edgepatch.runtimes.runtime import Runtime, SeedRoute, check_patch
from edgepatch.runtimes.sequences import Sequences
from edgepatch.tensors import CanaryPrompt


class PatchSlot:
    """Where a session's patch is: there is always one in it that was proved, or none on purpose.

    Args:
        runtime: loaded.
        sequences: of it.
    """

    def __init__(self, runtime: Runtime, sequences: Sequences) -> None:
        self._runtime, self._sequences = runtime, sequences
        self._bare_logits: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def load(self, patch: Patch | None) -> SeedRoute:
        """The first patch: all prompts of its canary, or one where this device remembers that it has passed them all."""
        proofs = self._runtime.proofs
        is_proved = patch is not None and proofs is not None and proofs.has_proved(patch.digest)
        route = self.exchange(patch, num_prompts=1 if is_proved else None)
        if patch is not None and proofs is not None and not is_proved:
            proofs.keep_proof(patch.digest)
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
        prompts = patch.canary.prompts[:num_prompts] if patch and patch.canary else ()
        try:
            self._measure_bare([prompt.tokens for prompt in prompts])
            route = self._put(patch)
            self._prove(prompts, route)
        except BaseException:
            self._put_back(old)
            raise
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
        self._runtime.check_weights(patch)

    def _put(self, patch: Patch | None) -> SeedRoute:
        self._sequences.forget()
        return self._runtime.install(patch)

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
