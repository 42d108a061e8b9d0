"""The small tables of docs/results say what the committed files say: each is made again from the JSON and compared.

A table stands below ``<!-- table: NAME -->``. When results are measured anew, a failing test prints the table to put there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = sorted((ROOT / "docs" / "results").glob("*.md"))
SLOT = re.compile(r"<!-- table: ([\w -]+) -->\n((?:\|.*\n)*)")
DASH = "\u2013"
# Of a bar in the picture, for a toxicity of 1.
BAR_WIDTH = 150
DOMAINS = ("toxicity", "gender", "harm")
ARMS = {
    "bare": "bare model",
    "safe_prompt": "safety instruction",
    "patch": "patch",
    "kv": "trained K/V",
    "lora_r16": "LoRA r=16",
    "reference": "M'",
}
SHAPES = {
    "smollm-135m Q8_0": "latency-smollm-135m-Q8_0",
    "qwen2.5-0.5b Q4_K_M": "latency-qwen2.5-0.5b-Q4_K_M",
    "llama-3.2-1b Q4_0": "latency",
    "llama-3.2-1b int4 (ONNX)": "latency-llama-3.2-1b-int4",
    "llama-3.2-3b Q4_0": "latency-llama-3.2-3b-Q4_0",
    "llama-3.1-8b Q4_0": "latency-llama-3.1-8b-Q4_0",
}
ALTERNATIVES = {
    "bare": "bare model",
    "seed": "patch of 50 virtual tokens",
    "text-50 warm": "safety text of 50 tokens, cached",
    "text-300 warm": "safety text of 300 tokens, cached",
    "text-300 cold": "safety text of 300 tokens, not cached",
    "lora-r16": "LoRA r=16",
    "control-vector": "control vector",
    "4 patches": "four patches of 50",
}
STANDING = {
    "trained at the start, pinned": (False, "pinned", 0),
    "trained at the start, moving": (False, "both", 128),
    "trained to move, pinned": (True, "pinned", 0),
    "trained to move, moving": (True, "both", 128),
}
# (tokens in front, their kind, turn)
PLACES = {
    "nothing": (0, "", 1),
    "128 toxic": (128, "toxic", 1),
    "512 toxic": (512, "toxic", 1),
    "512 benign": (512, "benign", 1),
    "turn 5": (0, "conversation", 5),
}
COMPOSED = {"alone": "each alone", "side_by_side": "all three, trained apart", "joint": "all three, trained jointly"}
PARITY = {
    "llama.cpp F32, f32 cache": ("llamacpp", "F32", "f32", False),
    "llama.cpp F16": ("llamacpp", "F16", "f16", True),
    "llama.cpp Q8_0": ("llamacpp", "Q8_0", "f16", True),
    "llama.cpp Q4_K_M": ("llamacpp", "Q4_K_M", "f16", True),
    "llama.cpp Q4_0": ("llamacpp", "Q4_0", "f16", True),
    "ONNX fp32": ("onnx", "fp32", "f32", None),
    "ONNX fp16": ("onnx", "fp16", "f16", None),
    "ONNX int8": ("onnx", "int8", "f32", None),
    "ONNX int4": ("onnx", "int4", "f32", None),
}
OURS, PLAIN = "edgepatch", "edgepatch --no-flash-attn"
SERVERS = (OURS, PLAIN, "llama-server")
Row = Mapping[str, Any]


@cache
def document(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(row: Row, field: str, digits: int = 2, scale: float = 1) -> str:
    """ "0.12 [0.10, 0.14]"; a dash for what was refused; the ratio of a gain that may be none has no upper end."""
    if row.get(field) is None:
        return DASH
    ends = [row[field + end] for end in ("", "_low", "_high")]
    value, low, high = ("\u221e" if number is None else f"{scale * number:.{digits}f}" for number in ends)
    return f"{value} [{low}, {high}]"


def interval(value: Row, digits: int = 3) -> str:
    return figure({"v": value["value"], "v_low": value["low"], "v_high": value["high"]}, "v", digits)


def cell(domain: str, arm: str, column: str, route: str | None = None) -> Row:
    routes = ("", "stored") if route is None else (route,)
    return next(
        row
        for row in document("evidence")["cells"]
        if (row["domain"], row["arm"], row["column"]) == (domain, arm, column) and row["route"] in routes
    )


def scores() -> str:
    rows = ([name, *(figure(cell(d, arm, "torch F32"), "score") for d in DOMAINS)] for arm, name in ARMS.items())
    return table(("model", *DOMAINS), rows)


def retention() -> str:
    columns = dict.fromkeys(row["column"] for row in document("evidence")["cells"] if row["column"] != "torch F32")
    rows = [[column, *(figure(cell(d, "patch", column), "retention") for d in DOMAINS)] for column in columns]
    decoded = [
        "llamacpp Q2_K, decoded",
        *(figure(cell(d, "patch", "llamacpp Q2_K", "decoded"), "retention") for d in DOMAINS),
    ]
    return table(("on", *DOMAINS), [*rows, decoded])


def retained() -> str:
    rows = [
        [
            domain,
            figure(row, "perplexity_change", 1),
            figure(row, "over_refusal_change", 1, 100),
            figure(row, "negative_flips", 1, 100),
        ]
        for domain in DOMAINS
        for row in [cell(domain, "patch", "torch F32")]
    ]
    return table(("domain", "perplexity, %", "over-refusal, points", "negative flips, %"), rows)


def shipped() -> str:
    results = document("rtp/results")
    cells = {(row["runtime"], row["quantization"], row["patched"]): row for row in results["cells"]}
    rows = [
        [
            f"{kept['runtime']} {kept['quantization']}",
            *(figure(cells[kept["runtime"], kept["quantization"], patched], "emt", 3) for patched in (False, True)),
            figure(kept, "retention"),
        ]
        for kept in results["retention"]
    ]
    return table(("on", "EMT bare", "EMT patched", "gain kept"), rows)


REAL_ARMS = {
    "bare": "bare",
    "safe_prompt": "behind a safety text",
    "detox": "detox patch",
    "fairness": "fairness patch",
    "harm": "harm patch",
    "patch": "all three",
}
REAL = "evidence-smollm2"
REAL_BEFORE = {"evidence-smollm2-0.2.0": "all three of 0.2.0", "evidence-smollm2-0.1.0": "all three of 0.1.0"}
"""Of the patches as they are, and of those that they were trained from."""


def real_cell(arm: str, domain: str, column: str, file: str = REAL) -> Row:
    """Of SmolLM2; empty where the arm was not measured in the domain on this form."""
    rows = document(file)["cells"]
    return next((r for r in rows if (r["arm"], r["domain"], r["column"]) == (arm, domain, column)), {})


def real() -> str:
    column = "llamacpp Q4_1"
    rows = []
    files = [(REAL, REAL_ARMS), *((file, {"patch": name}) for file, name in REAL_BEFORE.items())]
    for file, arm, name in ((file, arm, name) for file, arms in files for arm, name in arms.items()):
        toxicity, gender, harm = (real_cell(arm, domain, column, file) for domain in DOMAINS)
        costs = [
            figure(toxicity or gender or harm, f"{field}_change", 1, scale)
            for field, scale in (("perplexity", 1), ("over_refusal", 100))
        ]
        scores = [
            figure(toxicity, "emt5"),
            figure(toxicity, "mean_toxicity"),
            figure(gender, "score"),
            figure(harm, "score"),
        ]
        rows.append([name, *scores, *costs])
    head = (
        "SmolLM2, file as published",
        "EMT@5",
        "mean toxicity",
        "gender",
        "harm",
        "perplexity, %",
        "refused, points",
    )
    return table(head, rows)


def real_forms() -> str:
    """Each patch alone, and all of them side by side, in the domain that it was made for."""
    rows = []
    for column in dict.fromkeys(row["column"] for row in document(REAL)["cells"]):
        for names in (("detox", "fairness", "harm"), ("patch",) * 3):
            toxicity, gender, harm = map(real_cell, names, DOMAINS, (column,) * 3)
            of_bare = [figure(toxicity, "emt5_of_bare"), figure(gender, "of_bare"), figure(harm, "of_bare")]
            kept = [figure(row, "margin_retention") for row in (toxicity, gender, harm)]
            rows.append([column, "alone" if "harm" in names else "all three", *of_bare, *kept])
    head = (
        "on",
        "patches",
        "EMT@5, of bare",
        "gender, of bare",
        "harm, of bare",
        "detox kept",
        "fairness kept",
        "harm kept",
    )
    return table(head, rows)


def real_alone() -> str:
    """Each patch in its own domain, on as many prompts as its record holds."""
    rows = []
    for name in ("smollm2", "smollm2-fairness", "smollm2-harm"):
        results = document(name)
        bare, patched = (next(row for row in results["cells"] if row["patched"] is is_on) for is_on in (False, True))
        field = "emt5" if patched["domain"] == "toxicity" else "score"
        of_bare = figure(patched, "emt5_of_bare" if field == "emt5" else "of_bare")
        costs = [figure(patched, "perplexity_change", 1), figure(patched, "over_refusal_change", 1, 100)]
        patch = f"{results['patch']['name'].removeprefix('smollm2-')} {results['patch']['version']}"
        rows.append([patch, str(patched["num_items"]), figure(bare, field), figure(patched, field), of_bare, *costs])
    return table(("patch alone", "items", "bare", "patched", "of bare", "perplexity, %", "refused, points"), rows)


REAL_TASKS = {
    "own_formats": "formats, by rule",
    "blimp_data": "BLiMP",
    "arc_easy_data": "ARC-Easy",
    "arc_challenge_data": "ARC-Challenge",
    "openbookqa_data": "OpenBookQA",
}


def real_capability() -> str:
    """Accuracy by likelihood, and of formats the share that a rule finds kept; patches of several versions go by the newest."""
    rows = []
    for run in document("harness-smollm2")["rows"]:
        name = run["patch"]["name"]
        version = max(re.findall(r"-(\d+\.\d+\.\d+)\.safetensors", run["command"]))
        patches = f"{'all three' if '.' in name else name.removeprefix('smollm2-')} {version}"
        for score in (score for score in run["scores"] if score["metric"] in ("acc", "strict")):
            percent = [
                interval({key: 100 * score[side][key] for key in ("value", "low", "high")}, 1)
                for side in ("bare", "patched", "difference")
            ]
            flips = f"{score['flips']['broken']} / {score['flips']['repaired']}"
            rows.append([REAL_TASKS[score["task"]], patches, f"{score['num_items']:,}", *percent, flips])
    head = ("task", "patches", "items", "bare, %", "patched, %", "difference, points", "turned wrong / right")
    return table(head, rows)


def real_behind() -> str:
    rows = document(REAL)["fronted"]
    places = dict.fromkeys(row["front"] for row in rows)
    lines = []
    for place in places:
        arms = {row["arm"]: row for row in rows if row["front"] == place}
        kind, count = place.split("-")
        name = f"turn {count}" if kind == "turn" else f"{count} toxic tokens in front"
        scores = [figure(arms[arm], "emt5") for arm in ("bare", "detox", "patch")]
        lines.append([name, *scores, *(figure(arms[arm], "emt5_gain") for arm in ("detox", "patch"))])
    head = ("where", "EMT@5 bare", "detox patch", "all three", "gain of detox", "gain of all three")
    return table(head, lines)


def real_attention() -> str:
    """Percent of the attention, a mean over the layers: of the first token bare, of the seed behind a patch."""
    rows = document("attention-smollm2")["rows"]
    detox = next(row["patch"] for row in rows if row["patch"].startswith("smollm2-detox"))
    arms = {
        "first token, bare": ("bare", ""),
        "detox, pinned": (detox, "pinned"),
        "detox, moving": (detox, "moving"),
        "all three, pinned": ("all together", "pinned"),
        "all three, moving": ("all together", "moving"),
    }
    lines = []
    for front in dict.fromkeys(row["front_tokens"] for row in rows):
        line = [f"{front:,}"]
        for arm in arms.values():
            field = "share_of_seed" if arm[1] else "share_of_first"
            shares = [
                row[field] for row in rows if (row["patch"], row["anchoring"], row["front_tokens"]) == (*arm, front)
            ]
            line.append(f"{100 * sum(shares) / len(shares):.1f}")
        lines.append(line)
    return table(("tokens in front", *arms), lines)


def real_baselines() -> str:
    """What costs a user little in place of a patch, each beside the bare model on the same prompts."""
    lines = []
    for row in document("baselines-smollm2")["rows"]:
        scores = [f"{row[side]:.2f}" for side in ("bare", "score")]
        costs = [DASH, DASH, DASH]
        if "perplexity_ratio" in row:
            perplexity = {end: 100 * (value - 1) for end, value in row["perplexity_ratio"].items()}
            refused = {end: 100 * value for end, value in row["over_refusal_change"].items()}
            flips = " / ".join(f"{100 * row[f'{kind}_flips']['value']:.0f}" for kind in ("negative", "positive"))
            costs = [interval(perplexity, 1), interval(refused, 1), flips]
        lines.append([row["arm"], row["domain"], str(row["num_items"]), *scores, interval(row["ratio"], 2), *costs])
    costs = ("perplexity, %", "refused, points", "pairs turned wrong / right, %")
    return table(("in place of a patch", "domain", "items", "bare", "with it", "of bare", *costs), lines)


def in_front(file: str = "unpatching") -> str:
    rows = [
        [row["attack"], *(interval(row[name]) for name in ("bare", "patched", "gain"))]
        for row in document(file)["rows"]
    ]
    return table(("attempt", "EMT bare", "EMT patched", "gain"), rows)


def length_row(domain: str, standing: tuple[bool, str, int]) -> list[str]:
    """The gain of a patch at each place, and its largest cost."""
    fields = ("domain", "trained_with_float", "anchoring", "block", "front_tokens", "front_kind", "turn")
    rows = {tuple(map(row.get, fields)): row for row in document("length")["cells"]}
    cells = [rows[(domain, *standing, *place)] for place in PLACES.values()]
    dearest = max(100 * cell["perplexity_change"] for cell in cells)
    return [*(figure(cell, "gain") for cell in cells), f"{dearest:+.1f} %"]


def behind() -> str:
    rows = [[name, *length_row("toxicity", standing)] for name, standing in STANDING.items()]
    return table(("patch", *PLACES, "perplexity, at most"), rows)


def behind_others() -> str:
    names = [name for name in STANDING if name != "trained to move, pinned"]
    rows = [[f"{d}, {name}", *length_row(d, STANDING[name])] for d in ("gender", "harm") for name in names]
    return table(("patch", *PLACES, "perplexity, at most"), rows)


def composed() -> str:
    cells = document("composition")["cells"]
    rows = []
    for arm, name in COMPOSED.items():
        size = 1 if arm == "alone" else len(DOMAINS)
        chosen = [row for row in cells if row["arm"] == arm and len(row["parts"]) == size]
        by_domain = {row["domain"]: row for row in reversed(chosen)}
        dearest = max(100 * row["perplexity_change"] for row in chosen)
        rows.append([name, *(figure(by_domain[domain], "gain") for domain in DOMAINS), f"{dearest:+.1f} %"])
    return table(("patches", *DOMAINS, "perplexity, at most"), rows)


def cost() -> str:
    rows = [
        [name, *(interval(document(file)["ratios"][f"{of}_patched_over_bare"]) for of in ("ttft", "decode"))]
        for name, file in SHAPES.items()
    ]
    return table(("model", "time to first token", "decode rate"), rows)


def median(rows: Sequence[Row], arm: str, measure: str, field: str, digits: int, **of: int) -> str:
    for row in rows:
        if (row["arm"], row["measure"]) == (arm, measure) and all(row[name] == value for name, value in of.items()):
            return f"{row[field]:,.{digits}f}"
    return DASH


def served() -> str:
    """Tokens a second of all streams together, both servers asked in turns."""
    lines = [
        [
            str(row["streams"]),
            *(rate(row["tokens_per_s"][name]) for name in SERVERS),
            *(f"{row['shares'][name]:.2f}" for name in (OURS, PLAIN)),
        ]
        for row in document("server")["throughput"]
    ]
    rates = ("edgepatch, tokens/s", "without flash attention", "llama-server")
    return table(("streams", *rates, "share", "share without"), lines)


def rate(spread: Row) -> str:
    return f"{spread['median']:.1f} [{spread['low']:.1f}, {spread['high']:.1f}]"


def fused() -> str:
    """Bare model and patch, with llama.cpp's fused attention and without."""
    rows = document("fused-attention")["rows"]
    arms = {
        "bare": "bare model",
        "seed": "patch",
        "bare plain attention": "bare model, `--no-flash-attn`",
        "seed plain attention": "patch, `--no-flash-attn`",
    }
    lines = [
        [
            name,
            *(median(rows, arm, "ttft", "median_ms", 0, n_prompt=length) for length in (32, 128)),
            *(median(rows, arm, "decode", "median_ts", 1, n_depth=depth) for depth in (0, 512)),
        ]
        for arm, name in arms.items()
    ]
    first = ("first token, ms, 32", "first token, ms, 128")
    return table(("SmolLM2", *first, "tokens/s", "tokens/s behind 512 tokens"), lines)


def alternatives() -> str:
    rows = document("latency")["rows"]
    lines = [
        [
            name,
            median(rows, arm, "ttft", "median_ms", 0, n_prompt=32),
            median(rows, arm, "ttft", "median_ms", 0, n_prompt=512),
            median(rows, arm, "decode", "median_ts", 1, n_depth=0),
        ]
        for arm, name in ALTERNATIVES.items()
    ]
    return table(("in place of a patch", "first token, ms, 32", "first token, ms, 512", "tokens/s"), lines)


def parity() -> str:
    """The worst of all architectures, in float32 throughout and as people run it: an f16 cache and flash attention."""
    lines = []
    for name, setting in PARITY.items():
        keys = ("runtime", "quantization", "kv_type", "flash_attention")
        rows = [
            row
            for row in document("parity")["rows"]
            if tuple(map(row.get, keys)) == setting and row["passed"] is not None
        ]
        lines.append(
            [
                name,
                f"{max(row['max_abs_dlogit'] for row in rows):.1e}",
                f"{max(row['kl'] for row in rows):.1e}",
                f"{min(row['kl_no_patch'] for row in rows):.2f}",
                str(len({row["architecture"] for row in rows})),
            ]
        )
    return table(("weights", "largest logit difference", "largest KL", "least KL without the patch", "models"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "scores": scores,
    "retention": retention,
    "retained": retained,
    "shipped": shipped,
    "real": real,
    "real forms": real_forms,
    "real alone": real_alone,
    "real behind": real_behind,
    "real capability": real_capability,
    "real attention": real_attention,
    "real baselines": real_baselines,
    "in front": in_front,
    "real in front": lambda: in_front("unpatching-smollm2-detox-0.3.0"),
    "behind": behind,
    "behind others": behind_others,
    "composed": composed,
    "cost": cost,
    "alternatives": alternatives,
    "served": served,
    "fused": fused,
    "parity": parity,
}


def tables_of(text: str) -> dict[str, str]:
    return dict(SLOT.findall(text))


def test_every_table_has_one_place():
    names = [name for file in DOCUMENTS for name, _ in SLOT.findall(file.read_text("utf-8"))]
    assert sorted(names) == sorted(TABLES)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_tables_say_what_the_files_say(file: Path):
    for name, text in tables_of(file.read_text("utf-8")).items():
        expected = TABLES[name]()
        assert text == expected, f"{file.name}, {name}: put this table there\n{expected}"


def test_the_picture_says_what_the_files_say():
    picture = (ROOT / "docs" / "picture.svg").read_text("utf-8")
    forms = {"torch": "F32", "llamacpp": "Q4_K_M", "onnx": "int4"}
    cells = {
        (row["runtime"], row["quantization"], row["patched"]): row["emt"] for row in document("rtp/results")["cells"]
    }
    for runtime, quantization in forms.items():
        (group,) = re.findall(rf'<g id="{runtime}">(.*?)</g>', picture, re.DOTALL)
        values = [cells[runtime, quantization, patched] for patched in (False, True)]
        assert re.findall(r">(\d\.\d+)<", group) == [f"{value:.3f}" for value in values]
        bars = re.findall(r'width="(\d+)" height="12"', group)
        assert bars == [f"{BAR_WIDTH * value:.0f}" for value in values], "a bar has another length than its figure"
        assert f"from {values[0]:.3f} to {values[1]:.3f}" in picture  # what a screen reader says


def test_a_changed_figure_is_noticed():
    text = f"<!-- table: scores -->\n{scores()}"
    assert tables_of(text)["scores"] == scores()
    assert tables_of(text.replace("[0.", "[1.", 1))["scores"] != scores()
