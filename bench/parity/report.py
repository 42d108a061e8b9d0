"""The parity table as a document, made from the results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgepatch.bench.parity import floors
from edgepatch.bench.parity.models import ACTIVE_SHARE, ARCHITECTURES, GGUF_TYPES, HALF_KL, REAL_MODEL
from edgepatch.bench.parity.moved import BLOCK
from edgepatch.bench.parity.rows import KV_TYPES, ONNX_PRECISIONS, PINNED, ROUTES, SEEDS
from edgepatch.patch.canary import tolerance

Row = dict[str, Any]

INTRODUCTION = """\
<!-- Written by `{command}` from bench/results/parity.json; edit bench/parity/report.py instead. -->

# Parity

Does a patch do on every runtime exactly what it does on the full-precision model? Measured for {architectures} architectures, each a tiny
model with random weights of its own and widths that every quantizer takes: {measured} settings measured, {passed} reach their floors,
{failed} do not; {refused} combinations are impossible and refused.

```console
$ {command}
```

The reference is {reference}: {virtual_tokens} random virtual tokens at the scale of the model's
embeddings, then {tokens} tokens of text. **max |Δ|** is the largest difference of any logit at any of the {tokens} positions, **KL** the mean
divergence of the reference's next-token distribution from the runtime's, **top-1** the share of positions with the same most likely
token, **ratio** the KL over that of the same quantized model *without* a patch against the bare reference, **no patch** the KL that losing
the patch would make. **Route b** puts the patch's stored seed into the cache, **route c** has the device decode the soft prompt itself.

Random weights exaggerate what quantization does, for nothing in them is redundant. What counts at few bits is the ratio.

Measured on {date} in {seconds} s on {cpu}; {versions}.
"""

FLOORS = f"""\
## Floors

A row below its floor makes the command fail.

| rows | floor |
|---|---|
| F32 weights, f32 cache, no flash attention: float32 throughout | max \\|Δ\\| ≤ 5e-5 (Gemma 5e-3: llama.cpp looks GELU up in a float16 table; {REAL_MODEL.name} {REAL_MODEL.f32_floor:.0e}) |
| F32 or F16 weights, f32 or f16 cache: flash attention, F16 weights and an f16 cache each round to float16 | KL ≤ {HALF_KL:.0e} against the *unrounded* float32 model ({REAL_MODEL.name} {REAL_MODEL.half_kl:.0e}) |
| ONNX fp32 | max \\|Δ\\| ≤ {floors.ONNX_F32:.0e} |
| ONNX fp16 | KL ≤ {HALF_KL:.0e} ({REAL_MODEL.name} {REAL_MODEL.half_kl:.0e}) |
| quantized weights, f32 or f16 cache, route b; ONNX int8 and int4 | ratio ≤ {floors.RATIO} |
| quantized cache, or route c on quantized weights: the virtual tokens are rounded too | ratio ≤ {floors.REQUANTIZED_RATIO} |
| every row | KL ≤ {ACTIVE_SHARE} of what losing the patch would make ({REAL_MODEL.name}: {REAL_MODEL.active_share}) |
| a seed that moves, F32 or F16 weights, ONNX fp32 or fp16 (on others the canary's long prompt proves it) | KL ≤ {ACTIVE_SHARE} of what leaving it at the start would make ({REAL_MODEL.name}: {REAL_MODEL.active_share}) |

Every patch carries its canary, and every load was proven by it; the largest deviation and what is allowed stand in the tables.
"""

MOVED = f"""\
## Seeds that move

The same patches, whose seeds stand directly in front of every {BLOCK} tokens of the text and of a turn in it. The reference is one pass of
Transformers over copies of the virtual tokens at all of these places, each seen by the tokens behind it alone. Routes b and c together
where nothing else is said, with flash attention; **pinned** is the KL that leaving the seed at the start would make.

"""

CONTROLS = """\
## Negative controls

Seeds that are wrong on purpose, in every architecture. Calibration compares a stored seed with what the model itself makes of the soft
prompt; the canary compares what the patch does with what it did at full precision, at every load. In the rows "canary alone" the
calibration was tampered with. At 4 bits the weights' own error hides some of those from the canary: there they are shown, not required.

"""


def _number(value: float) -> str:
    return f"{value:.1e}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---"] * len(head), *(list(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _pick(rows: Sequence[Row], **values: Any) -> list[Row]:
    """Measured rows with these values."""
    return [row for row in rows if "refused" not in row and all(row[name] == value for name, value in values.items())]


def _of_seed(rows: Sequence[Row], seed: str) -> list[Row]:
    """Rows of seeds that stay, or that move."""
    return [row for row in rows if row.get("seed", PINNED) == seed]


def _worst(rows: Sequence[Row], value: Callable[[Row], float], form: Callable[[float], str], best: bool = False) -> str:
    if not rows:
        return "-"
    return form((min if best else max)(value(row) for row in rows))


def _kl_and(rows: Sequence[Row], value: Callable[[Row], float], form: Callable[[float], str]) -> str:
    """Worst KL, and in brackets another worst value."""
    return f"{_worst(rows, lambda r: r['kl'], _number)} ({_worst(rows, value, form)})" if rows else "-"


def _ratio(row: Row) -> float:
    return float(row["kl"] / max(row["kl_bare"], 1e-30))


def _is_rounded_once(row: Row) -> bool:
    """Full precision but for float16 somewhere: there is no error of quantization to compare with."""
    return row["quantization"] in ("F32", "F16") and row["kv_type"] in floors.UNQUANTIZED_CACHES


def _metrics(rows: Sequence[Row]) -> list[str]:
    """Worst max |d|, KL, top-1, ratio."""
    return [
        _worst(rows, lambda r: r["max_abs_dlogit"], _number),
        _worst(rows, lambda r: r["kl"], _number),
        _worst(rows, lambda r: r["top1"], lambda v: f"{v:.2f}", best=True),
        "-" if _is_rounded_once(rows[0]) else _worst(rows, _ratio, lambda v: f"{v:.2f}"),
    ]


def _names(rows: Sequence[Row]) -> list[str]:
    present = {row["architecture"] for row in rows}
    return [a.name for a in (*ARCHITECTURES, REAL_MODEL) if a.name in present]


def _by_architecture(rows: Sequence[Row]) -> str:
    def line(name: str) -> list[str]:
        own = [row for row in rows if row["architecture"] == name]
        cells = [name]
        for route in ROUTES:
            exact = _pick(own, quantization="F32", kv_type="f32", flash_attention=False, route=route)
            cells.append(_worst(exact, lambda r: r["max_abs_dlogit"], _number))
        for route in ROUTES:
            halves = _pick(own, quantization="F16", kv_type="f16", route=route)
            cells.append(_kl_and(halves, lambda r: r["kl_rounded"], _number))
        for quantization in GGUF_TYPES[2:]:
            for route in ROUTES:
                picked = _pick(own, quantization=quantization, kv_type="f16", flash_attention=True, route=route)
                cells.append(_kl_and(picked, _ratio, "{:.2f}".format))
        cells.append(_worst(_pick(own), lambda r: -r["kl_no_patch"], lambda v: f"{-v:.2f}"))
        return cells

    pairs = [f"{quantization} {route}: KL (ratio)" for quantization in GGUF_TYPES[2:] for route in ROUTES]
    head = [
        "architecture",
        "F32 b: max \\|Δ\\|",
        "F32 c: max \\|Δ\\|",
        "F16 b: KL (rounded)",
        "F16 c: KL (rounded)",
        *pairs,
        "no patch",
    ]
    return _table(head, map(line, _names(rows)))


def _by_setting(rows: Sequence[Row]) -> str:
    lines = []
    for quantization in GGUF_TYPES:
        for kv_type in KV_TYPES:
            for flash_attention in (False, True):
                for route in ROUTES:
                    setting = {
                        "quantization": quantization,
                        "kv_type": kv_type,
                        "flash_attention": flash_attention,
                        "route": route,
                    }
                    picked = _pick(rows, runtime="llamacpp", **setting)
                    if picked:
                        canary = _worst(picked, lambda r: r["canary"], lambda v: f"{v:.3f}")
                        name = [quantization, kv_type, "on" if flash_attention else "off", route]
                        lines.append([*name, *_metrics(picked), f"{canary} of {tolerance(quantization, kv_type):.2f}"])
    return _table(
        ["weights", "cache", "flash attention", "route", "max \\|Δ\\|", "KL", "top-1", "ratio", "canary"], lines
    )


def _onnx(rows: Sequence[Row]) -> str:
    def cell(name: str, precision: str) -> str:
        picked = _pick(rows, architecture=name, runtime="onnx", quantization=precision)
        if not picked:
            return "-"
        row = picked[0]
        if precision == "fp32":
            return f"{_number(row['max_abs_dlogit'])}"
        return _number(row["kl"]) + ("" if precision == "fp16" else f" ({_ratio(row):.2f})")

    def exporter(name: str) -> str:
        return next((row["exporter"] for row in _pick(rows, architecture=name, runtime="onnx")), "-")

    head = ["architecture", "exporter", "fp32: max \\|Δ\\|", "fp16: KL", "int8: KL (ratio)", "int4: KL (ratio)"]
    return _table(head, ([name, exporter(name), *(cell(name, p) for p in ONNX_PRECISIONS)] for name in _names(rows)))


def _moved(rows: Sequence[Row]) -> str:
    """Seeds that go along with the text, by architecture."""

    def line(name: str) -> list[str]:
        own = [row for row in rows if row["architecture"] == name]
        exact = [_pick(own, quantization="F32", kv_type="f32", flash_attention=False, route=route) for route in ROUTES]
        cells = [name, *(_worst(picked, lambda r: r["max_abs_dlogit"], _number) for picked in exact)]
        for quantization in GGUF_TYPES[1:]:
            for kv_type in KV_TYPES[1:]:
                picked = _pick(own, quantization=quantization, kv_type=kv_type, flash_attention=True)
                cells.append(_kl_and(picked, _ratio, "{:.2f}".format))
        cells.append(_worst(_pick(own, quantization="fp32"), lambda r: r["max_abs_dlogit"], _number))
        cells.append(_kl_and(_pick(own, quantization="int4"), _ratio, "{:.2f}".format))
        cells.append(_worst(_pick(own), lambda r: -r["kl_pinned"], lambda v: f"{-v:.2f}"))
        return cells

    quantized = [f"{weights}, {cache}: KL (ratio)" for weights in GGUF_TYPES[1:] for cache in KV_TYPES[1:]]
    head = ["architecture", "F32 b: max \\|Δ\\|", "F32 c: max \\|Δ\\|", *quantized]
    names = _names([row for row in rows if "refused" not in row])
    return _table([*head, "ONNX fp32: max \\|Δ\\|", "ONNX int4: KL (ratio)", "pinned"], map(line, names))


def _refusals(rows: Sequence[Row]) -> str:
    """Each reason once, with how many rows and which architectures."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "refused" in row:
            reasons.setdefault((row["runtime"], row["refused"]), []).append(row)
    lines = []
    for (runtime, reason), refused in reasons.items():
        names = _names(refused)
        lines.append(
            [
                runtime,
                str(len(refused)),
                "all" if len(names) == len(_names(rows)) else ", ".join(names),
                reason.replace("|", "\\|"),
            ]
        )
    return _table(["runtime", "rows", "architectures", "the library's reason"], lines)


def _controls(rows: Sequence[Row]) -> str:
    """Each kind of wrong seed and each quantization: how many were caught by what, and the smallest deviation."""
    lines = []
    for control in dict.fromkeys(row["control"] for row in rows):
        for quantization in GGUF_TYPES:
            picked = [row for row in rows if row["control"] == control and row["quantization"] == quantization]
            if picked:
                by = [str(sum(row["caught_by"] == name for row in picked)) for name in ("calibration", "canary", None)]
                deviations = [row for row in picked if row.get("canary") is not None]
                allowed = f"{tolerance(quantization, picked[0]['kv_type']):.2f}"
                lines.append(
                    [
                        control,
                        quantization,
                        *by,
                        _worst(deviations, lambda r: r["canary"], lambda v: f"{v:.2f}", best=True),
                        allowed,
                    ]
                )
    return _table(
        ["wrong on purpose", "weights", "by calibration", "by the canary", "not caught", "least deviation", "allowed"],
        lines,
    )


def render(results: dict[str, Any]) -> str:
    """The document.

    Args:
        results: ``meta``, judged ``rows`` and ``controls``, as in parity.json.
    """
    meta, rows = results["meta"], results["rows"]
    counts = {
        name: sum(row["passed"] is value for row in rows)
        for name, value in (("passed", True), ("failed", False), ("refused", None))
    }
    text = dict(meta, architectures=len(_names(rows)), measured=len(_pick(rows)), **counts)
    text["versions"] = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    sections = [INTRODUCTION.format(**text), FLOORS]
    pinned, moved = (_of_seed(rows, seed) for seed in SEEDS)
    missed = [f"- {floors.complaint(row)}\n" for row in rows if row["passed"] is False]
    missed += [
        f"- {floors.control_complaint(row)}\n"
        for row in results["controls"]
        if row["required"] and not row["caught_by"]
    ]
    if missed:
        sections.append("## Missed\n\n" + "".join(missed))
    sections.append(
        "## llama.cpp, by architecture\n\nF16 takes the worse of flash attention on and off, with an f16 cache; in "
        "brackets against Transformers with the same weights rounded to float16. Quantized rows have an f16 cache and flash "
        "attention.\n\n" + _by_architecture(pinned)
    )
    sections.append("## llama.cpp, by setting\n\nThe worst of all architectures.\n\n" + _by_setting(pinned))
    sections.append("## ONNX Runtime, stored seed\n\n" + _onnx(pinned))
    if moved:
        sections.append(MOVED + _moved(moved))
    sections.append(CONTROLS + _controls(results["controls"]))
    sections.append("## Refused\n\n" + _refusals(rows))
    return "\n".join(sections)
