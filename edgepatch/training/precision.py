"""Which type the frozen weights take in training: tried on the model itself, with rows of the run, on the machine at hand.

No table of processors decides: a type whose matrix products are fast on one CPU is slow on the next, and how much the products count
depends on the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.frozen.rows import Example
from edgepatch.training.policies import Policy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TRIED = ("float32", "bfloat16")
TRIAL_S = 1.0
TRIAL_SHARE = 0.01
"""Both types together take about a second, or a hundredth of the run where that is more: in bfloat16 a large part of a step is the same
for one pair and for eight, so a batch must be tried as large as those of the run. One pair of each is tried in any case."""

ROUNDS = 3
LEAST_SPEEDUP = 1.2
LEAST_SAVED_S = 10.0
"""Over the run. Below that float32 stays: it is exact, and a run repeats its bits on every machine of a kind."""

LARGEST_DIFFERENCE = 0.01
"""Of the answers' log-probability, relative. SmolLM2-135M is at 0.003."""

LEAST_COSINE = 0.98
"""Between the gradients of the soft prompt. SmolLM2-135M is at 0.998."""

SPARE_MEMORY = 1.25
"""The copy in the other type must fit so many times into what is available: the activations need room too."""


@dataclass(frozen=True)
class DtypeChoice:
    """The type that was taken, and why.

    Attributes:
        dtype: one of ``TRIED``.
        reason: of the choice, in words.
        num_pairs: of a step that was timed; 0 where none was.
        seconds: type -> of the quickest step, forward and backward: CPU seconds, so that waiting for other work does not count, or those of
            the GPU.
        difference: relative, of the log-probability in bfloat16; ``None`` where it was not computed.
        cosine: of the gradients of the soft prompt; likewise.
    """

    dtype: str
    reason: str
    num_pairs: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    difference: float | None = None
    cosine: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the record of a run."""
        return asdict(self)

    def __str__(self) -> str:
        timings = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.seconds.items())
        pairs = f"{self.num_pairs} pair{'s'[: self.num_pairs > 1]}"
        trial = f"; a step of {pairs}: {timings}" if timings else ""
        if self.difference is None:
            return f"dtype {self.dtype}: {self.reason}{trial}"
        return (
            f"dtype {self.dtype}: {self.reason}{trial}; "
            f"in bfloat16 the loss differs by {self.difference:.2%}, gradient cosine {self.cosine:.4f}"
        )


def choose_dtype(
    models: FrozenModels, policy: Policy, examples: Sequence[Example], pairs_at_once: int, num_pairs: int
) -> DtypeChoice:
    """Times a forward and a backward step of both types, in turns.

    The models are in float32, and are again afterwards.

    Args:
        models: the first of them is tried.
        policy: a soft prompt, as training would start from it.
        examples: packed rows of the run; those of middle length are taken.
        pairs_at_once: in memory.
        num_pairs: that the whole run evaluates.
    """
    refusal = _why_not_tried(models)
    if refusal:
        return DtypeChoice("float32", refusal)
    trial = _Trial(models, policy)
    one = _of_middle_length(examples, 1)
    try:
        began = time.monotonic()
        answers = {name: trial.wearing(name).step(one) for name in TRIED}
        budget = max(TRIAL_S, TRIAL_SHARE * num_pairs * (time.monotonic() - began) / 2)
        count = int(budget / (time.monotonic() - began))
        chosen = _of_middle_length(examples, max(1, min(pairs_at_once, count)))
        seconds = trial.time_in_turns(chosen, budget)
    except RuntimeError as error:  # PyTorch's: no kernel for the type, or no memory for it
        return DtypeChoice("float32", f"bfloat16 does not run: {str(error).splitlines()[0][:120]}")
    finally:
        trial.wearing("float32")
    return decide(DtypeChoice("", "", len(chosen), seconds, *_compare(answers)), num_pairs)


def decide(trial: DtypeChoice, num_pairs: int) -> DtypeChoice:
    """The rule: bfloat16 where it is accurate, and faster by enough to matter.

    Args:
        trial: what was measured; its type and reason do not count.
        num_pairs: that the whole run evaluates.
    """
    assert trial.difference is not None and trial.cosine is not None
    full, half = (trial.seconds[name] for name in TRIED)
    saved = (full - half) / trial.num_pairs * num_pairs
    if not (trial.difference <= LARGEST_DIFFERENCE and trial.cosine >= LEAST_COSINE):  # also where one is NaN
        dtype, reason = "float32", "bfloat16 is not accurate enough"
    elif full < LEAST_SPEEDUP * half:
        dtype, reason = "float32", f"bfloat16 is not {LEAST_SPEEDUP} times as fast"
    elif saved < LEAST_SAVED_S:
        dtype, reason = "float32", f"bfloat16 would save less than {LEAST_SAVED_S:.0f} s of the run"
    else:
        dtype, reason = "bfloat16", f"{full / half:.1f} times as fast"
    return DtypeChoice(dtype, reason, trial.num_pairs, trial.seconds, trial.difference, trial.cosine)


class _Trial:
    """One model whose parameters change between two types, without a second model beside it."""

    def __init__(self, models: FrozenModels, policy: Policy) -> None:
        self._models, self._policy = models, policy
        self._weights = {"float32": _weights(models.base)}

    def wearing(self, name: str) -> _Trial:
        import torch

        if name not in self._weights:
            self._weights[name] = {p: w.to(getattr(torch, name)) for p, w in self._weights["float32"].items()}
        for parameter, weights in self._weights[name].items():
            parameter.data = weights
        return self

    def step(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answers, and the gradient of the soft prompt."""
        models, parameters = self._models, self._policy.parameters()
        memory = self._policy.memory(models.base) if models.packs else []
        embeddings = None if models.packs else self._policy.embeddings()
        log_probabilities = models.log_probabilities(self._policy.model(models.base), examples, memory, embeddings)
        log_probabilities.sum().backward()
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        return log_probabilities.detach(), gradients[0]

    def time_in_turns(self, examples: Sequence[Example], budget_s: float) -> dict[str, float]:
        """Seconds of each type's quickest step: one of each, and more as long as the budget lasts."""
        times: dict[str, list[float]] = {name: [] for name in TRIED}
        began = time.monotonic()
        for turn in range(ROUNDS):
            if turn and time.monotonic() - began > budget_s / 2:
                break
            for name in TRIED:
                self.wearing(name)
                start = self._clock()
                self.step(examples)
                times[name].append(self._clock() - start)
        return {name: min(samples) for name, samples in times.items()}

    def _clock(self) -> float:
        if self._models.device == "cpu":
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()


def _weights(model: PreTrainedModel) -> dict[torch.nn.Parameter, torch.Tensor]:
    return {parameter: parameter.data for parameter in model.parameters() if parameter.is_floating_point()}


def _of_middle_length(examples: Sequence[Example], count: int) -> list[Example]:
    ordered = sorted(examples, key=lambda e: e.length)
    first = max(0, (len(ordered) - count) // 2)
    return ordered[first : first + count]


def _compare(answers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Relative difference of the log-probabilities, and cosine of the gradients."""
    import torch

    (full, gradient), (half, other) = (answers[name] for name in TRIED)
    difference = float((half - full).abs().sum() / full.abs().sum())
    return difference, float(torch.nn.functional.cosine_similarity(gradient, other, dim=0))


def _why_not_tried(models: FrozenModels) -> str:
    """Why bfloat16 cannot be tried; empty where it can."""
    import torch

    if models.device != "cpu" and not torch.cuda.is_bf16_supported():
        return "the GPU does not know bfloat16"
    need = sum(2 * weights.numel() for weights in _weights(models.base).values())
    have = available_bytes(models.device)
    if have is not None and SPARE_MEMORY * need > have:
        return (
            f"bfloat16 was not tried, which takes {need / 2**30:.1f} GiB beside the model, and {have / 2**30:.1f} GiB are "
            "available; --dtype bfloat16 takes it without a trial"
        )
    return ""


def available_bytes(device: str) -> int | None:
    """Memory that can be had now, of the GPU or of the machine; ``None`` where the system does not say."""
    if device != "cpu":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
