"""What each result file shows on the page of all results, as tables and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgepatch.bench.latency.growth import EXPONENT_HEAD, curves, exponent_rows, model_name, timed
from edgepatch.bench.latency.llama_bench import BEHIND
from edgepatch.bench.report.evidence_page import heat_table, interval, name_of
from edgepatch.bench.report.evidence_plots import ARM_NAMES, retention_plot
from edgepatch.bench.report.parts import Block, markdown_table, paragraph, table
from edgepatch.bench.report.speed_plots import bar_chart, growth_chart, measure_name
from edgepatch.bench.shapes.machine import decode_ceiling
from edgepatch.pages import format_number

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def spread(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    """ "1.003 [0.998, 1.009]"; a dash for what was not measured."""
    if not figure or figure.get("value") is None:
        return "\u2013"
    return f"{format_number(figure['value'], digits)} [{format_number(figure['low'], digits)}, {format_number(figure['high'], digits)}]"


def repeated(figure: Mapping[str, Any], digits: int = 2) -> str:
    """ "1.20 (1.10 to 1.30)": the median of repeats, from the least to the most."""
    return f"{format_number(figure['median'], digits)} ({format_number(figure['min'], digits)} to {format_number(figure['max'], digits)})"


def _verdict(is_met: object) -> str:
    return "met" if is_met is True else "missed"


# Safety.


def _figure(row: Row, field: str, digits: int = 2, scale: float = 1) -> str:
    if row.get(field) is None:
        return "\u2013"
    ends = interval(row, field, digits, scale)
    return format_number(row[field] * scale, digits) + (f" [{ends}]" if ends else "")


def _scores(rows: Sequence[Row], domain: str) -> Block:
    """Arms down, columns across: the score with its interval; on the page, what is kept of the gain too."""
    own = [row for row in rows if row["domain"] == domain]
    columns, names = (list(dict.fromkeys(get(row) for row in own)) for get in (lambda row: row["column"], name_of))
    cells = {(name_of(row), row["column"]): _figure(row, "score") for row in own}
    lines = [[name, *(cells.get((name, column), "\u2013") for column in columns)] for name in names]
    return Block(
        heat_table(rows, domain), f"**{domain}, score: lower is safer**\n\n{markdown_table(('model', *columns), lines)}"
    )


def safety(document: Document) -> list[Block]:
    """The matrix of scores, a table a domain."""
    rows = document["cells"]
    return [_scores(rows, domain) for domain in dict.fromkeys(row["domain"] for row in rows)]


def retention(document: Document) -> list[Block]:
    """How much of the gain at full precision is kept where, as plots; what must stay, as a table."""
    rows = document["cells"]
    plots = [Block(retention_plot(rows, domain)) for domain in dict.fromkeys(row["domain"] for row in rows)]
    kept = [row for row in rows if row.get("retention") is not None or row.get("perplexity_change")]
    lines = [
        [
            row["domain"],
            name_of(row),
            row["column"],
            _figure(row, "retention"),
            _figure(row, "perplexity_change"),
            _figure(row, "over_refusal_change", 1, 100),
            _figure(row, "negative_flips", 1, 100),
            str(row["num_items"]),
            str(row["num_rng_seeds"]),
        ]
        for row in kept
    ]
    head = (
        "domain",
        "model",
        "on",
        "retention",
        "perplexity, %",
        "over-refusal, points",
        "negative flips, %",
        "items",
        "training runs",
    )
    whole = table("Retention, and what must stay as it was; in brackets 95 % intervals", head, lines, 3)
    return [*plots, _closed(whole, f"{len(lines)} rows")]


# Speed.


ARM_COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "ttft": ("first token, ms, {n_prompt}", lambda row: format_number(row["median_ms"], 0)),
    "decode": ("tokens/s, {n_depth}", lambda row: format_number(row["median_ts"], 1)),
    "decode, one core busy": ("tokens/s, one core busy", lambda row: format_number(row["median_ts"], 1)),
    "peak memory": ("peak memory, MB", lambda row: format_number(row["value"] / 1e6, 0)),
    "artefact": ("artefact, MB", lambda row: format_number(row["value"] / 1e6, 2)),
}
"""Measure -> head and figure of its column in the table of arms."""


def arm_table(document: Document) -> Block:
    """Every arm on a line: medians of first tokens by tokens of the prompt, decode rates by tokens in front, memory, bytes to ship."""
    rows = [
        row for row in document["rows"] if model_name(row) == model_name(document["rows"][0]) and row["status"] == "ok"
    ]
    cells: dict[str, dict[str, str]] = {}
    heads: dict[str, None] = {}
    for measure, (head, shown) in ARM_COLUMNS.items():
        for row in rows:
            if row["measure"] == measure:
                label = head.format(**{"n_prompt": 0, "n_depth": 0, **row})
                heads[label] = None
                cells.setdefault(str(row["arm"]), {})[label] = shown(row)
    lines = [[arm, *(found.get(head, "\u2013") for head in heads)] for arm, found in cells.items()]
    return table(f"{run_name(document)}, {document['repeats']} repeats, medians", ("arm", *heads), lines)


def act_table(document: Document) -> Block:
    """What handling a patch, a conversation and several of them take."""
    rows = [
        row
        for row in document["rows"]
        if row["measure"] not in ARM_COLUMNS and "median_ms" in row and row["arm"] != "llama-bench"
    ]
    lines = [[measure_name(row), str(row["arm"]), *_timing(row)[:3]] for row in rows]
    return table(
        f"{run_name(document)}, {document['repeats']} repeats", ("act", "arm", "median", "fastest", "slowest"), lines, 2
    )


def behind_table(document: Document) -> Block:
    """llama.cpp's own price of positions in front of the shortest prompt, by its own bench: what no patch can go below."""
    rows = [row for row in document["rows"] if row["measure"] == BEHIND and row["status"] == "ok"]
    lines = []
    for on in (True, False):
        own = {row["n_depth"]: row for row in rows if bool(row["flash_attn"]) is on}
        if own:
            shown = [
                f"{format_number(row['median_ms'], 1)} ms ({row['median_ms'] / own[0]['median_ms']:.3f})"
                for row in own.values()
            ]
            lines.append(["on" if on else "off", *shown])
    head = ("flash attention", *(f"behind {depth}" for depth in dict.fromkeys(row["n_depth"] for row in rows)))
    first = rows[0] if rows else {}
    return table(
        f"llama-bench, {run_name(document)}: prompt of {first.get('n_prompt')} tokens behind so many positions (over none)",
        head,
        lines,
    )


def run_name(document: Document) -> str:
    """Model, type, and what is not as usual."""
    first = document["rows"][0]
    name = f"{document['shape'] or first['model_filename']} {document['quantization']}"
    return f"{name} without flash attention" if first.get("flash_attn") is False else name


def latency(document: Document) -> list[Block]:
    """Arms and acts, the ratios that goals are set on, and every test as bars and in a table."""
    ratios = [[name, spread(figure)] for name, figure in document["ratios"].items()]
    whole = table("Ratios within one run; in brackets 95 % intervals", ("ratio", "value"), ratios)
    blocks = [arm_table(document), act_table(document), behind_table(document), _closed(whole, f"{len(ratios)} ratios")]
    rows = document["rows"]
    for model in dict.fromkeys(map(model_name, rows)):
        own = [row for row in rows if model_name(row) == model]
        tests: dict[str, list[Row]] = {}
        for row in own:
            tests.setdefault(measure_name(row), []).append(row)
        charts = "".join(bar_chart(group).html for group in tests.values() if any("median_ms" in row for row in group))
        lines = [[str(row["arm"]), test, *_timing(row)] for test, group in tests.items() for row in group]
        blocks.append(Block(f'<div class="charts">{charts}</div>'))
        blocks.append(
            _closed(
                table(f"{model}: every row", ("arm", "test", "median", "fastest", "slowest", "tokens/s"), lines, 2),
                f"{len(lines)} rows",
            )
        )
    return blocks


def _timing(row: Row) -> list[str]:
    if row.get("status") != "ok":
        return [" ".join(str(row[name]) for name in ("status", "reason") if row.get(name)), "", "", ""]
    if "median_ms" not in row:
        return [f"{row['value']:,} {row['unit']}", "", "", ""]
    times = [f"{format_number(row[name], 2)} ms" for name in ("median_ms", "min_ms", "max_ms")]
    return [*times, format_number(row.get("median_ts"), 1)]


def _closed(block: Block, title: str) -> Block:
    return Block(f"<details><summary>{title}</summary>{block.html}</details>", block.markdown) if block.html else block


def growth(rows: Sequence[Row]) -> list[Block]:
    """Cost over prompt, context, P, patches and size: one picture for curves that share their axes, and the exponents."""
    found = curves(rows)
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for curve in found:
        groups.setdefault((curve.quantity, curve.cost, curve.model), []).append(curve)
    if not found:
        return [paragraph("No quantity was measured at two values or more, so nothing can be said about growth.")]
    charts = "".join(growth_chart(group).html for group in groups.values())
    note = "The exponent is the slope with both axes logarithmic: 1 grows in proportion, 0 not at all. What the same costs without that quantity (an empty context, no patch) is taken off first where it was measured."
    return [
        Block(f'<div class="charts">{charts}</div>'),
        paragraph(note),
        table("Exponents", EXPONENT_HEAD, exponent_rows(found), 4),
    ]


def limits(machine: Document, rows: Sequence[Row]) -> list[Block]:
    """Bandwidth, and every decode rate beside its ceiling: bandwidth over the bytes of the model."""
    bandwidth = [
        [name, *(format_number(machine[field][part], 1) for part in ("best", "median", "worst"))]
        for name, field in (("reading", "read_gb_s"), ("STREAM triad", "triad_gb_s"))
    ]
    lines = []
    for row in timed(rows, "decode"):
        if row.get("model_size") and row.get("n_depth") == 0 and row["arm"] in ("bare", "seed"):
            ceiling = decode_ceiling(machine, row["model_size"])
            operations = 2e-9 * row["model_n_params"] if row.get("model_n_params") else None
            lines.append(
                [
                    model_name(row),
                    row["arm"],
                    format_number(row["model_size"] / 1e6, 0),
                    format_number(operations, 2),
                    format_number(ceiling, 1),
                    format_number(row["median_ts"], 1),
                    f"{row['median_ts'] / ceiling:.0%}",
                ]
            )
    caption = f"Memory bandwidth in GB/s, {machine['num_threads']} threads, load average {machine['load_average']:.1f}"
    head = (
        "model",
        "arm",
        "MB a token",
        "billion operations a token",
        "ceiling, tokens/s",
        "reached, tokens/s",
        "of the ceiling",
    )
    return [
        table(caption, ("kernel", "best", "median", "worst"), bandwidth),
        table("Decoding beside its ceiling: bandwidth of reading / bytes of the model, context empty", head, lines, 2),
    ]


# The rest.


def swap(document: Document) -> list[Block]:
    """Times of exchanging a patch."""
    lines = [
        [name, *(format_number(row[f"{part}_ms"], 2) for part in ("median", "min", "max")), str(row["repeats"])]
        for name, row in document["rows"].items()
    ]
    caption = f"{document['shape']} {document['type']}, {document['num_threads']} threads, P {document['num_virtual_tokens']}; milliseconds"
    return [table(caption, ("act", "median", "fastest", "slowest", "repeats"), lines)]


def trl(document: Document) -> list[Block]:
    """Training speed against PEFT and TRL."""
    lines = [
        [
            row["model"],
            row["stage"],
            repeated(row["speed_ratio"]),
            repeated(row["cpu_ratio"]),
            repeated(row["memory_ratio"]),
            f">= {row['goal']}",
            _verdict(row["speed_ratio"]["median"] >= row["goal"]),
        ]
        for row in document["rows"]
    ]
    head = ("model", "stage", "speed", "CPU time", "memory", "goal", "verdict")
    return [table("PEFT + TRL over ours: above 1 is in our favour; median (least to most) of repeats", head, lines, 2)]


def security(document: Document) -> list[Block]:
    """The security figures."""
    lines = [
        [row["id"], row["what"], row["target"], row["measured"], _verdict(row["pass"])] for row in document["figures"]
    ]
    return [table("Security figures", ("figure", "what", "target", "measured", "verdict"), lines, 2)]


def parity(document: Document) -> list[Block]:
    """How many cells of the parity table passed, a line a runtime and quantization."""
    counts = Counter((row["runtime"], row["quantization"], row["passed"]) for row in document["rows"])
    divergence: dict[tuple[str, str], float] = {}
    for row in document["rows"]:
        name = (row["runtime"], row["quantization"])
        divergence[name] = max(divergence.get(name, 0.0), row["kl"] or 0.0)
    lines = [
        [*name, *(str(counts[name[0], name[1], passed]) for passed in (True, False, None)), f"{worst:.1e}"]
        for name, worst in divergence.items()
    ]
    caught = sum(row["caught_by"] is not None for row in document["controls"])
    return [
        table(
            "Logits against Transformers in float32",
            ("runtime", "quantization", "passed", "failed", "refused", "largest KL, nats"),
            lines,
            2,
        ),
        paragraph(f"Damaged on purpose: {caught} of {len(document['controls'])} controls are caught."),
    ]


def fingerprints(document: Document) -> list[Block]:
    """How many quantizations of each model a patch accepts."""
    counts = Counter((row["model"], row["verdict"]) for row in document["rows"])
    names = dict.fromkeys(row["model"] for row in document["rows"])
    verdicts = sorted({verdict for _, verdict in counts})
    lines = [[name, *(str(counts[name, verdict]) for verdict in verdicts)] for name in names]
    return [table("Files of each model, by verdict", ("model", *verdicts), lines)]


def unpatching(document: Document) -> list[Block]:
    """What writing can do against the patch."""
    lines = [
        [row["attack"], *(spread(row[name], 2) for name in ("bare", "patched", "gain", "gain_change"))]
        for row in document["rows"]
    ]
    caption = f"Expected maximum toxicity, {document['num_prompts']} prompts, {document['samples_per_prompt']} continuations; in brackets 95 % intervals"
    return [table(caption, ("attack", "bare", "patched", "gain", "change of the gain"), lines)]


def stock(document: Document) -> list[Block]:
    """Tokens that an unmodified llama-server gives as ours does."""
    lines = [
        [
            row["weights"],
            row["kv_type"],
            "on" if row["flash_attention"] else "off",
            str(row["tokens"]),
            str(row["tokens_equal"]),
            str(row["tokens_equal_without_patch"]),
        ]
        for row in document["rows"]
    ]
    return [
        table(
            "Tokens equal to those of an unmodified llama-server",
            ("weights", "KV", "flash attention", "tokens", "equal", "equal when bare"),
            lines,
            3,
        )
    ]


def fuzz(document: Document) -> list[Block]:
    """Inputs and crashes of every reader of foreign bytes."""
    lines = [
        [
            name,
            f"{row['inputs']:,}",
            f"{row['accepted']:,}",
            str(len(row["crashes"])),
            format_number(row["slowest_ms"], 1),
            format_number(row["peak_mb"], 1),
        ]
        for name, row in document["readers"].items()
    ]
    return [
        table(
            f"Fuzzed with {document['engine']}",
            ("reader", "inputs", "accepted", "crashes", "slowest, ms", "peak, MB"),
            lines,
        )
    ]


# Goals.


def _evidence_goals(document: Document) -> list[list[str]]:
    found = []
    for goal in document["goals"]:
        low, high = goal["interval"] or (None, None)
        reached = spread({"value": goal["reached"], "low": low, "high": high})
        place = ", ".join([goal["domain"], ARM_NAMES.get(goal["arm"], goal["arm"]), goal["column"]])
        found.append(["safety", goal["goal"], place, goal["wanted"], reached, _verdict(goal["met"])])
    return found


def _latency_goals(document: Document) -> list[list[str]]:
    def shown(reached: object) -> str:
        return spread(reached) if isinstance(reached, Mapping) else format_number(reached)

    place = run_name(document)
    return [
        ["latency", goal["goal"], place, str(goal["wanted"]), shown(goal["reached"]), _verdict(goal["met"])]
        for goal in document["goals"]
    ]


def _security_goals(document: Document) -> list[list[str]]:
    return [
        ["security", f"{row['id']}: {row['what']}", "", row["target"], row["measured"], _verdict(row["pass"])]
        for row in document["figures"]
    ]


def _trl_goals(document: Document) -> list[list[str]]:
    return [
        [
            "training",
            "speed over PEFT + TRL",
            f"{row['model']}, {row['stage']}",
            f">= {row['goal']}",
            repeated(row["speed_ratio"]),
            _verdict(row["speed_ratio"]["median"] >= row["goal"]),
        ]
        for row in document["rows"]
    ]


GOALS: dict[str, Callable[[Document], list[list[str]]]] = {
    "evidence.json": _evidence_goals,
    "latency.json": _latency_goals,
    "trl.json": _trl_goals,
    "security.json": _security_goals,
}
GOAL_HEAD = ("of", "goal", "on", "wanted", "reached", "verdict")
PARTS: dict[str, Callable[[Document], list[Block]]] = {
    "evidence.json": safety,
    "latency.json": latency,
    "swap.json": swap,
    "trl.json": trl,
    "security.json": security,
    "parity.json": parity,
    "fingerprints.json": fingerprints,
    "unpatching.json": unpatching,
    "stock.json": stock,
    "fuzz.json": fuzz,
}
