"""From times to ratios within the run, and from them to the goals that the project has set itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from edgepatch.bench.latency.genai import NAME as GENAI
from edgepatch.bench.latency.timing import Measure, Times, as_ratio, pooled_ratio, ratio

BUSY = "decode, one core busy"


def ratios(times: Times) -> dict[str, dict[str, float]]:
    """Every ratio that the run allows, each a median over repeats with its interval.

    ``ttft_*`` divide times, ``decode_*`` rates; both over all prompts, or depths. A name ending in a number is of that one.
    """
    estimates: dict[str, dict[str, float]] = {}

    def add(name: str, *arguments: Any) -> None:
        estimate = pooled_ratio(times, *arguments)
        if estimate is not None:
            estimates[name] = as_ratio(estimate)

    add("ttft_patched_over_bare", "ttft", "seed", "bare")
    add("decode_patched_over_bare", "decode", "seed", "bare", True)
    add("decode_python_over_library", "decode", "bare", "library loop", True)
    add("decode_over_genai", "decode", "bare", GENAI, True)
    add("decode_patched_over_genai", "decode", "seed", GENAI, True)
    add("decode_one_core_busy_over_genai", BUSY, "bare", GENAI, True)
    add("decode_one_core_busy_python_over_library", BUSY, "bare", "library loop", True)
    add("decode_one_core_busy_patched_over_bare", BUSY, "seed", "bare", True)
    add("ttft_over_genai", "ttft", "bare", GENAI)
    for arm in _arms(times):
        if arm not in ("bare", "seed"):
            add(f"ttft_{_slug(arm)}_over_bare", "ttft", arm, "bare")
            add(f"decode_{_slug(arm)}_over_bare", "decode", arm, "bare", True)
            add(f"ttft_{_slug(arm)}_over_patched", "ttft", arm, "seed")
            add(f"decode_{_slug(arm)}_over_patched", "decode", arm, "seed", True)
    for measure, arm in times:
        if arm == "seed" and measure.name in ("ttft", "decode") and (measure, "bare") in times:
            one, two = times[measure, "seed"], times[measure, "bare"]
            size, estimate = (
                (measure.n_prompt, ratio(one, two)) if measure.name == "ttft" else (measure.n_depth, ratio(two, one))
            )
            estimates[f"{measure.name}_patched_over_bare_{size}"] = as_ratio(estimate)
        if arm == "seed" and measure.name.endswith((" turns", " sequences")) and (measure, "bare") in times:
            estimates[f"{_slug(measure.name)}_patched_over_bare"] = as_ratio(
                ratio(times[measure, arm], times[measure, "bare"])
            )
    start = Measure("cold start")
    for ours, theirs in (
        ("patched", "llama_cpp.Llama"),
        ("bare", "llama_cpp.Llama"),
        ("patched", "llama.cpp calls"),
        ("bare", "llama.cpp calls"),
        ("patched", GENAI),
        ("bare", GENAI),
    ):
        if (start, theirs) in times:
            estimate = ratio(times[start, f"edgepatch chat, {ours}"], times[start, theirs])
            estimates[f"cold_start_{ours}_over_{_slug(theirs)}"] = as_ratio(estimate)
    return estimates


def _arms(times: Times) -> Iterable[str]:
    return dict.fromkeys(arm for measure, arm in times if measure.name in ("ttft", "decode"))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


class Goal(NamedTuple):
    """What a figure must reach.

    Attributes:
        goal: in words.
        bound: of the figure.
        is_most: whether it is the most, else the least.
    """

    goal: str
    bound: float
    is_most: bool


def goals(rows: Sequence[Mapping[str, Any]], estimates: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Each goal that this run can judge, with what was reached; medians decide."""
    checks: list[tuple[Goal, float | None]] = [
        (Goal("time to first token, patched over bare", 1.02, True), _value(estimates, "ttft_patched_over_bare")),
        (Goal("decode rate, patched over bare", 0.98, False), _value(estimates, "decode_patched_over_bare")),
        (
            Goal("decode rate, our loop over llama.cpp's own", 0.98, False),
            _value(estimates, "decode_python_over_library"),
        ),
        (
            Goal("decode rate, ours over onnxruntime-genai's Generator", 1.2, False),
            _value(estimates, "decode_over_genai"),
        ),
        (
            Goal("decode rate, ours over onnxruntime-genai's Generator, one core busy", 1.2, False),
            _value(estimates, "decode_one_core_busy_over_genai"),
        ),
        (Goal("swap, ms", 50.0, True), _median(rows, "swap")),
        (Goal("apply and verify, ms", 200.0, True), _sum(_median(rows, "apply"), _median(rows, "verify"))),
        (
            Goal("a further patch of 50 tokens, share of the time to first token", 0.01, True),
            _stacked(estimates, "ttft_4_patches_over_patched"),
        ),
        (
            Goal("a further patch of 50 tokens, share of a token's time", 0.01, True),
            _stacked(estimates, "decode_4_patches_over_patched", True),
        ),
        (
            Goal("cold start of edgepatch chat, patched, over llama_cpp.Llama", 1.05, True),
            _value(estimates, "cold_start_patched_over_llama_cpp_llama"),
        ),
        (
            Goal("cold start of edgepatch chat, bare, over llama_cpp.Llama", 1.05, True),
            _value(estimates, "cold_start_bare_over_llama_cpp_llama"),
        ),
        (Goal("import edgepatch, ms", 300.0, True), _median(rows, "import")),
    ]
    return [_judged(goal, reached) for goal, reached in checks if reached is not None]


def _judged(goal: Goal, reached: float) -> dict[str, Any]:
    is_met = reached <= goal.bound if goal.is_most else reached >= goal.bound
    return {
        "goal": goal.goal,
        "wanted": f"{'<=' if goal.is_most else '>='} {goal.bound:g}",
        "reached": round(reached, 4),
        "met": is_met,
    }


def _value(estimates: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    return estimates[name]["value"] if name in estimates else None


def _median(rows: Sequence[Mapping[str, Any]], measure: str) -> float | None:
    return next((float(row["median_ms"]) for row in rows if row["measure"] == measure and row["status"] == "ok"), None)


def _sum(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one + two


def _stacked(estimates: Mapping[str, Mapping[str, float]], name: str, is_rate: bool = False) -> float | None:
    """Added by each of the three patches beyond the first, as a share."""
    value = _value(estimates, name)
    if value is None:
        return None
    return ((1 / value if is_rate else value) - 1) / 3
