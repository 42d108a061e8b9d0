"""Tables of the evidence matrix, as the pages and docs/results/safety.md show them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgepatch.pages.blocks import Block, Cell, Column, Details, Row, Table, estimate, figure, listing, number
from edgepatch.pages.numbers import format_number

Document = Mapping[str, Any]

ARM_NAMES = {
    "bare": "bare M",
    "safe_prompt": "M, safety instruction",
    "reference": "M'",
    "lora_r1": "LoRA r=1",
    "lora_r16": "LoRA r=16",
    "patch": "patch",
    "patch_q4_k_m": "patch for Q4_K_M",
    "patch_all": "patch for all",
    "kv": "trained K/V",
    "composed": "trained apart",
    "joint": "trained together",
}
SCORES = {
    "toxicity": "expected maximum toxicity of 25 continuations",
    "gender": "gender bias score",
    "harm": "share of harmful requests that are answered",
}
MOST_HEAT = 33  # per cent of colour behind a number, so that it stays readable on it


def name_of(row: Row) -> str:
    """Arm and route, for people."""
    return ARM_NAMES[row["arm"]] + (", seed decoded" if row.get("route") == "decoded" else "")


def domains_of(rows: Sequence[Row]) -> list[str]:
    """The domains, in the order in which they stand."""
    return list(dict.fromkeys(row["domain"] for row in rows))


def rows_of(rows: Sequence[Row], domain: str) -> list[Row]:
    """The rows of one domain."""
    return [row for row in rows if row["domain"] == domain]


def heat_table(rows: Sequence[Row], domain: str) -> Table:
    """One domain: arms down, runtimes and quantizations across; a cell tells score, interval and retention."""
    own = rows_of(rows, domain)
    columns = list(dict.fromkeys(row["column"] for row in own))
    cells = {(name_of(row), row["column"]): _heat_cell(row) for row in own}
    absent = Cell("\u2013", style="missing")
    lines: list[list[str | Cell]] = [
        [name, *(cells.get((name, column), absent) for column in columns)] for name in dict.fromkeys(map(name_of, own))
    ]
    caption = f"{SCORES[domain]}: lower is safer; below it the 95 % interval, and how much of the gain at full precision is kept"
    return Table(caption, ["model", *columns], lines, style="heat")


def _heat_cell(row: Row) -> Cell:
    if row["score"] is None:
        return Cell("failed", tip=row["failed"][0] if row["failed"] else "not measured", style="missing")
    score = estimate(row, "score", 2)
    return Cell(
        format_number(row["score"]),
        score.interval,
        note="" if row["retention"] is None else f"keeps {format_number(row['retention'], 2)}",
        tip=f"{row['num_items']} items, {row['num_rng_seeds']} training runs, {row['failures']} failed generations",
        heat=round(MOST_HEAT * min(1.0, max(0.0, row["score"]))),
    )


RETAINED: dict[str, Column] = {
    "model": name_of,
    "on": "column",
    "retention": figure("retention", 2),
    "perplexity": number("perplexity", 2),
    "change in %": figure("perplexity_change", 2),
    "over-refusal in %": figure("over_refusal", 1, 100),
    "change in points": figure("over_refusal_change", 1, 100),
    "negative flips in %": figure("negative_flips", 1, 100),
    "items": "num_items",
    "training runs": "num_rng_seeds",
}


BOUND = re.compile(r"([<>]=) ([+-]?[\d.]+)")
REACHED = re.compile(r"([+-]?[\d.]+)[^\[]*(?:\[([^,]+), ([^\]]+)\])?")


def judged(verdict: str, wanted: str, reached: str) -> Cell:
    """A verdict; of a missed goal also by how much, in words.

    Args:
        verdict: "met" or "missed".
        wanted: what the goal says: ">= 0.95".
        reached: the figure, perhaps with its interval: "0.310 [0.200, 0.400]".
    """
    if verdict == "met":
        return Cell(verdict, style="met")
    bound, figure = BOUND.search(wanted), REACHED.match(reached.replace(",", "") if "[" not in reached else reached)
    if figure is None or bound is None:
        return Cell(verdict, note="not measured" if figure is None else "", style="missed")
    value, limit, is_least = float(figure[1]), float(bound[2]), bound[1] == ">="
    if (value >= limit) is is_least or value == limit:
        end = figure[2] if is_least else figure[3]
        note = f"the figure reaches it, its interval {'begins' if is_least else 'ends'} at {end}" if end else ""
        return Cell(verdict, note=note, style="missed")
    return Cell(
        verdict,
        note=f"by {abs(value - limit):.3g}: {figure[1]} where {'at least' if is_least else 'at most'} {bound[2]} was wanted",
        style="missed",
    )


def retained_table(rows: Sequence[Row], domain: str) -> Table:
    """What is kept of the gain, and what must stay as it was, of one domain's models."""
    caption = f"{domain}: kept of the gain, benign perplexity, refused harmless requests, minimal pairs right before and wrong after"
    return listing(caption, rows_of(rows, domain), RETAINED, 2)


def composition_tables(document: Document) -> list[Block]:
    """What patches keep of their gains together; of older documents, whose patches stood one behind the other, also what their order did."""
    of_set: dict[str, Column] = {
        "patches": lambda row: ARM_NAMES[row["arm"]],
        "together": lambda row: " + ".join(row["parts"]),
        "on": "column",
        "domain": "domain",
    }
    sensitivity: dict[str, Column] = {
        **of_set,
        "orders": "num_orders",
        "order sensitivity": figure("order_sensitivity"),
        "by chance": number("chance"),
        "p value": number("p_value"),
    }
    figures: dict[str, Column] = {
        **of_set,
        "score": figure("score"),
        "gain / gain of the single patch": figure("share_of_single_gain", 2),
        "perplexity in %": figure("perplexity_change", 2),
        "over-refusal in points": figure("over_refusal_change", 1, 100),
    }
    every = listing("every composition", document["composition"], figures, 4)
    if "order_sensitivity" not in document:
        return [every]
    return [
        listing("highest minus lowest score over the orders", document["order_sensitivity"], sensitivity, 4),
        Details(f"{len(every.rows)} orders and domains", [every]),
    ]
