"""The patch of a loaded model: exchanged, proved by its canary, and put back where the new one does not work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import EdgepatchError, InactivePatchError, InputError, MismatchError
from edgepatch.patch import canary
from edgepatch.patch.composition import compose_on_device, trained_alone, trained_alone_in_words
from edgepatch.patch.file import Patch
from edgepatch.patch.templates import OtherTemplate, other_template
from edgepatch.runtimes.runtime import Runtime, SeedRoute, check_patch, moves
from edgepatch.runtimes.sequences import Sequences
from edgepatch.seeds.anchoring import place_in_words
from edgepatch.seeds.rotation import BY_LENGTH
from edgepatch.tensors import CanaryPrompt


def _other_template(patch: Patch, runtime: Runtime) -> OtherTemplate | None:
    return other_template(patch, runtime.chat_template.digest, runtime.chat_template.tools_digest)


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
        pins: whether a seed that moves is left at the start of the text, by the user's word.
        other_template: whether the model may have another chat template than a patch was made with, by the user's word.

    Attributes:
        patch: the active one as its maker signed it, or what several are together; where its seed is pinned, the runtime holds it
            without its anchoring.
        notes: what is less than the patches promise on this device: a seed is pinned, a part of a canary could not be asked, or patches
            stand side by side that were trained alone.
    """

    def __init__(
        self, runtime: Runtime, sequences: Sequences, pins: bool = False, other_template: bool = False
    ) -> None:
        self._runtime, self._sequences, self._pins = runtime, sequences, pins
        self._takes_template, self._parts = other_template, tuple[Patch, ...]()
        self._bare_logits: dict[tuple[int, ...], NDArray[np.float32]] = {}
        self.patch: Patch | None = None
        self.notes: tuple[str, ...] = ()

    @property
    def is_pinned(self) -> bool:
        """Whether the active patch's seed would move, and was left at the start by word."""
        return self._pins and moves(self.patch)

    @property
    def other_template(self) -> str:
        """Digest of the model's chat template, where it is another one than an active patch was made with; else ""."""
        others = (other for part in self._parts if (other := _other_template(part, self._runtime)))
        return next((other.actual for other in others), "")

    def has_other_template(self, patch: Patch) -> bool:
        """Whether the model is told other words around messages than those that a patch was made with."""
        return _other_template(patch, self._runtime) is not None

    @property
    def place(self) -> str:
        """Where the active patch's seed stands, for people; "" for the bare model."""
        return place_in_words(self.patch.anchoring, self._pins) if self.patch else ""

    def load(self, parts: Sequence[Patch]) -> SeedRoute:
        """The first patch: all prompts of each part's canary, or one where this device remembers that it has passed them all."""
        proofs = self._runtime.proofs
        are_proved = [proofs is not None and proofs.has_proved(self._as_held(part).digest) for part in parts]
        route = self.exchange(parts, [1 if is_proved else None for is_proved in are_proved])
        for part, is_proved in zip(parts, are_proved, strict=True):
            # A longer context has room for more of the canary, so a part of it is no proof.
            if proofs is not None and not is_proved and not self._num_skipped(part):
                proofs.keep_proof(self._as_held(part).digest)
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
        prompts = [self._askable(part)[:n] for part, n in zip(parts, num_prompts, strict=True)]
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
        self._parts = tuple(parts)
        alone = trained_alone(parts)
        beside = (trained_alone_in_words(alone),) if alone else ()
        self.patch, self.notes = patch, (*beside, *(note for part in parts for note in self._notes_on(part)))
        return route

    def _require_fit(self, parts: Sequence[Patch]) -> None:
        for part in parts:
            with _naming(_whose(part, parts)):
                check_patch(part, self._runtime.spec)
                self._require_same_words(part)
        require_room(parts, self._runtime.num_positions)
        for part in parts:
            with _naming(_whose(part, parts)):
                if moves(self._as_held(part)):
                    _require_movable(part, self._runtime)
                self._runtime.check_weights(part)

    def _require_same_words(self, patch: Patch) -> None:
        """What the model is told and how it reads it are part of its identity: chat template and tokenizer."""
        other = _other_template(patch, self._runtime)
        if other is not None and not self._takes_template:
            error = MismatchError({other.name: (other.expected[:12], other.actual[:12])})
            error.hint = (
                "use the file that the patch was made for; if its template was changed on purpose: --other-template"
            )
            raise error
        if patch.tokenizer_probe is not None:
            patch.tokenizer_probe.require_same(self._runtime.encode_probe)

    def _as_held(self, patch: Patch) -> Patch:
        """The patch as the runtime gets it: one that is pinned has no anchoring."""
        return replace(patch, anchoring=None) if self._pins and moves(patch) else patch

    def _put(self, patch: Patch | None) -> SeedRoute:
        self._sequences.forget()
        return self._runtime.install(None if patch is None else self._as_held(patch))

    # The canary.

    def _askable(self, patch: Patch) -> tuple[CanaryPrompt, ...]:
        """Those prompts of a patch's canary that can be asked here.

        Raises:
            InactivePatchError: there is none, so that nothing would prove the patch.
        """
        if patch.canary is None:
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

    def _notes_on(self, patch: Patch) -> tuple[str, ...]:
        notes = []
        if self._pins and moves(patch):
            notes.append(f"{patch.name} {patch.version} is {place_in_words(patch.anchoring, is_pinned=True)}")
        other = _other_template(patch, self._runtime)
        if other is not None:
            notes.append(
                f"{patch.name} {patch.version} was made with the {other.name.replace('_', ' ')} {other.expected[:12]}; by word the "
                f"model has another one: {other.actual[:12]}"
            )
        skipped = self._num_skipped(patch)
        if skipped:
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


def why_no_seed_moves(runtime: Runtime) -> str:
    """What keeps every seed where it is on a loaded model; empty where nothing does."""
    kind = runtime.spec.rope_scaling.get("rope_type")
    if kind in BY_LENGTH:
        return f"frequencies of its keys depend on the length of the text ({kind})"
    return "" if runtime.is_cuttable else "its recurrent layers remember a text that has no places"


def _require_movable(patch: Patch, runtime: Runtime) -> None:
    """Refuses a patch whose seed moves on a model in which none does; what one backend alone cannot do, that backend refuses."""
    reason = why_no_seed_moves(runtime)
    if reason:
        raise InputError(
            f"{patch.name} {patch.version}: its seed {place_in_words(patch.anchoring)}; on this model no seed can: {reason}",
            hint="leave it at the start of the text by word: --pinned",
        )
