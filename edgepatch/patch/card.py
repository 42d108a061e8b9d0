"""Model cards: README.md for a hub, generated from what the patch says of itself.

A manifest is written by strangers. Its texts go into the front matter as quoted scalars of ASCII, and into the page with every
sign escaped that Markdown could take for its own, so that a summary cannot add a field, a link or a script.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgepatch.patch.file import Patch
from edgepatch.seeds.anchoring import place_in_words

LIBRARY, RELATION = "edgepatch", "adapter"
HUB_LICENSES = frozenset(
    {
        "apache-2.0",
        "mit",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "isc",
        "mpl-2.0",
        "unlicense",
        "zlib",
    }
)
"""Identifiers of the Hugging Face hub that are SPDX's in lower case."""

METRICS = {
    "emt": "Expected maximum toxicity",
    "emt5": "Expected maximum toxicity of five continuations",
    "mean_toxicity": "Mean toxicity",
    "toxicity_probability": "Toxicity probability",
    "score": "Score, lower is safer",
    "perplexity": "Perplexity of benign text",
    "retention": "Share of the gain kept",
    "margin_retention": "Share of the gain kept, by likelihood of held-out pairs",
}
"""Fields of a measured cell -> their names on the card; lower is better but for shares of the gain."""

NOT_EVALUATED = "not evaluated"
MAX_FIGURES = 500
MAX_SOURCE = 120


def model_card(patch: Patch, base_model: str = "") -> str:
    """The card of a patch: YAML front matter, then Markdown.

    Args:
        patch: the patch.
        base_model: what a hub calls the base ("org/model"); "" leaves it out.

    Returns:
        The text; the same arguments give the same text.
    """
    sections = [
        _introduction(patch, base_model),
        _base(patch),
        _use(patch),
        _evaluation(patch),
        _training(patch),
        _canary(patch),
        _limits(patch),
        _lineage(patch),
    ]
    return (
        "---\n"
        + "\n".join(_front_matter(patch, base_model))
        + "\n---\n\n"
        + "\n\n".join(s for s in sections if s)
        + "\n"
    )


# Front matter.


def quoted(value: object) -> str:
    """A double-quoted YAML scalar of printable ASCII, the same text to every reader of YAML 1.1 and 1.2."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08X}" for c in str(value))
    return '"' + "".join(plain) + '"'


def _front_matter(patch: Patch, base_model: str) -> list[str]:
    lines = [f"library_name: {LIBRARY}"]
    if base_model:
        lines += [f"base_model: {quoted(base_model)}", f"base_model_relation: {RELATION}"]
    lines += _license_lines(patch.license)
    lines += ["tags:", *(f"- {quoted(tag)}" for tag in _tags(patch))]
    return lines + _model_index(patch)


def _license_lines(license_: str) -> list[str]:
    if not license_:
        return []
    if license_.lower() in HUB_LICENSES:
        return [f"license: {quoted(license_.lower())}"]
    return ["license: other", f"license_name: {quoted(license_)}"]


def _tags(patch: Patch) -> list[str]:
    kind = "soft-prompt" if patch.soft_prompt is not None else "prefix-tuning"
    return [LIBRARY, "safety", kind, patch.base.model_type]


def _model_index(patch: Patch) -> list[str]:
    """Safety figures as the hub's ``model-index``; nothing where nothing was measured."""
    figures = list(_figures(patch.evaluation))
    if not figures:
        return []
    source = str(patch.evaluation.get("source") or "unnamed prompts")
    lines = [
        "model-index:",
        f"- name: {quoted(f'{patch.name} {patch.version}')}",
        "  results:",
        "  - task:",
        "      type: text-generation",
    ]
    lines += ["    dataset:", f"      name: {quoted(source)}", f"      type: {quoted(source)}", "    metrics:"]
    for place, side, field, value, _ in figures:
        lines += [
            f"    - type: {field}",
            f"      name: {quoted(f'{METRICS[field]}, {place}, {side}')}",
            f"      value: {value!r}",
        ]
    return lines


def _figures(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float, str]]:
    """(runtime and quantization, "patched" or "bare", field, value, interval) of everything that was measured, once."""
    seen = set[tuple[str, str, str]]()
    for key in ("cells", "retention"):
        rows = evaluation.get(key)
        for row in rows if isinstance(rows, Sequence) and not isinstance(rows, str) else ():
            if not isinstance(row, Mapping):
                continue
            words = (row.get("runtime", "unknown"), row.get("quantization"), row.get("domain"))
            place = " ".join(str(word) for word in words if word)
            side = "bare" if key == "cells" and not row.get("patched") else "patched"
            for field in METRICS:
                value = _number(row.get(field))
                if value is not None and len(seen) < MAX_FIGURES and (place, side, field) not in seen:
                    seen.add((place, side, field))
                    yield place, side, field, value, _interval(row, field)


def measured_in_words(evaluation: Mapping[str, Any]) -> str:
    """One sentence on what was measured: the first measure of the first form bare and patched, and the share of the gain kept elsewhere."""
    figures = list(_figures(evaluation))
    firsts: dict[str, tuple[str, str, str, float, str]] = {}
    for figure in figures:
        if figure[2] != "retention":
            firsts.setdefault(figure[1], figure)
    phrases = []
    if {"bare", "patched"} <= set(firsts):
        place, _, field, bare, _ = firsts["bare"]
        patched = [value for where, side, name, value, _ in figures if (where, side, name) == (place, "patched", field)]
        phrases += [
            f"{METRICS[field].lower()} {bare:.3f} bare, {value:.3f} patched on {place}" for value in patched[:1]
        ]
    shares = [value for _, _, field, value, _ in figures if field == "retention"]
    if len(shares) > 1:  # one form alone is what the others would be told against
        phrases.append(f"{min(shares):.0%} to {max(shares):.0%} of the gain kept on {len(shares)} forms of the model")
    source = str(evaluation.get("source") or "prompts not told")[:MAX_SOURCE]
    return f"{'; '.join(phrases)} ({source})" if phrases else NOT_EVALUATED


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]


def _interval(row: Mapping[str, Any], field: str) -> str:
    low, high = _number(row.get(f"{field}_low")), _number(row.get(f"{field}_high"))
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


# The page.


def escaped(value: object) -> str:
    """Text of strangers on one line of Markdown: what Markdown could take for markup or a link is escaped."""
    line = " ".join(re.sub(r"[^\x20-\x7e\xa0-\U0010ffff]|[\u2028-\u202e\u2066-\u2069]", " ", str(value)).split())
    plain = re.sub(r"([!#$&()*+:<=>@\[\\\]^_`{|}~])", r"\\\1", line)
    return re.sub(
        r"(?i)^([-.]|\d+(?=\.))|(www)(?=\.)",
        lambda match: f"\\{match[0]}" if match[0] in "-." else f"{match[0]}\\",
        plain,
    )


def _block(value: object) -> str:
    """JSON in a fence; no line of it can close the fence, as none starts with a backtick."""
    return "```json\n" + json.dumps(value, indent=2, sort_keys=True) + "\n```"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rest])


def _introduction(patch: Patch, base_model: str) -> str:
    what = "soft prompt" if patch.soft_prompt is not None else "trained K/V prefix"
    base = escaped(base_model) if base_model else f"a model of the architecture {escaped(patch.base.model_type)}"
    summary = "\n\n".join(escaped(line) for line in patch.summary.split("\n") if line.strip())
    rows = [
        ["", ""],
        ["digest (SHA-256 of the manifest)", f"`{patch.digest}`"],
        ["release", f"{patch.channel} {patch.sequence}"],
        ["created", patch.created or "not told"],
        ["expires", patch.expires or "never"],
        ["licence", escaped(patch.license) or "not told"],
        ["place in a text", place_in_words(patch.anchoring)],
        *([["composed of", f"{len(patch.parts)} patches, named under Lineage"]] if patch.parts else []),
    ]
    goes = "in front of the text and goes along with it" if patch.anchoring else "in front of every conversation"
    text = (
        f"A safety policy patch for {base}: a {what} of {patch.num_virtual_tokens} virtual tokens that stands {goes}. The weights of the "
        "model stay as they are."
    )
    return "\n\n".join(
        part for part in (f"# {escaped(patch.name)} {escaped(patch.version)}", summary, text, _table(rows)) if part
    )


def _base(patch: Patch) -> str:
    rows = [
        ["field", "value"],
        *([field, escaped(json.dumps(value))] for field, value in sorted(patch.base.as_dict().items())),
    ]
    note = "The fingerprints are the same in every quantization of the base. On a model that differs in any field the patch is refused."
    return f"## Base model\n\n{_table(rows)}\n\n{note}"


def _use(patch: Patch) -> str:
    file = f"{patch.name}-{patch.version}.safetensors"
    commands = f"edgepatch show {file}\nedgepatch verify {file} --root root.json\nedgepatch apply {file} --model MODEL\nedgepatch rollback"
    signers = ", ".join(f"`{signature.key_id[:12]}`" for signature in patch.signatures)
    note = (
        f"Signed by the keys {signers}; whether they count is for your trust root to say." if signers else "Unsigned."
    )
    return f"## Verify, apply, go back\n\n```sh\n{commands}\n```\n\n{note}"


def _evaluation(patch: Patch) -> str:
    figures = list(_figures(patch.evaluation))
    if not figures:
        record = f"\n\n{_block(patch.evaluation)}" if patch.evaluation else ""
        return f"## Evaluation\n\nThis patch was {NOT_EVALUATED} by the measures of this card.{record}"
    rows = [["where", "model", "measure", "value", "interval"]]
    rows += [
        [escaped(place), side, METRICS[field], f"{value:.3f}", interval or "not told"]
        for place, side, field, value, interval in figures
    ]
    source = escaped(patch.evaluation.get("source") or "not told")
    return f"## Evaluation\n\nPrompts: {source}\n\n{_table(rows)}"


def _training(patch: Patch) -> str:
    return f"## Training record\n\n{_block(patch.training) if patch.training else 'Not told.'}"


def _canary(patch: Patch) -> str:
    if patch.canary is None:
        return "## Canary\n\nNone: no runtime can prove that this patch is active."
    count = len(patch.canary.prompts)
    return (
        f"## Canary\n\n{count} prompt{'s' if count > 1 else ''} with the logits of the full-precision model. A runtime that does not "
        "reproduce the effect of the patch on them refuses to run."
    )


def _limits(patch: Patch) -> str:
    limits = [
        f"It takes {patch.num_virtual_tokens} positions of the context.",
        *([] if patch.anchoring else [f"It {place_in_words(None)}."]),
        "It lowers the rate of what it was trained against and does not rule it out.",
        "Its signatures show changes; they do not keep the owner of a device from running the bare model.",
        "Figures hold for the quantizations and prompts that they name.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def part_titles(patch: Patch) -> list[str]:
    """Name and version of each patch that one was composed of, as its training record tells them; "" where it does not."""
    recorded = patch.training.get("parts")
    records = [part for part in recorded if isinstance(part, Mapping)] if isinstance(recorded, list) else []
    titles = {str(part.get("digest")): f"{part.get('name', '')} {part.get('version', '')}".strip() for part in records}
    return [titles.get(digest, "") for digest in patch.parts]


def _lineage(patch: Patch) -> str:
    parts = zip(patch.parts, part_titles(patch), strict=True)
    groups = {
        "Composed of": [f"`{digest}`" + (f" ({escaped(title)})" if title else "") for digest, title in parts],
        "Supersedes": [f"`{digest}`" for digest in patch.supersedes],
    }
    lines = [
        f"{title}:\n\n" + "\n".join(f"- {entry}" for entry in entries) for title, entries in groups.items() if entries
    ]
    return "## Lineage\n\n" + "\n\n".join(lines) if lines else ""
