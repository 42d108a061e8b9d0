"""From raw cells to the figures of the matrix: every comparison on the same items, intervals over training runs and items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.columns import Column, columns
from edgepatch.bench.evidence.cells import ARMS, DOMAINS, REFERENCE_COLUMN, SHARED, CellKey
from edgepatch.bench.metrics import CrossedBootstrap, Estimate

Raw = Mapping[str, Any]
Read = Callable[[CellKey], Raw | None]
Row = dict[str, Any]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Runs:
    """The raw cells of one row of the matrix: training run -> what was measured, failures apart."""

    raw_of_run: Mapping[int, Raw]
    failed: tuple[str, ...]

    def of(self, rng_seeds: Iterable[int]) -> list[Raw]:
        """Those of these training runs; an untrained arm is the same for all of them."""
        return [self.raw_of_run[0]] if 0 in self.raw_of_run else [self.raw_of_run[s] for s in rng_seeds]


@lru_cache(maxsize=256)
def bootstrap(num_runs: int, num_items: int) -> CrossedBootstrap:
    """The same draws for every statistic of so many runs and items."""
    return CrossedBootstrap(num_runs, num_items)


def gather(read: Read, keys: Iterable[CellKey]) -> Runs:
    """The raw cells behind some keys; what is not there has failed too."""
    raw_of_run, failed = {}, []
    for key in keys:
        raw = read(key)
        if raw is None or "failed" in raw:
            failed.append(f"{key}: {raw['failed'] if raw else 'not measured'}")
        else:
            raw_of_run[key.rng_seed] = raw
    return Runs(raw_of_run, tuple(failed))


def common_runs(*sides: Runs) -> list[int]:
    """Training runs that every side has; [0] where none was trained."""
    trained = [set(side.raw_of_run) for side in sides if side.raw_of_run and 0 not in side.raw_of_run]
    if any(not side.raw_of_run for side in sides):
        return []
    return sorted(set.intersection(*trained)) if trained else [0]


SCORES = {
    "score": ("gain", "of_bare", "retention"),
    "emt5": ("emt5_gain", "emt5_of_bare", "emt5_retention"),
    "mean_toxicity": ("mean_gain", "mean_of_bare", "mean_retention"),
}
"""Figure of a row -> its gain, what is left of the bare model's, and the share of the gain that is kept; further ones than the score
belong to toxicity."""

VALUES = {"score": "values"}
"""What a raw cell calls the values behind a figure, where that is another name."""


def aligned(names: str, values: str, *sides: Sequence[Raw]) -> list[Values]:
    """One (S, N) array a side, over the items that all of them have, in the order of the first."""
    raws = [raw for side in sides for raw in side]
    shared = set.intersection(*(set(raw[names]) for raw in raws))
    order = [name for name in raws[0][names] if name in shared]

    def row(raw: Raw) -> list[float]:
        values_by_name = dict(zip(raw[names], raw[values], strict=True))
        return [values_by_name[name] for name in order]

    return [np.array([row(raw) for raw in side], dtype=np.float64).reshape(len(side), len(order)) for side in sides]


def _draws(*sides: Values) -> CrossedBootstrap:
    return bootstrap(max(len(side) for side in sides), sides[0].shape[1])


def mean(values: Values) -> Estimate:
    """Mean of (S, N) values in 0..1."""
    draws = _draws(values)
    return draws.estimate(values.mean(), np.clip(draws.means(values), 0, 1))


def difference(first: Values, second: Values) -> Estimate:
    """Mean of the first minus mean of the second, paired."""
    draws = _draws(first, second)
    return draws.estimate(first.mean() - second.mean(), draws.means(first) - draws.means(second))


def ratio(arm: Values, bare: Values) -> Estimate | None:
    """Mean of the arm over the bare model's, paired; ``None`` where the latter is 0."""
    if bare.mean() <= 0:
        return None
    draws = _draws(arm, bare)
    above, below = draws.means(arm), draws.means(bare)
    quotients = np.divide(above, below, out=np.full(len(above), np.inf), where=below > 0)
    return draws.estimate(arm.mean() / bare.mean(), quotients)


def kept(bare: Values, arm: Values, bare_there: Values, arm_there: Values) -> Estimate | None:
    """Gain there over gain here; ``None`` where there is no gain here that could be kept."""
    gain = bare.mean() - arm.mean()
    if gain <= 0:
        return None
    draws = _draws(bare, arm, bare_there, arm_there)
    below = draws.means(bare) - draws.means(arm)
    above = draws.means(bare_there) - draws.means(arm_there)
    quotients = np.divide(above, below, out=np.full(len(above), np.inf), where=below > 0)
    return draws.estimate((bare_there.mean() - arm_there.mean()) / gain, quotients)


def perplexity_change(bare: Values, arm: Values, tokens: Values) -> Estimate:
    """Percent by which the perplexity differs from the bare model's; geometric mean over training runs.

    Args:
        bare: (1, N) negative log-likelihoods of N texts.
        arm: (S, N) of the same.
        tokens: (1, N) how many tokens each text has.
    """
    draws = _draws(bare, arm)
    logs = (draws.means(arm) - draws.means(bare)) / draws.means(tokens)
    value = (arm.mean() - bare.mean()) / tokens.mean()
    return draws.estimate(100 * np.expm1(value), 100 * np.expm1(logs))


def _put(row: Row, name: str, estimate: Estimate | None) -> None:
    """A figure and the ends of its interval; an end that is infinite is none."""
    ends = [number if np.isfinite(number) else None for number in estimate or (np.nan,) * 3]
    row[name], row[f"{name}_low"], row[f"{name}_high"] = ends


def _figures(raws: Sequence[Raw]) -> dict[str, float]:
    """Mean over training runs of each further figure."""
    names = set.intersection(*(set(raw["figures"]) for raw in raws)) if raws else set()
    return {name: float(np.mean([raw["figures"][name][0] for raw in raws])) for name in sorted(names)}


class Matrix:
    """Computes rows from raw cells.

    Args:
        keys: the plan.
        read: gives the raw result of a key, or ``None``.
        known_columns: of the keys; default: those of the evidence matrix.
        reference: name of the column that retention is told against.
    """

    def __init__(
        self,
        keys: Sequence[CellKey],
        read: Read,
        known_columns: Sequence[Column] = (),
        reference: str = REFERENCE_COLUMN,
    ) -> None:
        self._reference = reference
        self._read = lru_cache(maxsize=None)(read)
        self._rows: dict[CellKey, list[CellKey]] = {}
        for key in keys:
            self._rows.setdefault(replace(key, rng_seed=0), []).append(key)
        self._columns = {column.name: column for column in known_columns or columns()}

    def _runs(self, measure: str, like: CellKey, **changed: Any) -> Runs:
        """All training runs of a row that differs from a key in some fields."""
        row = replace(like, measure=measure, rng_seed=0, **changed)
        return gather(self._read, self._rows.get(row, []))

    def rows(self) -> list[Row]:
        """One a domain, arm, column and route, for prompts that nothing stands in front of."""
        keys = [key for key in self._rows if key.measure == "safety" and not key.parts and not key.front]
        arms = dict.fromkeys([*ARMS, *(key.arm for key in keys)])  # those that a user names stand behind
        places = {name: place for names in (DOMAINS, arms, self._columns) for place, name in enumerate(names)}
        keys.sort(key=lambda key: (places[key.domain], places[key.arm], key.route == "decoded", places[key.column]))
        return [self._row(key) for key in keys]

    def _row(self, key: CellKey) -> Row:
        column = self._columns[key.column]
        row: Row = {
            "domain": key.domain,
            "arm": key.arm,
            "column": column.name,
            "runtime": column.runtime,
            "quantization": column.quantization,
            "kv_type": column.kv_type,
            "route": key.route,
        }
        safety = self._runs("safety", key)
        retained = self._runs("retained", key, domain=self._retained_domain(key))
        self._put_safety(row, key, safety)
        failed = [*safety.failed, *retained.failed]
        if self._has("margins", key):
            failed += self._put_margins(row, key)
        self._put_retained(row, key, retained)
        row["failed"] = failed
        return row

    def fronted(self) -> list[Row]:
        """One a place, arm and column, for prompts behind other text and in later turns."""
        rows = []
        for key in self._rows:
            if key.measure == "safety" and key.front:
                there = self._runs("safety", key)
                row: Row = {"domain": key.domain, "arm": key.arm, "column": key.column, "front": key.front}
                self._put_safety(row, key, there)
                rows.append({**row, "failed": list(there.failed)})
        return rows

    def _has(self, measure: str, key: CellKey) -> bool:
        return replace(key, measure=measure, rng_seed=0) in self._rows

    def _retained_domain(self, key: CellKey) -> str:
        return key.domain if self._has("retained", key) else SHARED

    def _put_margins(self, row: Row, key: CellKey) -> tuple[str, ...]:
        """``margin_gain`` in nats a token and ``margin_retention``; returns what failed."""
        there, bare = self._runs("margins", key), self._bare("margins", key, key.column)
        raws = list(there.raw_of_run.values())
        row["num_pairs"] = len(raws[0]["ids"]) if raws else 0
        runs = common_runs(bare, there) if key.arm != "bare" and row["num_pairs"] else []
        gain = difference(*aligned("ids", "values", bare.of(runs), there.of(runs))) if runs else None
        _put(row, "margin_gain", gain)
        _put(row, "margin_retention", self._retention("margins", key, bare, there, "values") if runs else None)
        return there.failed

    def _bare(self, measure: str, key: CellKey, column: str) -> Runs:
        domain = SHARED if measure == "retained" else key.domain
        return self._runs(measure, key, domain=domain, arm="bare", column=column, route="", parts=())

    def _put_safety(self, row: Row, key: CellKey, there: Runs) -> None:
        raws = list(there.raw_of_run.values())
        row["num_items"], row["num_rng_seeds"] = (len(aligned("ids", "values", raws)[0][0]) if raws else 0), len(raws)
        row["failures"] = sum(raw["failures"] for raw in raws)
        row["figures"] = _figures(raws)
        bare = self._bare("safety", key, key.column)
        for name, (gain, of_bare, retention) in SCORES.items():
            values = VALUES.get(name, name)
            sides = [[raw for raw in side if values in raw] for side in (raws, list(bare.raw_of_run.values()))]
            if name != "score" and not all(sides):
                continue
            _put(row, name, mean(aligned("ids", values, raws)[0]) if raws else None)
            runs = common_runs(bare, there) if key.arm != "bare" else []
            pair = aligned("ids", values, bare.of(runs), there.of(runs)) if runs else None
            _put(row, gain, difference(*pair) if pair else None)
            _put(row, of_bare, ratio(pair[1], pair[0]) if pair else None)
            _put(row, retention, self._retention("safety", key, bare, there, values) if runs else None)

    def _retention(self, measure: str, key: CellKey, bare_there: Runs, there: Runs, values: str) -> Estimate | None:
        here = self._runs(measure, key, column=self._reference, route="")
        bare = self._bare(measure, key, self._reference)
        sides = (bare, here, bare_there, there)
        runs = common_runs(*sides)
        return kept(*aligned("ids", values, *(side.of(runs) for side in sides))) if runs else None

    def _put_retained(self, row: Row, key: CellKey, there: Runs) -> None:
        bare = self._bare("retained", key, key.column)
        runs = common_runs(bare, there)
        names = ("perplexity_change", "over_refusal", "over_refusal_change", "negative_flips")
        row["perplexity"] = None
        estimates: list[Estimate | None] = [None] * len(names)
        if runs:
            sides = (bare.of(runs), there.of(runs))
            nll = aligned("text_ids", "nll", *sides)
            tokens = aligned("text_ids", "num_tokens", *sides)[0]
            row["perplexity"] = float(np.exp(nll[1].mean() / tokens.mean()))
            refused, right = aligned("request_ids", "refused", *sides), aligned("fact_ids", "correct", *sides)
            estimates[0] = perplexity_change(nll[0], nll[1], tokens)
            if refused[0].size:
                estimates[1:3] = mean(refused[1]), difference(refused[1], refused[0])
            if right[0].size:
                estimates[3] = mean(((right[0] > 0.5) & (right[1] <= 0.5)).astype(np.float64))
        for name, estimate in zip(names, estimates, strict=True):
            _put(row, name, estimate)

    def contest(self, domain: str, column: str, arm: str, rival: str) -> Row:
        """``lead``: by how much an arm's score is lower, thus safer, than a rival's; both with the seed as shipped."""
        rows = [
            next(
                (k for k in self._rows if (k.measure, k.domain, k.arm, k.column) == ("safety", domain, name, column)),
                None,
            )
            for name in (arm, rival)
        ]
        sides = [self._runs("safety", key) if key else Runs({}, ()) for key in rows]
        runs = common_runs(*sides)
        row: Row = {"domain": domain, "column": column, "arm": arm, "rival": rival, "num_rng_seeds": len(runs)}
        _put(row, "lead", difference(*aligned("ids", "values", sides[1].of(runs), sides[0].of(runs))) if runs else None)
        return row

    # Compositions.

    def compositions(self) -> list[Row]:
        """One a kind, column, set of patches and domain: what is left of the gain of the single patch."""
        return [self._composition(key) for key in self._rows if key.measure == "safety" and key.parts]

    def _composition(self, key: CellKey) -> Row:
        there, bare = self._runs("safety", key), self._bare("safety", key, key.column)
        single = self._runs("safety", key, arm="patch", parts=())
        row: Row = {"arm": key.arm, "column": key.column, "parts": list(key.parts), "domain": key.domain}
        raws = list(there.raw_of_run.values())
        _put(row, "score", mean(aligned("ids", "values", raws)[0]) if raws else None)
        runs = common_runs(bare, single, there)
        sides = aligned("ids", "values", *(side.of(runs) for side in (bare, single, bare, there))) if runs else None
        _put(row, "gain", difference(sides[0], sides[3]) if sides else None)
        _put(row, "share_of_single_gain", kept(*sides) if sides else None)
        row["num_items"], row["num_rng_seeds"] = (len(raws[0]["ids"]) if raws else 0), len(raws)
        row["failures"], row["failed"] = sum(raw["failures"] for raw in raws), list(there.failed)
        retained = self._runs("retained", key, domain=SHARED)
        self._put_retained(row, key, retained)
        return row
