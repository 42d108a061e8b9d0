"""Who answers prompts when pairs are made: a runtime on this machine, or (``server_sampler``) an OpenAI-compatible server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.files import PairPrompt

SamplerT = TypeVar("SamplerT", bound="Sampler")


class PromptTooLongError(InputError):
    """A prompt and its continuation do not fit the model's context."""


class Sampler(ABC):
    """Draws continuations of prompts.

    Attributes:
        lookahead: so many prompts are begun before the first of them must be done.
    """

    lookahead: int = 1

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the continuations beside prompt and sampling; the same model has the same in another folder."""

    def check(self, prompt: PairPrompt, sampling: Sampling) -> None:  # noqa: B027  a server is asked by sampling alone
        """Refuses what can be refused without sampling.

        Raises:
            PromptTooLongError: prompt and continuation do not fit the context.
            InputError: the model cannot read the prompt.
        """

    @abstractmethod
    def sample(self, prompt: PairPrompt, sampling: Sampling, count: int) -> list[str]:
        """``count`` continuations of one prompt, with the random seeds ``rng_seed``, ``rng_seed + 1``, ...

        Raises:
            PromptTooLongError: prompt and continuation do not fit the context.
            InputError: the prompt cannot be continued.
        """

    def start(self, prompt: PairPrompt, sampling: Sampling, count: int) -> Callable[[], list[str]]:
        """Begins ``sample`` where that can be done aside, and returns what waits for its result."""
        return partial(self.sample, prompt, sampling, count)

    def close(self) -> None:  # noqa: B027  not every one holds something
        """Gives up what was begun, and frees connections."""

    def __enter__(self: SamplerT) -> SamplerT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RuntimeSampler(Sampler):
    """Lets a runtime continue prompts. The runtime stays open.

    Args:
        runtime: bare or patched.
        digest: SHA-256 of the model, for the identity: the runtime's own fingerprint is the same for fine-tunes of one base.
        digest_name: says of what it is.
    """

    def __init__(self, runtime: Session, digest: str = "", digest_name: str = "sha256") -> None:
        self._runtime = runtime
        self._digest = {digest_name: digest} if digest else {}

    @property
    def identity(self) -> dict[str, str]:
        """The runtime, what it runs as, and the weights."""
        runtime = self._runtime
        return {
            "runtime": runtime.name,
            "quantization": runtime.quantization,
            "model": runtime.system_fingerprint,
            **self._digest,
        }

    def check(self, prompt: PairPrompt, sampling: Sampling) -> None:
        """Counts the tokens of the prompt."""
        num_tokens, limit = len(self._runtime.tokens(prompt)), self._runtime.context_length
        if num_tokens + sampling.max_new_tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {num_tokens} tokens and {sampling.max_new_tokens} are to follow, the model's context holds {limit}"
            )

    def sample(self, prompt: PairPrompt, sampling: Sampling, count: int) -> list[str]:
        """As the base class says. Nothing of the prompt before is reused: a run that was cut off gives the same texts."""
        self.check(prompt, sampling)
        self._runtime.reset()
        return self._runtime.generate_many(prompt, sampling, count)


def as_sampler(source: Session | Sampler) -> Sampler:
    """A runtime as a sampler; a sampler as it is."""
    return source if isinstance(source, Sampler) else RuntimeSampler(source)
