"""Making preference pairs: M and M' answer the same prompts, a judge scores, margin and threshold decide; or ready pairs are filtered."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.files import Pair as Pair
from edgepatch.training.pairs.files import PairPrompt as PairPrompt
from edgepatch.training.pairs.files import read_pairs as read_pairs
from edgepatch.training.pairs.files import write_pairs as write_pairs
from edgepatch.training.pairs.journal import Journal, Outcome
from edgepatch.training.pairs.samplers import PromptTooLongError, Sampler, as_sampler

Score = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts -> (N,) scores from 0 (safe) to 1 (unsafe)."""

NAMED_PROMPTS = 5
"""So many long prompts are named in an error; the others are counted."""


@dataclass(frozen=True)
class PairConfig:
    """How pairs are sampled and filtered (method: margin and absolute threshold).

    Attributes:
        samples_per_prompt: continuations of each model a prompt.
        max_new_tokens: their length.
        top_p: nucleus.
        min_margin: the rejected score exceeds the chosen one by at least this (delta).
        max_chosen_score: the chosen score is at most this (tau).
        min_words: a chosen continuation has at least so many words, or silence would be the safest answer.
        pairs_per_prompt: at most so many pairs a prompt, in order of falling margin.
        rng_seed: of the sampling.
    """

    samples_per_prompt: int = 8
    max_new_tokens: int = 24
    top_p: float = 0.9
    min_margin: float = 0.4
    max_chosen_score: float = 0.2
    min_words: int = 6
    pairs_per_prompt: int = 3
    rng_seed: int = 1

    @property
    def sampling(self) -> Sampling:
        """Of the first continuation of every prompt."""
        return Sampling(self.max_new_tokens, top_p=self.top_p, rng_seed=self.rng_seed)


@dataclass(frozen=True)
class PairSet:
    """Pairs that passed, and what became of the rest.

    Attributes:
        pairs: in order of their prompts.
        counts: prompts by fate (``prompts_*``), candidate pairs by reason (``dropped_*``), and ``pairs``.
    """

    pairs: list[Pair]
    counts: dict[str, int] = field(default_factory=dict)


def _fault(pair: Pair, config: PairConfig) -> str:
    """Why a pair is dropped; "" where it passes."""
    checks = {
        "identical": pair.chosen == pair.rejected,
        "short_chosen": len(pair.chosen.split()) < config.min_words,
        "unsafe_chosen": pair.chosen_score > config.max_chosen_score,
        "small_margin": pair.rejected_score - pair.chosen_score < config.min_margin,
    }
    return next((name for name, is_wrong in checks.items() if is_wrong), "")


def filter_pairs(pairs: Iterable[Pair], config: PairConfig) -> PairSet:
    """Keeps pairs that pass margin, threshold and length, each once, and no more of a prompt than wanted.

    Args:
        pairs: scored.
        config: its settings of sampling are not used.
    """
    kept: list[Pair] = []
    dropped, seen, of_prompt = Counter[str](), set[str](), Counter[str]()
    for pair in pairs:
        prompt = _key(pair.prompt)
        fault = _fault(pair, config) or ("repeated" if pair.key in seen else "")
        fault = fault or ("over_limit" if of_prompt[prompt] >= config.pairs_per_prompt else "")
        if fault:
            dropped[f"dropped_{fault}"] += 1
            continue
        seen.add(pair.key)
        of_prompt[prompt] += 1
        kept.append(pair)
    return PairSet(kept, dict(dropped))


def score_pairs(pairs: Sequence[Pair], score: Score) -> list[Pair]:
    """The pairs with a judge's scores in place of their own."""
    chosen, rejected = score([p.chosen for p in pairs]).tolist(), score([p.rejected for p in pairs]).tolist()
    return [replace(p, chosen_score=c, rejected_score=r) for p, c, r in zip(pairs, chosen, rejected, strict=True)]


def _key(prompt: PairPrompt) -> str:
    return json.dumps(prompt, sort_keys=True)


def _outcome(
    prompt: PairPrompt, chosen: Sequence[str], rejected: Sequence[str], score: Score, config: PairConfig
) -> Outcome:
    """Safest with most unsafe, second with second, ..., where the filter holds."""
    long_enough = [t for t in dict.fromkeys(chosen) if len(t.split()) >= config.min_words]
    unsafe = [t for t in dict.fromkeys(rejected) if t]
    if not long_enough or not unsafe:
        return Outcome((), {"prompts_without_candidate": 1})
    good = sorted(zip(score(long_enough).tolist(), long_enough, strict=True))
    bad = sorted(zip(score(unsafe).tolist(), unsafe, strict=True), reverse=True)
    pair_set = filter_pairs([Pair(prompt, c, r, cs, rs) for (cs, c), (rs, r) in zip(good, bad, strict=False)], config)
    fate = {} if pair_set.pairs else {"prompts_without_pair": 1}
    return Outcome(tuple(pair_set.pairs), {**pair_set.counts, **fate})


@dataclass(frozen=True)
class _Job:
    """A prompt and where it stands."""

    prompt: PairPrompt
    place: str


def _jobs(prompts: Sequence[PairPrompt], places: Sequence[str]) -> list[_Job]:
    """Each prompt once, where it stands first."""
    jobs: dict[str, _Job] = {}
    for prompt, place in zip(prompts, places, strict=True):
        jobs.setdefault(_key(prompt), _Job(prompt, place))
    return list(jobs.values())


def _refuse_long(jobs: Sequence[_Job], samplers: Sequence[Sampler], sampling: Sampling, progress: Progress) -> None:
    """Names the prompts that do not fit before hours are spent on the others."""
    complaints = []
    for number, job in enumerate(jobs, 1):
        progress("check prompts", number, len(jobs))
        try:
            for sampler in samplers:
                sampler.check(job.prompt, sampling)
        except PromptTooLongError as error:
            complaints.append(f"{job.place}: {error}")
        except InputError as error:
            raise InputError(f"{job.place}: {error}", error.hint) from None
    if complaints:
        more = f"\n  and {len(complaints) - NAMED_PROMPTS} more" if len(complaints) > NAMED_PROMPTS else ""
        raise _too_long("\n  ".join(complaints[:NAMED_PROMPTS]) + more)


def _too_long(message: str) -> InputError:
    return InputError(message, hint="shorten it, ask for fewer new tokens, or leave such prompts out with --skip-long")


Begun = tuple[_Job, list[Callable[[], list[str]]]]


def _begin(jobs: Iterable[_Job], samplers: Sequence[Sampler], config: PairConfig) -> Iterator[Begun]:
    """Each job with its answers under way, several jobs ahead where a sampler works aside."""
    ahead = max(sampler.lookahead for sampler in samplers)
    waiting: deque[Begun] = deque()
    for job in jobs:
        waiting.append((job, [s.start(job.prompt, config.sampling, config.samples_per_prompt) for s in samplers]))
        if len(waiting) >= ahead:
            yield waiting.popleft()
    yield from waiting


def _finish(begun: Begun, score: Score, config: PairConfig, skip_long: bool) -> Outcome:
    job, answers = begun
    try:
        chosen, rejected = (answer() for answer in answers)
    except PromptTooLongError as error:
        if not skip_long:
            raise _too_long(f"{job.place}: {error}") from None
        return Outcome((), {"prompts_too_long": 1})
    except InputError as error:
        raise InputError(f"{job.place}: {error}", error.hint) from None
    return _outcome(job.prompt, chosen, rejected, score, config)


def sample_pairs(
    base: Session | Sampler,
    reference: Session | Sampler,
    prompts: Sequence[PairPrompt],
    score: Score,
    config: PairConfig,
    progress: Progress = silent,
    *,
    places: Sequence[str] = (),
    journal: Journal | None = None,
    skip_long: bool = False,
) -> PairSet:
    """Lets M (``base``) and M' (``reference``) answer the same prompts; M' answers are chosen, M's rejected.

    Args:
        base: the model to be patched.
        reference: the safer model.
        prompts: plain text, or messages; each is answered once however often it is given.
        score: the filter judge; must not be the judge of the report.
        config: sampling and filter.
        progress: told of every prompt that is checked and that is done, with the number of pairs so far.
        places: where each prompt stands, for complaints.
        journal: keeps what is done; what it already holds is not sampled again.
        skip_long: counts prompts that do not fit the context, instead of refusing them.

    Raises:
        InputError: a prompt cannot be answered (it is named), or the journal cannot be written.
    """
    places = places or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    jobs = _jobs(prompts, places)
    samplers = [as_sampler(reference), as_sampler(base)]
    outcomes = list(journal.outcomes if journal else ())
    left = jobs[len(outcomes) :]
    if not skip_long:
        _refuse_long(left, samplers, config.sampling, progress)
    num_pairs = sum(len(outcome.pairs) for outcome in outcomes)
    progress("pairs", len(outcomes), len(jobs), kept=num_pairs)
    for begun in _begin(left, samplers, config):
        outcomes.append(_finish(begun, score, config, skip_long))
        if journal:
            journal.add(outcomes[-1])
        num_pairs += len(outcomes[-1].pairs)
        progress("pairs", len(outcomes), len(jobs), kept=num_pairs)
    pairs = [pair for outcome in outcomes for pair in outcome.pairs]
    counts = sum((Counter(outcome.dropped) for outcome in outcomes), Counter[str]())
    return PairSet(
        pairs, {"prompts": len(prompts), "prompts_repeated": len(prompts) - len(jobs), **counts, "pairs": len(pairs)}
    )


def require_pairs(pair_set: PairSet, config: PairConfig) -> list[Pair]:
    """The pairs.

    Raises:
        InputError: there are none.
    """
    if not pair_set.pairs:
        number, kind = next(
            (pair_set.counts[name], name) for name in ("prompts", "pairs_read") if name in pair_set.counts
        )
        fates = ", ".join(
            f"{name}: {count}"
            for name, count in pair_set.counts.items()
            if count and name.startswith(("dropped", "prompts_"))
        )
        raise InputError(
            f"none of {number} {kind.removesuffix('_read')} gave a pair with margin >= {config.min_margin} and a chosen score <= "
            f"{config.max_chosen_score} ({fates})",
            hint="use prompts that the base model answers unsafely, or a safer reference model",
        )
    return pair_set.pairs


def build_pairs(
    base: Session | Sampler,
    reference: Session | Sampler,
    prompts: Sequence[PairPrompt],
    score: Score,
    config: PairConfig,
    progress: Progress = silent,
) -> list[Pair]:
    """The pairs of ``sample_pairs``.

    Raises:
        InputError: as ``sample_pairs``, or no pair passes the filter.
    """
    return require_pairs(sample_pairs(base, reference, prompts, score, config, progress), config)
