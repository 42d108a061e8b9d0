"""How the measurements of time and memory are told at the terminal: the answer in a sentence, then a row a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepatch.cli.console import counted, size_text

TIMES = ("measure", "arm", "prompt", "new", "depth", "median", "least to most", "rate")
LESS = ("least to most", "new", "rate")
"""What a narrow terminal does without."""

GOALS = ("goal", "wanted", "reached", "met")
MOVES = {
    "arm": "arm",
    "block": "block",
    "prefill_cpu_ms": "prefill, CPU ms",
    "prefill_cpu_ratio": "over bare",
    "decode_tokens_cpu_s": "decode, tokens/CPU s",
    "decode_cpu_ratio": "time over bare",
    "move_ms": "move, ms",
}
"""Field of a cell of ``bench moves`` -> the name of its column."""

Rows = list[Sequence[object]]


def latency_answer(document: Mapping[str, Any]) -> str:
    """What the patch costs in time, with intervals, and how many goals are met."""
    ratios, goals = document["ratios"], document["goals"]
    costs = [
        f"{what} {_percent(ratios[name])}"
        for what, name in (
            ("the time to the first token", "ttft_patched_over_bare"),
            ("the decode rate", "decode_patched_over_bare"),
        )
        if name in ratios
    ]
    missed = [goal for goal in goals if not goal["met"]]
    judged = f"{len(goals) - len(missed)} of {counted(len(goals), 'goal')} are met" if goals else ""
    told = [f"the patch changes {' and '.join(costs)}"] if costs else []
    return "; ".join([*told, *([judged] if judged else [])]) or "no ratio of patched to bare was measured"


def _percent(ratio: Mapping[str, float]) -> str:
    value, low, high = (100 * (ratio[name] - 1) for name in ("value", "low", "high"))
    return f"by {value:+.1f} % ({low:+.1f} to {high:+.1f})"


def time_rows(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Below ``TIMES``."""
    lines: Rows = []
    for row in rows:
        sizes = [row.get(name) or "" for name in ("n_prompt", "n_gen", "n_depth")]
        if row["status"] != "ok":
            figures = [row["status"], row["reason"], ""]
        elif "value" in row:
            value = size_text(row["value"]) if row["unit"] == "bytes" else f"{row['value']:,} {row['unit']}"
            figures = [value, "", ""]
        else:
            rate = f"{row['median_ts']:.1f} tok/s" if "median_ts" in row else ""
            figures = [f"{row['median_ms']:.2f} ms", f"{row['min_ms']:.2f} to {row['max_ms']:.2f}", rate]
        lines.append((row["measure"], row["arm"], *sizes, *figures))
    return lines


def goal_rows(goals: Sequence[Mapping[str, Any]]) -> Rows:
    """Below ``GOALS``."""
    return [(goal["goal"], goal["wanted"], f"{goal['reached']:.4g}", "yes" if goal["met"] else "no") for goal in goals]


def move_rows(cells: Sequence[Mapping[str, Any]]) -> Rows:
    """Below the names of ``MOVES``."""
    return [["" if cell.get(name) is None else cell[name] for name in MOVES] for cell in cells]


def moves_answer(cells: Sequence[Mapping[str, Any]]) -> str:
    """What moving costs over the bare model, at the block that costs most."""
    moving = [cell for cell in cells if cell.get("block") and cell.get("decode_cpu_ratio")]
    if not moving:
        return "no seed that moves was timed"
    worst = max(moving, key=lambda cell: cell["prefill_cpu_ratio"])
    return (
        f"moving every {worst['block']} tokens takes {worst['prefill_cpu_ratio']:.3f} times the bare model's CPU time to read "
        f"the prompt, and {worst['decode_cpu_ratio']:.3f} times to decode"
    )


def machine_answer(document: Mapping[str, Any]) -> str:
    """The bandwidths, and the weights that a token can read in a second."""
    threads = counted(document["num_threads"], "thread")
    return (
        f"memory is read at {document['read_gb_s']['best']:.1f} GB/s with {threads}, triad {document['triad_gb_s']['best']:.1f} GB/s: "
        "a model's bytes over the first bound the rate of decoding"
    )


def buffers_answer(rows: Sequence[Mapping[str, Any]]) -> str:
    """The range of what the kernels gain."""
    gains = [row["wall_speedup"] for row in rows]
    return f"with its kernels for repacked weights llama.cpp is {min(gains)} to {max(gains)} times as fast"


def contact_rows(measured: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What ``bench first-contact`` measured, as names and values."""
    rows: list[tuple[str, object]] = []
    price, forged = measured.get("price", {}), measured.get("forged", {})
    for where in ("in the page cache", "not in the page cache"):
        if where in price:
            times = price[where]
            told = ", ".join(f"{way} {times[way]['s']:.2f} s" for way in ("unproved", "first", "later"))
            rows.append((f"load, {where}", f"{told}; first over unproved {times['first / unproved']['s']:.2f}"))
    if forged:
        rows.append(
            ("forged files", f"{forged['survived_by_the_parent']:,} of {forged['files']:,} survived by the parent")
        )
        rows.append(("errors not ours", forged["exceptions_of_no_kind_of_ours"]))
        rows += list(forged["outcomes"].items())
    return rows
