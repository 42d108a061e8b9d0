"""What each result file shows on the page of all results, as tables and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from edgepatch.bench.latency.growth import EXPONENT_HEAD, Curve, curves, exponent_rows, model_name, timed
from edgepatch.bench.latency.llama_bench import BEHIND
from edgepatch.bench.report.charts import bar_chart, growth_chart, measure_name, retention_plot, status
from edgepatch.bench.report.files import Document
from edgepatch.bench.report.tables import ARM_NAMES, domains_of, heat_table, judged, retained_table
from edgepatch.bench.shapes.machine import decode_ceiling
from edgepatch.pages.blocks import Block, Cell, Charts, Column, Details, Paragraph, Row, Table, listing, number
from edgepatch.pages.numbers import format_number


def spread(estimate: Row | None, digits: int = 3) -> str:
    """ "1.003 [0.998, 1.009]"; a dash for what was not measured."""
    if not estimate or estimate.get("value") is None:
        return "\u2013"
    value, low, high = (format_number(estimate[name], digits) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def repeated(repeats: Row, digits: int = 2) -> str:
    """ "1.20 (1.10 to 1.30)": the median of repeats, from the least to the most."""
    median, least, most = (format_number(repeats[name], digits) for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _verdict(is_met: object) -> str:
    return "met" if is_met is True else "missed"


# Safety.


def safety(document: Document) -> list[Block]:
    """The matrix of scores, a table a domain."""
    rows = document["cells"]
    return [heat_table(rows, domain) for domain in domains_of(rows)]


def retention(document: Document) -> list[Block]:
    """How much of the gain at full precision is kept where, as plots; what must stay, as a table."""
    rows, domains = document["cells"], domains_of(document["cells"])
    plots = [Charts([retention_plot(rows, domain)]) for domain in domains]
    return [*plots, *(Details(domain, [retained_table(rows, domain)]) for domain in domains)]


# Speed.

# Measure -> head and figure of its column in the table of arms.
ARM_COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "ttft": ("first token, ms, {n_prompt}", number("median_ms", 0)),
    "decode": ("tokens/s, {n_depth}", number("median_ts", 1)),
    "decode, one core busy": ("tokens/s, one core busy", number("median_ts", 1)),
    "peak memory": ("peak memory, MB", lambda row: format_number(row["value"] / 1e6, 0)),
    "artefact": ("artefact, MB", lambda row: format_number(row["value"] / 1e6, 2)),
}


def arm_table(document: Document) -> Table:
    """Every arm on a line: medians of first tokens by tokens of the prompt, decode rates by tokens in front, memory, bytes to ship."""
    rows = [
        row for row in document["rows"] if model_name(row) == model_name(document["rows"][0]) and row["status"] == "ok"
    ]
    cells: dict[str, dict[str, str]] = {}
    heads: dict[str, None] = {}
    for measure, (head, text) in ARM_COLUMNS.items():
        for row in rows:
            if row["measure"] == measure:
                label = head.format(**{"n_prompt": 0, "n_depth": 0, **row})
                heads[label] = None
                cells.setdefault(str(row["arm"]), {})[label] = text(row)
    lines = [[arm, *(figures.get(head, "\u2013") for head in heads)] for arm, figures in cells.items()]
    return Table(f"{run_name(document)}, {document['repeats']} repeats, medians", ("arm", *heads), lines)


def act_table(document: Document) -> Table:
    """What handling a patch, a conversation and several of them take."""
    rows = [
        row
        for row in document["rows"]
        if row["measure"] not in ARM_COLUMNS and "median_ms" in row and row["arm"] != "llama-bench"
    ]
    caption = f"{run_name(document)}, {document['repeats']} repeats"
    return listing(caption, rows, {"act": measure_name, "arm": "arm", **TIMES}, 2)


def behind_table(document: Document) -> Table:
    """llama.cpp's own price of positions in front of the shortest prompt, by its own bench: what no patch can go below."""
    rows = [row for row in document["rows"] if row["measure"] == BEHIND and row["status"] == "ok"]
    lines = []
    for is_on in (True, False):
        own = {row["n_depth"]: row for row in rows if bool(row["flash_attn"]) is is_on}
        if own:
            times = [
                f"{format_number(row['median_ms'], 1)} ms ({row['median_ms'] / own[0]['median_ms']:.3f})"
                for row in own.values()
            ]
            lines.append(["on" if is_on else "off", *times])
    head = ("flash attention", *(f"behind {depth}" for depth in dict.fromkeys(row["n_depth"] for row in rows)))
    size = rows[0].get("n_prompt") if rows else None
    caption = f"llama-bench, {run_name(document)}: prompt of {size} tokens behind so many positions (over none)"
    return Table(caption, head, lines)


def run_name(document: Document) -> str:
    """Model, type, and what is not as usual."""
    first = document["rows"][0]
    name = f"{document['shape'] or first['model_filename']} {document['quantization']}"
    return f"{name} without flash attention" if first.get("flash_attn") is False else name


def latency(document: Document) -> list[Block]:
    """Arms and acts, the ratios that goals are set on, and every test as bars and in a table."""
    ratios = [[name, spread(ratio)] for name, ratio in document["ratios"].items()]
    table = Table("Ratios within one run; in brackets 95 % intervals", ("ratio", "value"), ratios)
    rows = document["rows"]
    return [
        arm_table(document),
        act_table(document),
        behind_table(document),
        Details(f"{len(ratios)} ratios", [table]),
        *(
            block
            for model in dict.fromkeys(map(model_name, rows))
            for block in _tests(model, [row for row in rows if model_name(row) == model])
        ),
    ]


def _tests(model: str, rows: Sequence[Row]) -> list[Block]:
    """Every test of one model."""
    tests: dict[str, list[Row]] = {}
    for row in rows:
        tests.setdefault(measure_name(row), []).append(row)
    charts = [bar_chart(group) for group in tests.values() if any("median_ms" in row for row in group)]
    columns: dict[str, Column] = {"arm": "arm", "test": measure_name, **TIMES, "tokens/s": _rate}
    table = listing(f"{model}: every row", [row for group in tests.values() for row in group], columns, 2)
    return [Charts(charts), Details(f"{len(rows)} rows", [table])]


def _time(field: str) -> Callable[[Row], str]:
    """A column of times; of a row without times the first one says what it holds."""

    def text(row: Row) -> str:
        if row.get("status") == "ok" and "median_ms" in row:
            return f"{format_number(row[field], 2)} ms"
        if field != "median_ms":
            return ""
        return status(row) if row.get("status") != "ok" else f"{row['value']:,} {row['unit']}"

    return text


def _rate(row: Row) -> str:
    return format_number(row.get("median_ts"), 1) if row.get("status") == "ok" and "median_ms" in row else ""


TIMES: dict[str, Column] = {"median": _time("median_ms"), "fastest": _time("min_ms"), "slowest": _time("max_ms")}


def growth(rows: Sequence[Row]) -> list[Block]:
    """Cost over prompt, context, P, patches and size: one picture for curves that share their axes, and the exponents."""
    groups: dict[tuple[str, str, str], list[Curve]] = {}
    for curve in (grown := curves(rows)):
        groups.setdefault((curve.quantity, curve.cost, curve.model), []).append(curve)
    if not groups:
        return [Paragraph("No quantity was measured at two values or more, so nothing can be said about growth.")]
    note = "The exponent is the slope with both axes logarithmic: 1 grows in proportion, 0 not at all. What the same costs without that quantity (an empty context, no patch) is taken off first where it was measured."
    exponents = Table("Exponents", EXPONENT_HEAD, exponent_rows(grown), 4)
    return [Charts([growth_chart(group) for group in groups.values()]), Paragraph(note), exponents]


def limits(machine: Document, rows: Sequence[Row]) -> list[Block]:
    """Bandwidth, and every decode rate beside its ceiling: bandwidth over the bytes of the model."""
    kernels = [
        {"kernel": "reading", **machine["read_gb_s"]},
        {"kernel": "STREAM triad", **machine["triad_gb_s"]},
    ]
    bandwidth: dict[str, Column] = {"kernel": "kernel", **{n: number(n, 1) for n in ("best", "median", "worst")}}
    decoded = [
        {
            **row,
            "megabytes": row["model_size"] / 1e6,
            "operations": 2e-9 * row["model_n_params"] if row.get("model_n_params") else None,
            "ceiling": decode_ceiling(machine, row["model_size"]),
        }
        for row in timed(rows, "decode")
        if row.get("model_size") and row.get("n_depth") == 0 and row["arm"] in ("bare", "seed")
    ]
    ceilings: dict[str, Column] = {
        "model": model_name,
        "arm": "arm",
        "MB a token": number("megabytes", 0),
        "billion operations a token": number("operations", 2),
        "ceiling, tokens/s": number("ceiling", 1),
        "reached, tokens/s": number("median_ts", 1),
        "of the ceiling": lambda row: f"{row['median_ts'] / row['ceiling']:.0%}",
    }
    caption = f"Memory bandwidth in GB/s, {machine['num_threads']} threads, load average {machine['load_average']:.1f}"
    beside = "Decoding beside its ceiling: bandwidth of reading / bytes of the model, context empty"
    return [listing(caption, kernels, bandwidth), listing(beside, decoded, ceilings, 2)]


# The rest.


def swap(document: Document) -> list[Block]:
    """Times of exchanging a patch."""
    caption = f"{document['shape']} {document['type']}, {document['num_threads']} threads, P {document['num_virtual_tokens']}; milliseconds"
    columns: dict[str, Column] = {
        "act": "act",
        "median": number("median_ms", 2),
        "fastest": number("min_ms", 2),
        "slowest": number("max_ms", 2),
        "repeats": "repeats",
    }
    return [listing(caption, [{"act": act, **row} for act, row in document["rows"].items()], columns)]


def _is_fast(row: Row) -> str:
    return _verdict(row["speed_ratio"]["median"] >= row["goal"])


def trl(document: Document) -> list[Block]:
    """Training speed against PEFT and TRL."""
    columns: dict[str, Column] = {
        "model": "model",
        "stage": "stage",
        "speed": lambda row: repeated(row["speed_ratio"]),
        "CPU time": lambda row: repeated(row["cpu_ratio"]),
        "memory": lambda row: repeated(row["memory_ratio"]),
        "goal": lambda row: f">= {row['goal']}",
        "verdict": _is_fast,
    }
    caption = "PEFT + TRL over ours: above 1 is in our favour; median (least to most) of repeats"
    return [listing(caption, document["rows"], columns, 2)]


def security(document: Document) -> list[Block]:
    """The security figures."""
    columns: dict[str, Column] = {
        "figure": "id",
        "what": "what",
        "target": "target",
        "measured": "measured",
        "verdict": lambda row: _verdict(row["pass"]),
    }
    return [listing("Security figures", document["figures"], columns, 2)]


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
    head = ("runtime", "quantization", "passed", "failed", "refused", "largest KL, nats")
    caught = sum(row["caught_by"] is not None for row in document["controls"])
    return [
        Table("Logits against Transformers in float32", head, lines, 2),
        Paragraph(f"Damaged on purpose: {caught} of {len(document['controls'])} controls are caught."),
    ]


def fingerprints(document: Document) -> list[Block]:
    """How many quantizations of each model a patch accepts."""
    counts = Counter((row["model"], row["verdict"]) for row in document["rows"])
    names = dict.fromkeys(row["model"] for row in document["rows"])
    verdicts = sorted({verdict for _, verdict in counts})
    lines = [[name, *(str(counts[name, verdict]) for verdict in verdicts)] for name in names]
    return [Table("Files of each model, by verdict", ("model", *verdicts), lines)]


def unpatching(document: Document) -> list[Block]:
    """What writing can do against the patch."""
    columns: dict[str, Column] = {
        "attack": "attack",
        "bare": lambda row: spread(row["bare"], 2),
        "patched": lambda row: spread(row["patched"], 2),
        "gain": lambda row: spread(row["gain"], 2),
        "change of the gain": lambda row: spread(row["gain_change"], 2),
    }
    caption = f"Expected maximum toxicity, {document['num_prompts']} prompts, {document['samples_per_prompt']} continuations; in brackets 95 % intervals"
    return [listing(caption, document["rows"], columns)]


def llama_server(document: Document) -> list[Block]:
    """Tokens that an unmodified llama-server gives as ours does."""
    columns: dict[str, Column] = {
        "weights": "weights",
        "KV": "kv_type",
        "flash attention": lambda row: "on" if row["flash_attention"] else "off",
        "tokens": "tokens",
        "equal": "tokens_equal",
        "equal when bare": "tokens_equal_without_patch",
    }
    return [listing("Tokens equal to those of an unmodified llama-server", document["rows"], columns, 3)]


def fuzz(document: Document) -> list[Block]:
    """Inputs and crashes of every reader of foreign bytes."""
    columns: dict[str, Column] = {
        "reader": "reader",
        "inputs": number("inputs", 0),
        "accepted": number("accepted", 0),
        "crashes": lambda row: str(len(row["crashes"])),
        "slowest, ms": number("slowest_ms", 1),
        "peak, MB": number("peak_mb", 1),
    }
    rows = [{"reader": reader, **row} for reader, row in document["readers"].items()]
    return [listing(f"Fuzzed with {document['engine']}", rows, columns)]


# Goals.


def _evidence_goals(document: Document) -> list[list[str]]:
    rows = []
    for goal in document["goals"]:
        low, high = goal["interval"] or (None, None)
        reached = spread({"value": goal["reached"], "low": low, "high": high})
        place = ", ".join([goal["domain"], ARM_NAMES.get(goal["arm"], goal["arm"]), goal["column"]])
        rows.append(["safety", goal["goal"], place, goal["wanted"], reached, _verdict(goal["met"])])
    return rows


def _latency_goals(document: Document) -> list[list[str]]:
    def text(reached: object) -> str:
        return spread(reached) if isinstance(reached, Mapping) else format_number(reached)

    place = run_name(document)
    return [
        ["latency", goal["goal"], place, str(goal["wanted"]), text(goal["reached"]), _verdict(goal["met"])]
        for goal in document["goals"]
    ]


def _security_goals(document: Document) -> list[list[str]]:
    return [
        ["security", f"{row['id']}: {row['what']}", "", row["target"], row["measured"], _verdict(row["pass"])]
        for row in document["figures"]
    ]


def _trl_goals(document: Document) -> list[list[str]]:
    name = "speed over PEFT + TRL"
    return [
        [
            "training",
            name,
            f"{row['model']}, {row['stage']}",
            f">= {row['goal']}",
            repeated(row["speed_ratio"]),
            _is_fast(row),
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


def goal_tables(goals: Sequence[Sequence[str]], num_names: int = 3) -> list[Block]:
    """Goals, the missed in front, the met closed.

    Args:
        goals: in each what the last columns of ``GOAL_HEAD`` say.
        num_names: how many first columns hold names.
    """
    head = GOAL_HEAD[-len(goals[0]) :] if goals else GOAL_HEAD
    missed, met = ([goal for goal in goals if goal[-1] == verdict] for verdict in ("missed", "met"))
    title = f"{len(met)} goals that are met"
    told: list[list[str | Cell]] = [[*goal[:-1], judged(goal[-1], goal[-3], goal[-2])] for goal in missed]
    first = Table(f"{len(missed)} goals that are missed, or not measured", head, told, num_names)
    return [first, Details(title, [Table(title, head, met, num_names)])]


PARTS: dict[str, Callable[[Document], list[Block]]] = {
    "evidence.json": safety,
    "latency.json": latency,
    "swap.json": swap,
    "trl.json": trl,
    "security.json": security,
    "parity.json": parity,
    "fingerprints.json": fingerprints,
    "unpatching.json": unpatching,
    "stock.json": llama_server,
    "fuzz.json": fuzz,
}
