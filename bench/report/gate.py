"""Holds results against a baseline, for CI: ``edgepatch bench gate``.

A baseline names figures, each with a limit that is written in it, and the value that was measured when it was made. A figure fails when
it lies beyond its limit, or is worse than the baseline by more than both intervals allow, or is not there. Without intervals the limit alone
decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgepatch.bench.evidence.goals import PATCH_ARMS
from edgepatch.bench.report.files import MORE_LATENCY, Document, read_result
from edgepatch.errors import InputError

VERSION = 1
# How much worse than the present value a limit is set: shares, percent points of perplexity, shares of requests, ratios.
TOLERANCES = {"retention": 0.05, "perplexity_change": 1.0, "over_refusal_change": 0.02, "ratio": 0.03}
# Beginnings of the names of such figures; of all others less is better: changes, and ratios of times.
HIGHER_IS_BETTER = ("retention", "decode")
# Ratios with something of ours above the line; ratios of others over ours say nothing of ours when they change.
GATED_RATIOS = re.compile(
    r"(?:.*_patched_over_bare(?:_\d+)?|decode_python_over_library|(?:decode|ttft)(?:_patched|_one_core_busy)?_over_genai|cold_start_.*|(?:decode|ttft)_\d+_patches_over_bare)"
)


@dataclass(frozen=True)
class Figure:
    """A measured value.

    Attributes:
        value: None where it was not measured.
        low: end of its 95 % interval, if it has one.
        high: as ``low``.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why a figure does not pass.

    Attributes:
        figure: its name.
        reason: "missing", "beyond its limit" or "worse than the baseline".
        expected: in words.
        found: in words.
    """

    figure: str
    reason: str
    expected: str
    found: str


def _finite(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    with suppress(OverflowError):  # a whole number beyond every float
        return float(value) if math.isfinite(value) else None
    return None


def figures(results: Path) -> dict[str, Figure]:
    """Name -> figure, of everything that a gate can watch: of patches, with the seed as shipped, and of our speed.

    Args:
        results: folder with ``evidence.json``, ``latency.json`` and further runs beside it; what is not there holds no figures.

    Raises:
        InputError: the folder does not exist, or a file in it is none of ours.
    """
    if not results.is_dir():
        raise InputError(f"results: expected a folder, found no such one: {results}", hint="name it with --results")
    measured: dict[str, Figure] = {}
    for name in ("evidence.json", "latency.json", *sorted(path.name for path in results.glob(MORE_LATENCY))):
        document, read = read_result(results / name), _safety if name == "evidence.json" else partial(_speed, name)
        try:
            measured |= dict(read(document)) if document is not None else {}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{results / name}: expected the fields of this version, found {type(error).__name__}: {error}",
                hint="make it again",
            ) from error
    return measured


def _safety(document: Document) -> Iterator[tuple[str, Figure]]:
    for row in document["cells"]:
        if row["arm"] in PATCH_ARMS and row["route"] != "decoded":
            for field in ("retention", "perplexity_change", "over_refusal_change"):
                ends = (_finite(row[f"{field}_{end}"]) for end in ("low", "high"))
                yield f"{field}/{row['domain']}/{row['arm']}/{row['column']}", Figure(_finite(row[field]), *ends)


def _speed(file: str, document: Document) -> Iterator[tuple[str, Figure]]:
    """Of ``latency.json`` by their own names, of other files behind that of the run."""
    run = "" if file == "latency.json" else f"{Path(file).stem.removeprefix('latency-')}/"
    for name, ratio in document["ratios"].items():
        if GATED_RATIOS.fullmatch(name):
            yield f"ratio/{run}{name}", Figure(*(_finite(ratio[field]) for field in ("value", "low", "high")))


def is_higher_better(name: str) -> bool:
    """The direction of a figure, from its name."""
    kind, *_, last = name.split("/")
    return (last if kind == "ratio" else kind).startswith(HIGHER_IS_BETTER)


# Writing a baseline.


def make_baseline(measured: Mapping[str, Figure], command: str) -> dict[str, Any]:
    """A baseline from the present figures: each limit is worse by the tolerance of its kind, or by the interval where that is wider.

    Args:
        measured: name -> figure; those without a value are left out.
        command: kept in the baseline.

    Raises:
        InputError: there is no figure.
    """
    entries = {}
    for name, figure in measured.items():
        if figure.value is not None:
            entries[name] = {
                **_limit(name, figure, figure.value),
                "value": figure.value,
                "low": figure.low,
                "high": figure.high,
            }
    if not entries:
        raise InputError(
            "results: expected evidence.json or latency.json with figures, found none",
            hint="measure first, or name the folder with --results",
        )
    return {"version": VERSION, "command": command, "tolerances": TOLERANCES, "figures": entries}


def _limit(name: str, figure: Figure, value: float) -> dict[str, float]:
    tolerance = TOLERANCES[name.split("/")[0]]
    if is_higher_better(name):
        return {"floor": round(min(value - tolerance, value if figure.low is None else figure.low), 4)}
    return {"ceiling": round(max(value + tolerance, value if figure.high is None else figure.high), 4)}


# Reading a baseline, and checking.


def read_baseline(path: Path) -> dict[str, dict[str, float | None]]:
    """The figures of a baseline.

    Raises:
        InputError: no such file, no figures, or a figure that could not fail.
    """
    document = read_result(path)
    if document is None:
        raise InputError(
            f"baseline: expected a file, found no such one: {path}", hint=f"edgepatch bench gate --write {path}"
        )
    if document.get("version") != VERSION:
        raise InputError(f"{path}: expected version {VERSION}, found {document.get('version')!r}")
    entries = document.get("figures")
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{path}: expected figures, found none")
    return {name: _entry(path, name, entry) for name, entry in entries.items()}


def _entry(path: Path, name: str, entry: object) -> dict[str, float | None]:
    fields = ("floor", "ceiling", "value", "low", "high")
    if not isinstance(entry, dict) or not {"floor", "ceiling"} & set(entry):
        raise InputError(f"{path}, {name}: expected a floor or a ceiling, found neither")
    for field, value in entry.items():
        if field not in fields or (_finite(value) is None and (value is not None or field in fields[:2])):
            raise InputError(f"{path}, {name}: expected numbers for {', '.join(fields)}, found {field}: {value!r}")
    return entry


def check(baseline: Mapping[str, Mapping[str, float | None]], measured: Mapping[str, Figure]) -> list[Failure]:
    """Every figure of the baseline that does not pass; a figure that is not there does not.

    Args:
        baseline: of ``read_baseline``.
        measured: of ``figures``.
    """
    return [
        failure
        for name, entry in baseline.items()
        for failure in _failures(name, entry, measured.get(name, Figure(None)))
    ]


def _failures(name: str, entry: Mapping[str, float | None], figure: Figure) -> Iterator[Failure]:
    floor, ceiling, before = (entry.get(field) for field in ("floor", "ceiling", "value"))
    if figure.value is None:
        yield Failure(name, "missing", _bounds(floor, ceiling), "no such figure")
        return
    if (floor is not None and figure.value < floor) or (ceiling is not None and figure.value > ceiling):
        yield Failure(name, "beyond its limit", _bounds(floor, ceiling), f"{figure.value:.4g}")
        return
    if before is None:
        return
    is_floor = floor is not None
    allowed = math.hypot(
        _reach(before, entry.get("low"), entry.get("high"), not is_floor),
        _reach(figure.value, figure.low, figure.high, is_floor),
    )
    worse = before - figure.value if is_floor else figure.value - before
    if allowed and worse > allowed:
        yield Failure(name, "worse than the baseline", f"{before:.4g}, within {allowed:.2g}", f"{figure.value:.4g}")


def _reach(value: float, low: float | None, high: float | None, is_upwards: bool) -> float:
    """From the value to the end of its interval on one side; 0 without an interval, infinite where only that end is missing."""
    end = high if is_upwards else low
    if end is None:
        return 0.0 if low is high else math.inf
    return abs(end - value)


def _bounds(floor: float | None, ceiling: float | None) -> str:
    return " and ".join(f"{sign} {bound:.4g}" for sign, bound in ((">=", floor), ("<=", ceiling)) if bound is not None)


def as_document(failures: Sequence[Failure], num_figures: int) -> dict[str, Any]:
    """For programs."""
    return {"passed": not failures, "num_figures": num_figures, "failures": [vars(failure) for failure in failures]}
