"""Timed side by side: every arm in turn within each repeat, and ratios taken within the repeat.

What disturbs a machine for a minute then disturbs all arms alike. Rows carry llama-bench's column names (``n_prompt``, ``n_gen``,
``n_depth``, ``avg_ts``, ...), so that its tables and these can be laid beside each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np

from edgepatch.bench.metrics import Estimate, bootstrap_median
from edgepatch.progress import Progress, silent


def _nothing() -> None:
    pass


class Measure(NamedTuple):
    """What is measured.

    Attributes:
        name: "ttft", "decode", "swap", ...
        n_prompt: tokens evaluated within the time.
        n_gen: tokens generated within it.
        n_depth: tokens evaluated before it.
    """

    name: str
    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0


@dataclass(frozen=True)
class Cell:
    """A measure of an arm.

    Attributes:
        measure: which.
        arm: whose.
        act: what is timed.
        prepare: before each repeat, not timed.
        finish: after it, not timed.
    """

    measure: Measure
    arm: str
    act: Callable[[], object]
    prepare: Callable[[], object] = field(default=_nothing)
    finish: Callable[[], object] = field(default=_nothing)


Times = dict[tuple[Measure, str], list[float]]
"""Milliseconds of each repeat."""


def interleave(cells: Sequence[Cell], repeats: int, progress: Progress = silent, stage: str = "measures") -> Times:
    """Times every cell ``repeats`` times, after one round that does not count.

    Cells of one measure stand side by side, in an order that is turned by one with each repeat.

    Args:
        cells: what to time.
        repeats: N.
        progress: told of every repeat of every cell.
        stage: what it is called there.

    Returns:
        N milliseconds of each cell.
    """
    groups: dict[Measure, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.measure, []).append(cell)
    times: Times = {(cell.measure, cell.arm): [] for cell in cells}
    done, total = 0, len(cells) * (repeats + 1)
    progress(stage, 0, total)
    for repeat in range(repeats + 1):
        for group in groups.values():
            turn = repeat % len(group)
            for cell in group[turn:] + group[:turn]:
                milliseconds = _time(cell)
                done += 1
                progress(stage, done, total)
                if repeat:
                    times[cell.measure, cell.arm].append(milliseconds)
    return times


def _time(cell: Cell) -> float:
    cell.prepare()
    began = time.perf_counter()
    cell.act()
    milliseconds = (time.perf_counter() - began) * 1000
    cell.finish()
    return milliseconds


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Median of the ratios of each repeat, with its bootstrap interval.

    Args:
        above: milliseconds of each repeat.
        below: of the same repeats, of the other arm.
    """
    return bootstrap_median(np.asarray(above) / np.asarray(below))


def pooled_ratio(times: Times, name: str, above: str, below: str, is_rate: bool = False) -> Estimate | None:
    """The ratio of two arms over all measures of a name; ``None`` where they share none.

    Args:
        times: of all.
        name: of the measures.
        above: arm.
        below: arm.
        is_rate: whether rates are compared: the inverse of times.
    """
    one: list[float] = []
    two: list[float] = []
    for measure, arm in times:
        if measure.name == name and arm == above and (measure, below) in times:
            one += times[measure, above]
            two += times[measure, below]
    if not one:
        return None
    return ratio(two, one) if is_rate else ratio(one, two)


def row(
    measure: Measure, arm: str, milliseconds: Sequence[float], common: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """A measure of an arm in llama-bench's columns, with medians and the spread beside its means.

    Args:
        measure: which.
        arm: whose.
        milliseconds: N.
        common: columns of every row: model, threads, types.
        **more: further columns.
    """
    values = np.asarray(milliseconds)
    tokens = measure.n_gen if measure.n_gen > 1 else measure.n_prompt  # a first token's time is the prompt's
    rates = tokens / (values / 1000)
    return {
        "arm": arm,
        "measure": measure.name,
        "status": "ok",
        **common,
        "n_prompt": measure.n_prompt,
        "n_gen": measure.n_gen,
        "n_depth": measure.n_depth,
        "test_time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "repeats": len(values),
        "median_ms": round(float(np.median(values)), 4),
        "min_ms": round(float(values.min()), 4),
        "max_ms": round(float(values.max()), 4),
        "spread": round(float((values.max() - values.min()) / np.median(values)), 4),
        "samples_ms": [round(float(v), 4) for v in values],
        "avg_ns": round(float(values.mean()) * 1e6),
        "stddev_ns": round(_deviation(values) * 1e6),
        **(
            {
                "avg_ts": round(float(rates.mean()), 3),
                "stddev_ts": round(_deviation(rates), 3),
                "median_ts": round(float(np.median(rates)), 3),
            }
            if tokens
            else {}
        ),
        **more,
    }


def _deviation(values: Any) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def missing(measure: str, arm: str, status: str, reason: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """A row for what was not measured: it says why, and holds no number.

    Args:
        measure: its name.
        arm: whose.
        status: "not installed", "not supported", "not measured" or "does not fit".
        reason: for people.
        common: columns of every row.
    """
    return {"arm": arm, "measure": measure, "status": status, "reason": reason, **common}


def fact(measure: str, arm: str, value: float, unit: str, common: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A row for what is no time: bytes, positions."""
    return {"arm": arm, "measure": measure, "status": "ok", "value": value, "unit": unit, **common, **more}


def as_ratio(estimate: Estimate) -> dict[str, float]:
    """For the document."""
    return {"value": round(estimate.value, 4), "low": round(estimate.low, 4), "high": round(estimate.high, 4)}
