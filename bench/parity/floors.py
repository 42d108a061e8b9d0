"""What each row of the parity table must reach, and which refusals are the library's proper answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgepatch.bench.parity.models import architecture

Row = dict[str, Any]

UNQUANTIZED_CACHES = ("f32", "f16")
UNQUANTIZED_WEIGHTS = ("F32", "F16", "fp32", "fp16")
ONNX_F32 = 1e-4
RATIO = 1.1
"""A seed of the full-precision model on quantized weights: no more error than those weights make without any patch."""

REQUANTIZED_RATIO = 1.75
"""Where the virtual tokens themselves pass through quantized weights or lie in a quantized cache, their error comes on top."""


FULL_PRECISION = ("F32", "F16", "fp32", "fp16")


@dataclass(frozen=True)
class Floor:
    """``metric`` must not exceed ``limit``.

    Attributes:
        name: of the rule, for the document.
        metric: key of the row.
        limit: number.
    """

    name: str
    metric: str
    limit: float


def floors_of(row: Row) -> list[Floor]:
    """What a measured row must reach."""
    floors = _of_any_seed(row)
    # What 4-bit weights do to the logits is as large as what a pinned seed would: there the canary's long prompt, which looks at the
    # effect alone, says whether the seed has moved.
    if row.get("seed") == "moved" and row["quantization"] in FULL_PRECISION:
        floors.append(Floor("moved", "kl", architecture(row["architecture"]).active_share * row["kl_pinned"]))
    return floors


def _of_any_seed(row: Row) -> list[Floor]:
    spec = architecture(row["architecture"])
    active = Floor("active", "kl", spec.active_share * row["kl_no_patch"])
    if row["runtime"] == "onnx":
        limits = {"fp32": ("max_abs_dlogit", ONNX_F32), "fp16": ("kl", spec.half_kl)}
        if row["quantization"] in limits:
            return [Floor(f"ONNX {row['quantization']}", *limits[row["quantization"]]), active]
        return [Floor("stored seed, quantized weights", "kl", RATIO * row["kl_bare"]), active]
    weights, cache = row["quantization"], row["kv_type"]
    if weights in ("F32", "F16") and cache in UNQUANTIZED_CACHES:
        floors = [Floor("float16 somewhere", "kl", spec.half_kl), active]
        if (weights, cache, row["flash_attention"]) == ("F32", "f32", False):
            floors.insert(0, Floor("float32 throughout", "max_abs_dlogit", spec.f32_floor))
        return floors
    if row["route"] == "b" and cache in UNQUANTIZED_CACHES:
        return [Floor("stored seed, quantized weights", "kl", RATIO * row["kl_bare"]), active]
    return [Floor("requantized virtual tokens", "kl", REQUANTIZED_RATIO * row["kl_bare"]), active]


def is_proper_refusal(row: Row) -> bool:
    """Whether the library could do nothing better than refuse."""
    spec, moves = architecture(row["architecture"]), row.get("seed") == "moved"
    if not spec.stored_route and (row["route"] == "b" or moves):
        return True
    if moves and row["runtime"] == "onnx" and spec.has_windows:
        return True
    return row["runtime"] == "llamacpp" and row["kv_type"] not in UNQUANTIZED_CACHES and not row["flash_attention"]


def judge(row: Row) -> Row:
    """The row with ``floors`` and ``passed``; ``passed`` is ``None`` for a proper refusal."""
    if "refused" in row:
        return row | {"floors": [], "passed": None if is_proper_refusal(row) else False}
    floors = floors_of(row)
    return row | {
        "floors": [{"name": f.name, "metric": f.metric, "limit": f.limit} for f in floors],
        "passed": all(row[f.metric] <= f.limit for f in floors) and not is_proper_refusal(row),
    }


def label(row: Row) -> str:
    """Names a row for people."""
    parts = [row["architecture"], row["runtime"], row["quantization"], f"KV {row['kv_type']}"]
    if row["flash_attention"] is not None:
        parts.append(f"flash attention {'on' if row['flash_attention'] else 'off'}")
    return ", ".join([*parts, f"route {row['route']}", *(["moved"] if row.get("seed") == "moved" else [])])


def complaint(row: Row) -> str:
    """Why a judged row failed."""
    if "refused" in row:
        return f"{label(row)}: refused: {row['refused']}"
    over = [f for f in row["floors"] if not row[f["metric"]] <= f["limit"]]  # NaN is over, too
    missed = [f"{f['metric']} {row[f['metric']]:.1e} > {f['limit']:.1e} ({f['name']})" for f in over]
    return f"{label(row)}: {'; '.join(missed) or 'ran, although it should have been refused'}"


def control_complaint(row: Row) -> str:
    """Names a wrong seed that nothing has caught."""
    return f"{row['architecture']}, {row['quantization']}, KV {row['kv_type']}: not caught: {row['control']}"
