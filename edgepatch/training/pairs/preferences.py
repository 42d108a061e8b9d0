"""Making preference pairs: M and its teacher answer the same prompts, a judge scores, margin and threshold decide."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.progress import Progress, silent
from edgepatch.prompts.sets import evenly
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.files import Pair as Pair
from edgepatch.training.pairs.files import PairPrompt as PairPrompt
from edgepatch.training.pairs.files import read_pairs as read_pairs
from edgepatch.training.pairs.files import write_pairs as write_pairs
from edgepatch.training.pairs.filtering import PairConfig as PairConfig
from edgepatch.training.pairs.filtering import PairSet as PairSet
from edgepatch.training.pairs.filtering import Score as Score
from edgepatch.training.pairs.filtering import dropped_row, key_of
from edgepatch.training.pairs.filtering import filter_pairs as filter_pairs
from edgepatch.training.pairs.filtering import score_pairs as score_pairs
from edgepatch.training.pairs.journal import Journal, Outcome
from edgepatch.training.pairs.makers import PairMaker, ScoredPairs
from edgepatch.training.pairs.samplers import PromptTooLongError, Sampler, as_sampler
from edgepatch.training.pairs.teacher_safety import MEASURED_PROMPTS, TeacherSafety, measured

NAMED_PROMPTS = 5
"""So many long prompts are named in an error; the others are counted."""


@dataclass(frozen=True)
class _Job:
    """A prompt, where it stands, and its number among the prompts."""

    prompt: PairPrompt
    place: str
    number: int


def _jobs(prompts: Sequence[PairPrompt], places: Sequence[str]) -> list[_Job]:
    """Each prompt once, where it stands first; those that the teacher is measured on, at even distances, come before the others."""
    jobs: dict[str, _Job] = {}
    for number, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        jobs.setdefault(key_of(prompt), _Job(prompt, place, number))
    ordered = list(jobs.values())
    first = evenly(ordered, MEASURED_PROMPTS)
    numbers = {job.number for job in first}
    return first + [job for job in ordered if job.number not in numbers]


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


def _finish(begun: Begun, maker: PairMaker, skip_long: bool) -> Outcome:
    job, answers = begun
    try:
        chosen, rejected = (answer() for answer in answers)
    except PromptTooLongError as error:
        if not skip_long:
            raise _too_long(f"{job.place}: {error}") from None
        return Outcome((), {"prompts_too_long": 1}, ({"prompt": job.prompt, **dropped_row("too_long", job.place)},))
    except InputError as error:
        raise InputError(f"{job.place}: {error}", error.hint) from None
    return maker.outcome(job.prompt, job.place, chosen, rejected)


def sample_pairs(
    base: Session | Sampler,
    teacher: Session | Sampler,
    prompts: Sequence[PairPrompt],
    judge: Score | PairMaker,
    config: PairConfig,
    progress: Progress = silent,
    *,
    places: Sequence[str] = (),
    journal: Journal | None = None,
    skip_long: bool = False,
    check_teacher: Callable[[TeacherSafety], None] = lambda safety: None,
) -> PairSet:
    """Lets M (``base``) and its teacher (M') answer the same prompts; the teacher's answers are chosen, M's rejected.

    Args:
        base: the model to be patched.
        teacher: a safer model, or the same one behind a safety text.
        prompts: plain text, or messages; each is answered once however often it is given.
        judge: the filter judge, which must not be the judge of the report; or what else makes pairs of the answers.
        config: sampling and filter.
        progress: told of every prompt that is checked and that is done, with the number of pairs so far.
        places: where each prompt stands, for complaints.
        journal: keeps what is done; what it already holds is not sampled again.
        skip_long: counts prompts that do not fit the context, instead of refusing them.
        check_teacher: told how safe the teacher is beside the base, measured on the first prompts, before the others are sampled.

    Raises:
        InputError: a prompt cannot be answered (it is named), or the journal cannot be written.
        Exception: as ``check_teacher`` raises it.
    """
    places = places or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    jobs = _jobs(prompts, places)
    samplers = [as_sampler(teacher), as_sampler(base)]
    maker = judge if isinstance(judge, PairMaker) else ScoredPairs(judge, config)
    outcomes = list(journal.outcomes if journal else ())
    if not skip_long:
        _refuse_long(jobs[len(outcomes) :], samplers, config.sampling, progress)
    num_pairs = sum(len(outcome.pairs) for outcome in outcomes)
    progress("pairs", len(outcomes), len(jobs), kept=num_pairs)
    for part in (jobs[:MEASURED_PROMPTS], jobs):
        for begun in _begin(part[len(outcomes) :], samplers, config):
            outcomes.append(_finish(begun, maker, skip_long))
            if journal:
                journal.add(outcomes[-1])
            num_pairs += len(outcomes[-1].pairs)
            progress("pairs", len(outcomes), len(jobs), kept=num_pairs)
        if part is not jobs:
            check_teacher(measured(outcomes[:MEASURED_PROMPTS]))
    return _pair_set(jobs, outcomes, len(prompts))


def _pair_set(jobs: Sequence[_Job], outcomes: Sequence[Outcome], num_prompts: int) -> PairSet:
    """What the outcomes are together, in order of the prompts."""
    in_order = [outcomes[i] for i in sorted(range(len(jobs)), key=lambda i: jobs[i].number)]
    pairs = [pair for outcome in in_order for pair in outcome.pairs]
    counts = sum((Counter(outcome.dropped) for outcome in in_order), Counter[str]())
    return PairSet(
        pairs,
        {"prompts": num_prompts, "prompts_repeated": num_prompts - len(jobs), **counts, "pairs": len(pairs)},
        [dict(row) for outcome in in_order for row in outcome.left_out],
        measured(outcomes),
    )


def require_pairs(pair_set: PairSet, config: PairConfig, dropped: Path | None = None) -> list[Pair]:
    """The pairs.

    Args:
        pair_set: may be empty.
        config: its limits, for the complaint.
        dropped: file that tells what was dropped.

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
            hint="use prompts that the base model answers unsafely, or a safer teacher"
            + (f"; {dropped} has every score" if dropped else ""),
        )
    return pair_set.pairs


def build_pairs(
    base: Session | Sampler,
    teacher: Session | Sampler,
    prompts: Sequence[PairPrompt],
    judge: Score | PairMaker,
    config: PairConfig,
    progress: Progress = silent,
) -> list[Pair]:
    """The pairs of ``sample_pairs``.

    Raises:
        InputError: as ``sample_pairs``, or no pair passes the filter.
    """
    return require_pairs(sample_pairs(base, teacher, prompts, judge, config, progress), config)
