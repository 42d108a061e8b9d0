"""The patch of a loaded model: exchanged, proved by its canary, and put back where the new one does not work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.patch import canary
from edgepatch.patch.composition import compose_on_device
from edgepatch.patch.file import Patch
from edgepatch.runtimes.runtime import Runtime, SeedRoute, check_patch
from edgepatch.runtimes.sequences import Sequences
from edgepatch.tensors import CanaryPrompt


def as_parts(patch: Patch | Sequence[Patch] | None) -> tuple[Patch, ...]:
    """The patches that a caller names: none, one, or several in order of their digests."""
    if patch is None:
        return ()
    return (patch,) if isinstance(patch, Patch) else tuple(sorted(patch, key=lambda part: part.digest))


def together(parts: Sequence[Patch]) -> Patch | None:
    """What patches are side by side; one alone is itself.

    Raises:
        InputError: they cannot stand side by side.
        MismatchError: they are for different bases.
    """
    return compose_on_device(parts) if len(parts) > 1 else next(iter(parts), None)


def require_room(parts: Sequence[Patch], num_positions: int | None) -> None:
    """Raises unless a context holds what patches take, and a token more.

    Args:
        parts: of the patch.
        num_positions: of a sequence; ``None`` where nobody has asked for a number.

    Raises:
        InputError: it does not.
    """
    taken = sum(part.num_virtual_tokens for part in parts)
    if num_positions is None or taken < num_positions or not parts:
        return
    each = ", ".join(f"{part.name} {part.version} takes {part.num_virtual_tokens}" for part in parts)
    raise InputError(
        f"context length: expected {taken + 1} positions or more, found {num_positions}",
        hint=f"{each} of them" if len(parts) > 1 else f"the patch takes {taken} of them",
    )


def _whose(part: Patch, parts: Sequence[Patch]) -> str:
    return f"{part.name} {part.version} ({part.digest[:12]}), one of {len(parts)} patches" if len(parts) > 1 else ""


@contextmanager
def _naming(whose: str) -> Iterator[None]:
    """Where several patches act side by side, an error says which of them it is about."""
    try:
        yield
    except EdgepatchError as error:
        if whose:
            error.args = (f"{whose}: {error}",)  # it stays the error that it is, with its hint
        raise


class PatchSlot:
    """Where a session's patch is: there is always one in it that was proved, or none on purpose.

    Several patches act side by side, as one whose parts were proved each by itself.

    Args:
        runtime: loaded.
        sequences: of it.
    """

    def __init__(self, runtime: Runtime, sequences: Sequences) -> None:
        self._runtime, self._sequences = runtime, sequences
        self._bare_logits: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def load(self, parts: Sequence[Patch]) -> SeedRoute:
        """The first patch: all prompts of each part's canary, or one where this device remembers that it has passed them all."""
        proofs = self._runtime.proofs
        are_proved = [proofs is not None and proofs.has_proved(part.digest) for part in parts]
        route = self.exchange(parts, [1 if is_proved else None for is_proved in are_proved])
        for part, is_proved in zip(parts, are_proved, strict=True):
            if proofs is not None and not is_proved:
                proofs.keep_proof(part.digest)
        return route

    def exchange(self, parts: Sequence[Patch], num_prompts: Sequence[int | None]) -> SeedRoute:
        """Puts patches in place of the present ones and asks prompts of their canaries.

        Every sequence starts afresh. On failure the old patch is back in place, or the model is closed.

        Args:
            parts: none for the bare model; several, in order of their digests, act side by side.
            num_prompts: how many prompts of each one's canary are asked; ``None`` for all.

        Raises:
            MismatchError: a patch was made for another model.
            InputError: a patch cannot be used with this runtime's settings, or not beside the others.
            InactivePatchError: a seed was not taken, or a canary says that it does not work as it should.
        """
        patch = together(parts)
        self._require_fit(parts)
        old = self._runtime.patch
        prompts = [part.canary.prompts[:n] if part.canary else () for part, n in zip(parts, num_prompts, strict=True)]
        try:
            self._measure_bare([prompt.tokens for asked in prompts for prompt in asked])
            route: SeedRoute = ""
            for part, asked in zip(parts, prompts, strict=True):
                with _naming(_whose(part, parts)):
                    route = self._put(part)
                    self._prove(asked, route)
            if len(parts) != 1:
                with _naming(f"{', '.join(part.name for part in parts)} side by side" if parts else ""):
                    route = self._put(patch)
        except BaseException:
            self._put_back(old)
            raise
        return route

    def _require_fit(self, parts: Sequence[Patch]) -> None:
        for part in parts:
            with _naming(_whose(part, parts)):
                check_patch(part, self._runtime.spec)
        require_room(parts, self._runtime.num_positions)
        for part in parts:
            with _naming(_whose(part, parts)):
                self._runtime.check_weights(part)

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
