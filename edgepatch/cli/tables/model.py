"""How ``show`` prints a model: the answers first, in ten lines; all that the files say behind them, when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgepatch.cli.console import size_text

if TYPE_CHECKING:
    from edgepatch.inspection.facts import ModelFacts, Origin, Shape
    from edgepatch.inspection.fitting import Fitting, FittingPatch
    from edgepatch.inspection.memory import MemoryNeed
    from edgepatch.inspection.models import ModelReport

RUNTIMES = {"llamacpp": "llama.cpp", "onnx": "ONNX Runtime", "torch": "PyTorch"}
NOT_TOLD = "not told"
Rows = list[tuple[str, object]]


def summary_rows(report: ModelReport) -> Rows:
    """About ten lines: what the model is, how it is stored, which patches fit, whether it fits into memory."""
    facts = report.facts
    vocabulary, origin = facts.vocabulary, facts.origin
    ends = " or ".join(vocabulary.end_tokens.values())
    kind = " ".join(part for part in (vocabulary.kind, vocabulary.pre_tokenizer) if part)
    return [
        ("model", f"{origin.name or facts.path.resolve().name}; {_makers(origin)}"),
        ("kind", f"{facts.kind} for {RUNTIMES[facts.runtime]}, {size_text(facts.num_bytes)} on disk{_also(facts)}"),
        ("architecture", f"{facts.architecture}, {_parameters(facts.num_parameters)}; {_layers(facts.shape)}"),
        ("quantization", f"{facts.quantization}: {_types(facts)}"),
        ("context", f"{_count(facts.shape.context_length, 'positions')}; {_rope(facts.shape)}"),
        (
            "vocabulary",
            f"{_count(vocabulary.size, 'tokens')} ({kind or NOT_TOLD}); a reply ends with {ends or NOT_TOLD}",
        ),
        ("chat template", _template(facts)),
        ("fingerprint", _fingerprint(facts)),
        ("patches", _patches(report.fitting, facts)),
        ("memory", _memory(report.memory)),
    ]


def further_rows(report: ModelReport) -> Rows:
    """What ``--all`` adds."""
    facts, need = report.facts, report.memory
    rows: Rows = [
        ("path", facts.path),
        ("url", facts.origin.url or NOT_TOLD),
        ("made of", facts.origin.base or NOT_TOLD),
        ("sampling", f"{facts.sampling}{'; ' * bool(facts.sampling.note)}{facts.sampling.note}"),
    ]
    rows += [("file", f"{name}, {size_text(size)}") for name, size in facts.files.items()]
    rows += [("end token", f"{number} {text}") for number, text in facts.vocabulary.end_tokens.items()]
    if facts.chat_template:
        rows.append(("template digest", facts.chat_template.digest or "none in use"))
    if facts.spec:
        rows += [(f"base {name}", value) for name, value in facts.spec.as_dict().items()]
        rows.append(("base id", facts.base))
    rows += [("patch", _patch(patch)) for patch in report.fitting.patches]
    rows.append(("store", f"{report.fitting.store}{_weights_compared(report.fitting)}"))
    for kind, size in need.cache_bytes.items():
        whole = f", {size_text(need.context_bytes[kind])} for {_count(facts.shape.context_length, 'positions')}"
        rows.append((f"cache {kind}", f"{size_text(size)} for {need.positions:,} positions{whole}"))
    return rows + [(name, value) for name, value in facts.more.items()]


def _count(number: int | None, what: str) -> str:
    return f"{what} {NOT_TOLD}" if number is None else f"{number:,} {what}"


def _parameters(count: int | None) -> str:
    if count is None:
        return f"parameters {NOT_TOLD}"
    unit, size = ("B", 1e9) if count >= 1e9 else ("M", 1e6) if count >= 1e6 else ("k", 1e3)
    return f"{count / size:.3g} {unit} parameters" if count < 100 * size else f"{count / size:.0f} {unit} parameters"


def _layers(shape: Shape) -> str:
    def number(value: int | None) -> str:
        return "?" if value is None else f"{value:,}"

    heads = (
        f"{number(shape.num_heads)} query and {number(shape.num_kv_heads)} key/value heads of {number(shape.head_dim)}"
    )
    tied = {True: ", tied head", False: "", None: ""}[shape.has_tied_head]
    return f"{number(shape.num_layers)} layers, hidden size {number(shape.hidden_size)}, {heads}{tied}"


def _makers(origin: Origin) -> str:
    return f"author {origin.author or NOT_TOLD}, license {origin.license or NOT_TOLD}"


def _types(facts: ModelFacts) -> str:
    types = [f"{kind.num_tensors:,} {kind.name} ({size_text(kind.num_bytes)})" for kind in facts.tensor_types]
    return ", ".join(types) or "no tensors"


def _rope(shape: Shape) -> str:
    if shape.rope_theta is None:
        return f"rope {NOT_TOLD}"
    kind = shape.rope_scaling.get("rope_type") or ("partial" if shape.rope_scaling else "")
    return f"rope theta {shape.rope_theta:,.0f}{f', scaling {kind}' if kind else ''}"


def _template(facts: ModelFacts) -> str:
    template = facts.chat_template
    if template is None:
        return "none: the model continues text"
    tools = "knows tools" if template.mentions_tools else "knows no tools"
    named = f"; also {', '.join(template.names)}" if template.names else ""
    return f"{template.digest[:12] or 'none by default'}, {tools}{named}"


def _fingerprint(facts: ModelFacts) -> str:
    """The identity that patches name: the same for every quantization and form of one model."""
    if facts.spec is None:
        return f"none: {facts.no_spec}"
    return f"{facts.spec.weight_fingerprint[:12]} (base {facts.base[:12]} in the store)"


def _also(facts: ModelFacts) -> str:
    return f"; {', '.join(facts.also)} in the same folder is not used" if facts.also else ""


def _patches(fitting: Fitting, facts: ModelFacts) -> str:
    if facts.spec is None:
        return "none can fit"
    if fitting.problem:
        return f"unknown: {fitting.problem}"
    active = [_patch(patch) for patch in fitting.patches if patch.is_active]
    others = [patch for patch in fitting.patches if not patch.is_active]
    if not fitting.patches:
        return "none for this model in this device's store, nor beside it"
    names = ", ".join(f"{patch.name} {patch.version}{_where(patch)}{_doubt(patch)}" for patch in others)
    phrases = [f"active: {' and '.join(active)}" if active else "none is active"]
    return "; ".join([*phrases, f"made for it: {names}"] if others else phrases)


def _where(patch: FittingPatch) -> str:
    return "" if patch.source == "store" else f" in {Path(patch.source).name}"


def _doubt(patch: FittingPatch) -> str:
    return " (does not fit)" if patch.problem else ""


def _patch(patch: FittingPatch) -> str:
    problem = f", does not fit: {patch.problem}" if patch.problem else ""
    return f"{patch.name} {patch.version} ({patch.digest[:12]}){_where(patch)}, {patch.trust}{problem}"


def _weights_compared(fitting: Fitting) -> str:
    return (
        "" if fitting.are_weights_compared or not fitting.patches else "; weights are compared when a patch is loaded"
    )


def _memory(need: MemoryNeed) -> str:
    available = "unknown" if need.available_bytes is None else size_text(need.available_bytes)
    word = {True: "fits", False: "does not fit", None: "unknown whether it fits"}[need.fits]
    cache = "".join(
        f", of these {size_text(size)} for {need.positions:,} positions in {kind}"
        for kind, size in list(need.cache_bytes.items())[:1]
    )
    return f"{word}: about {size_text(need.total_bytes)} of {available} available{cache}"
