"""lm-eval's tasks on any runtime, bare and patched on the same items: what does a patch cost in capability?

Two scores of two runs say little: their intervals hold how hard the items are, which both share. So every figure here comes with the
difference over the same items and its own interval, and with the items that the patch broke.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgepatch.bench.metrics import Estimate, bootstrap_interval, paired_bootstrap_difference, wilson_interval
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.progress import Progress, silent, stage
from edgepatch.runtimes.session import Session

OWN_TASKS = Path(__file__).parent / "tasks"
DRAWS = 1000
Aggregation = Callable[[Sequence[Any]], float]


@dataclass(frozen=True)
class HarnessConfig:
    """What to run.

    Attributes:
        tasks: names of tasks, groups or tags; ``*`` stands for anything.
        include_path: folder with task files; it may hold Python that they name, so it must be trusted. Default: the tasks shipped.
        limit: so many first items of each task; ``None`` takes all.
        num_fewshot: examples in front of each item; ``None`` leaves it to the task.
        chat: put each item into the model's chat template.
    """

    tasks: tuple[str, ...]
    include_path: Path = OWN_TASKS
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.include_path.is_dir():
            raise InputError(f"no folder {self.include_path}", hint="name the folder of the task files")


class Flips(NamedTuple):
    """Items whose answer changed between right and wrong.

    Attributes:
        broken: right bare, wrong patched (negative flips).
        repaired: wrong bare, right patched.
        p_value: of McNemar's exact test: how likely so uneven a split is, or a more uneven one, if the patch breaks as often as it
            repairs.
    """

    broken: int
    repaired: int
    p_value: float


@dataclass(frozen=True)
class Score:
    """One metric of one task or group.

    Attributes:
        task, metric: as lm-eval names them.
        num_items: behind every figure of this score.
        higher_is_better: ``None`` where lm-eval does not know.
        bare, patched: with 95 % intervals; ``patched`` and what follows is ``None`` where only the bare model ran.
        difference: patched minus bare, paired over items.
        flips: of metrics that are right or wrong an item.
    """

    task: str
    metric: str
    num_items: int
    higher_is_better: bool | None
    bare: Estimate
    patched: Estimate | None = None
    difference: Estimate | None = None
    flips: Flips | None = None


@dataclass(frozen=True)
class Comparison:
    """Scores, and lm-eval's own records of each item behind them: ``items[arm][task]``."""

    scores: list[Score]
    items: dict[str, dict[str, list[dict[str, Any]]]]


def compare(runtime: Session, config: HarnessConfig, progress: Progress = silent) -> Comparison:
    """Runs tasks on the bare model and, where the runtime has a patch, patched.

    Args:
        runtime: its patch is in place again afterwards.
        config: which tasks.
        progress: told of the requests of the bare and of the patched model.

    Raises:
        MissingExtraError: lm-eval is not installed.
        InputError: a task does not exist, cannot be loaded, or does not fit the model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "harness")
    with _quiet():
        with stage(progress, "read tasks"):
            manager = _manager(config)
        if runtime.patch is None:
            return _paired(_evaluate(runtime, manager, config, progress), None)
        patched = _evaluate(runtime, manager, config, progress)
        with _without_patch(runtime):
            bare = _evaluate(runtime, manager, config, progress)
    return _paired(bare, patched)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval tells its whole course at the level of warnings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_patch(runtime: Session) -> Iterator[None]:
    parts = runtime.parts
    runtime.swap(None)
    try:
        yield
    finally:
        runtime.swap(parts)


def _manager(config: HarnessConfig) -> Any:
    """lm-eval's table of tasks; its own ones, whose files take seconds to read, only where a name is not among ours."""
    from lm_eval.tasks import TaskManager

    for with_defaults in (False, True):
        manager = TaskManager(include_path=str(config.include_path), include_defaults=with_defaults)
        unknown = [name for name in config.tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    own = TaskManager(include_path=str(config.include_path), include_defaults=False).all_tasks
    raise InputError(
        f"no task {unknown[0]}",
        hint=f"{config.include_path} has {', '.join(sorted(own)) or 'none'}; `lm-eval ls tasks` lists lm-eval's own",
    )


def _evaluate(runtime: Session, manager: Any, config: HarnessConfig, progress: Progress) -> dict[str, Any]:
    """What lm-eval says of the runtime as it is."""
    from lm_eval import simple_evaluate

    from edgepatch.bench.harness.model import RuntimeModel

    arm = "patched" if runtime.patch else "bare"
    model = RuntimeModel(runtime, progress, arm)
    results: dict[str, Any] = simple_evaluate(
        model,
        tasks=manager.match_tasks(list(config.tasks)),
        task_manager=manager,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        apply_chat_template=config.chat,
        fewshot_as_multiturn=config.chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    return results


# Pairing.

Values = dict[str, dict[tuple[str, int], Any]]
"""Metric -> (task, number of the item) -> its value."""


def _paired(bare: dict[str, Any], patched: dict[str, Any] | None) -> Comparison:
    arms = {"bare": bare} if patched is None else {"bare": bare, "patched": patched}
    if patched is not None:
        _require_same_prompts(bare["samples"], patched["samples"])
    scores = []
    for name, tasks in _members(bare).items():
        values = [_values(tasks, results["samples"]) for results in arms.values()]
        for metric in values[0]:
            aggregate = _aggregation(bare["configs"][tasks[0]], metric)
            higher = bare["higher_is_better"].get(tasks[0], {}).get(metric.split(",")[0])
            scores.append(_score(name, metric, higher, [list(arm[metric].values()) for arm in values], aggregate))
    return Comparison(scores, {arm: results["samples"] for arm, results in arms.items()})


def _members(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each task with itself, each group with the tasks below it."""
    below: Mapping[str, list[str]] = results.get("group_subtasks") or {}

    def tasks_of(name: str) -> list[str]:
        return [task for child in below.get(name, []) for task in tasks_of(child)] or [name]

    return {name: tasks_of(name) for name in {**below, **dict.fromkeys(results["samples"])}}


def _require_same_prompts(bare: Mapping[str, Any], patched: Mapping[str, Any]) -> None:
    for task, samples in bare.items():
        hashes = [[sample["prompt_hash"] for sample in arm] for arm in (samples, patched[task])]
        if hashes[0] != hashes[1]:
            raise InputError(
                f"task {task} does not make the same prompts twice", hint="fix the random seed in its file"
            )


def _values(tasks: Sequence[str], samples: Mapping[str, list[dict[str, Any]]]) -> Values:
    values: Values = defaultdict(dict)
    for task in tasks:
        for sample in samples[task]:
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                values[name][task, sample["doc_id"]] = sample[metric]
    return values


def _aggregation(config: Mapping[str, Any], metric: str) -> Aggregation | None:
    """How lm-eval makes one figure of the items' values; ``None`` for their mean."""
    from lm_eval.api.registry import get_aggregation, get_metric_aggregation

    plain = metric.split(",")[0]
    named = next(
        (entry.get("aggregation") for entry in config.get("metric_list") or [] if entry["metric"] == plain), None
    )
    aggregation = named if callable(named) else get_aggregation(named) if named else get_metric_aggregation(plain)
    return None if aggregation is get_aggregation("mean") else aggregation


def _score(
    task: str, metric: str, higher: bool | None, arms: Sequence[list[Any]], aggregate: Aggregation | None
) -> Score:
    if aggregate is not None:
        bare, *rest = _resampled(arms, aggregate)  # nothing more where only the bare model ran
        patched, difference = rest or (None, None)
        return Score(task, metric, len(arms[0]), higher, bare, patched, difference)
    numbers = [[float(value) for value in arm] for arm in arms]
    estimates = [_mean(arm) for arm in numbers]
    if len(arms) == 1:
        return Score(task, metric, len(arms[0]), higher, estimates[0])
    difference = paired_bootstrap_difference(numbers[1], numbers[0])
    flips = count_flips(*numbers) if set(numbers[0] + numbers[1]) <= {0.0, 1.0} else None
    return Score(task, metric, len(arms[0]), higher, estimates[0], estimates[1], difference, flips)


def _mean(values: list[float]) -> Estimate:
    mean = sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        return Estimate(mean, *wilson_interval(int(sum(values)), len(values)))
    return Estimate(mean, *bootstrap_interval(values))


def _resampled(arms: Sequence[list[Any]], aggregate: Aggregation) -> list[Estimate]:
    """(bare,) or (bare, patched, difference) of a metric that is no mean; percentile bootstrap over items."""
    rng = np.random.default_rng(0)
    count = len(arms[0])
    draws = [np.arange(count), *rng.integers(0, count, (DRAWS, count))]
    values = np.array([[aggregate([arm[i] for i in draw]) for arm in arms] for draw in draws])  # (1 + draws, arms)
    if len(arms) == 2:
        values = np.column_stack([values, values[:, 1] - values[:, 0]])
    low, high = np.quantile(values[1:], [0.025, 0.975], axis=0, method="nearest")
    return [Estimate(*map(float, figures)) for figures in zip(values[0], low, high, strict=True)]


def count_flips(bare: Sequence[float], patched: Sequence[float]) -> Flips:
    """Negative and positive flips of items that are right (1) or wrong (0).

    Source of the test: McNemar 1947, "Note on the sampling error of the difference between correlated proportions", exact form.
    """
    broken = sum(b > p for b, p in zip(bare, patched, strict=True))
    repaired = sum(b < p for b, p in zip(bare, patched, strict=True))
    changed = broken + repaired
    tail = sum(math.comb(changed, k) for k in range(min(broken, repaired) + 1))
    return Flips(broken, repaired, min(1.0, 2 * tail / 2**changed))


def as_document(runtime: Session, config: HarnessConfig, scores: Sequence[Score]) -> dict[str, Any]:
    """The scores as JSON, with what they were measured on."""
    patch = runtime.patch
    return {
        "model": runtime.spec.as_dict(),
        "runtime": runtime.name,
        "quantization": runtime.quantization,
        "patch": {"name": patch.name, "version": patch.version, "digest": patch.digest} if patch else None,
        "config": {**asdict(config), "include_path": config.include_path.name},
        "scores": [_as_json(score) for score in scores],
    }


def _as_json(score: Score) -> dict[str, Any]:
    def plain(value: object) -> object:
        return value._asdict() if isinstance(value, (Estimate, Flips)) else value

    return {name: plain(value) for name, value in vars(score).items()}
