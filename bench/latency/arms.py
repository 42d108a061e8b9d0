"""The arms of the latency bench: one loaded model, put into the state that each arm needs before its time is taken."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from edgepatch.bench.latency.random_patches import random_tokens
from edgepatch.bench.latency.timing import Cell, Measure
from edgepatch.decoding.replies import Continuation, require_piece
from edgepatch.decoding.sampling import Sampling
from edgepatch.patch.file import Patch
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.sequences import Snapshot
from edgepatch.runtimes.session import Session

GREEDY = Sampling.plain(max_new_tokens=1 << 20, temperature=0.0, ignore_end_tokens=True)
WARMING = [1]


class Arm(ABC):
    """A way to run a model.

    Attributes:
        name: in the rows.
        decodes: whether its decoding is measured; an arm that holds the same cells as another is not measured twice.
        decodes_only: whether nothing else is.
    """

    name: str
    decodes: bool = True
    decodes_only: bool = False

    @abstractmethod
    def ready(self, prompt: Sequence[int]) -> None:
        """Prepares the first token of a prompt: what a session has behind it before a user sends something."""

    @abstractmethod
    def first(self, prompt: Sequence[int]) -> None:
        """The prompt's first token."""

    @abstractmethod
    def stand(self, depth: int) -> None:
        """Prepares decoding behind ``depth`` tokens of text."""

    @abstractmethod
    def decode(self, count: int) -> None:
        """So many tokens, one after the other."""


def cells(
    arms: Sequence[Arm], prompts: Sequence[int], depths: Sequence[int], count: int, vocab_size: int
) -> list[Cell]:
    """Time to first token at each length of a prompt, and decoding at each depth, of every arm."""
    table = []
    for length in prompts:
        tokens, measure = random_tokens(vocab_size, length, rng_seed=1), Measure("ttft", n_prompt=length, n_gen=1)
        chosen = [arm for arm in arms if not arm.decodes_only]
        table += [Cell(measure, arm.name, partial(arm.first, tokens), partial(arm.ready, tokens)) for arm in chosen]
    for depth in depths:
        measure = Measure("decode", n_gen=count, n_depth=depth)
        chosen = [arm for arm in arms if arm.decodes]
        table += [Cell(measure, arm.name, partial(arm.decode, count), partial(arm.stand, depth)) for arm in chosen]
    return table


class Snapshots:
    """States of a runtime behind a patch and so many tokens: put back instead of evaluated again.

    Args:
        runtime: whose first sequence is used.
    """

    def __init__(self, runtime: Session) -> None:
        self._runtime = runtime
        self._snapshots: dict[tuple[str, int], Snapshot] = {}

    def stand(self, patch: Patch | None, depth: int) -> list[int]:
        """The runtime, with ``patch`` in place, holds so many tokens of a text, which are returned."""
        tokens = random_tokens(self._runtime.spec.vocab_size, 1 << 14)[:depth]
        key = (patch.digest if patch else "", depth)
        if key not in self._snapshots:
            self._runtime.logits_of_last(tokens)
            self._snapshots[key] = self._runtime.sequences.save()
        self._runtime.sequences.restore(self._snapshots[key])
        return tokens


class RuntimeArm(Arm):
    """A runtime of ours.

    Args:
        name: of the arm.
        runtime: loaded; shared by all arms.
        snapshots: of it.
        patch: which is active, if any.
        prefix: tokens of a text in front of every prompt.
        is_warm: whether the prefix is in the cache before a prompt comes.
        attach: puts adapters on, or takes them off.
        decodes: whether decoding is measured.
    """

    def __init__(
        self,
        name: str,
        runtime: Session,
        snapshots: Snapshots,
        patch: Patch | None = None,
        *,
        prefix: Sequence[int] = (),
        is_warm: bool = False,
        attach: Callable[[], None] = lambda: None,
        decodes: bool = True,
    ) -> None:
        self.name, self.decodes = name, decodes
        self._runtime, self._snapshots, self._patch = runtime, snapshots, patch
        self._prefix, self._is_warm, self._attach = list(prefix), is_warm, attach
        self._continuation: Continuation | None = None

    def _enter(self) -> None:
        self._attach()
        if self._runtime.patch is not self._patch:
            self._runtime.swap(self._patch)
        self._runtime.reset()
        self._runtime.logits_of_last(WARMING)  # the library plans its computation anew after every change
        self._runtime.reset()

    def ready(self, prompt: Sequence[int]) -> None:
        self._enter()
        if self._is_warm:
            self._runtime.logits_of_last(self._prefix)

    def first(self, prompt: Sequence[int]) -> None:
        next(self._runtime.stream([*self._prefix, *prompt], GREEDY))

    def stand(self, depth: int) -> None:
        self._enter()
        depth += len(self._prefix)
        tokens = self._snapshots.stand(self._patch, depth) if depth else WARMING
        self._continuation = self._runtime.begin(tokens, GREEDY)
        self.decode(1)  # drawn from what the prompt has given; from here on a token costs an evaluation

    def decode(self, count: int) -> None:
        assert self._continuation is not None  # stand
        for _ in range(count):
            require_piece(self._runtime.advance([self._continuation])[0])


class DecodedPromptArm(RuntimeArm):
    """The soft prompt evaluated at the start of every session, as a library without seeds does it.

    Args:
        runtime: loaded.
        snapshots: of it.
        patch: has a soft prompt.
        attach: takes adapters off.
    """

    def __init__(self, runtime: Session, snapshots: Snapshots, patch: Patch, attach: Callable[[], None]) -> None:
        super().__init__("soft prompt decoded", runtime, snapshots, attach=attach, decodes=False)
        backend = runtime.backend
        assert isinstance(backend, LlamaCppRuntime) and patch.soft_prompt is not None
        self._context, self._embeddings = backend.context, patch.soft_prompt.embeddings

    def first(self, prompt: Sequence[int]) -> None:
        self._context.evaluate_embeddings(0, self._embeddings)
        self._context.evaluate(0, prompt)[-1].argmax()


class LibraryArm(RuntimeArm):
    """llama.cpp's own loop: decode and greedy sampler of the library, nothing of ours around them.

    Args:
        runtime: loaded.
        snapshots: of it.
        attach: takes adapters off.
    """

    decodes_only = True

    def __init__(self, runtime: Session, snapshots: Snapshots, attach: Callable[[], None]) -> None:
        super().__init__("library loop", runtime, snapshots, attach=attach)
        backend = runtime.backend
        assert isinstance(backend, LlamaCppRuntime)
        self._lib, self._handle = backend.model.lib, backend.context.handle
        self._sampler = self._lib.llama_sampler_init_greedy()
        weakref.finalize(self, self._lib.llama_sampler_free, self._sampler)
        self._token = (self._lib.llama_token * 1)(*WARMING)

    def decode(self, count: int) -> None:
        lib, handle, sampler, token = self._lib, self._handle, self._sampler, self._token
        for _ in range(count):
            if lib.llama_decode(handle, lib.llama_batch_get_one(token, 1)):
                raise RuntimeError("llama.cpp cannot decode")
            token[0] = lib.llama_sampler_sample(sampler, handle, -1)
