"""How ``show`` prints a patch: what it does, how well, for which model, who signed; all that the file says behind it, when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepatch.cli.console import counted, size_text
from edgepatch.patch.card import measured_in_words, part_titles
from edgepatch.patch.file import Patch
from edgepatch.seeds.anchoring import place_in_words
from edgepatch.store.records import base_id

NOT_TOLD = "not told"
Rows = list[tuple[str, object]]


def summary_rows(patch: Patch, path: Path, trust: str) -> Rows:
    """About ten lines.

    Args:
        patch: the patch.
        path: its file.
        trust: whether this device's trust root vouches for it, in words.
    """
    return [
        ("patch", f"{patch.name} {patch.version}, {patch.channel} {patch.sequence}; {patch.summary or 'no summary'}"),
        ("kind", f"{_kind(patch)}, {size_text(path.stat().st_size)}; {place_in_words(patch.anchoring)}"),
        ("made for", _base(patch)),
        ("measured", measured_in_words(patch.evaluation)),
        ("trained", _training(patch.training)),
        *([("parts", parts_in_words(patch))] if patch.parts else []),
        (
            "canary",
            counted(len(patch.canary.prompts), "prompt") if patch.canary else "none: nothing can prove that it acts",
        ),
        ("signed by", ", ".join(signature.key_id[:12] for signature in patch.signatures) or "nobody"),
        ("trust", trust),
        ("terms", f"license {patch.license or NOT_TOLD}; created {_day(patch.created)}, expires {_expiry(patch)}"),
        ("digest", patch.digest),
    ]


def parts_in_words(patch: Patch) -> str:
    """The patches that one was composed of."""
    titles = zip(patch.parts, part_titles(patch), strict=True)
    return ", ".join(f"{title} ({digest[:12]})" if title else digest[:12] for digest, title in titles) or "none"


def _kind(patch: Patch) -> str:
    what = "soft prompt" if patch.soft_prompt is not None else "trained keys and values"
    seed = "" if patch.kv_seed is None or patch.soft_prompt is None else " with its seed"
    return f"{what} of {patch.num_virtual_tokens} virtual tokens{seed}"


def _base(patch: Patch) -> str:
    base = patch.base
    shape = f"{base.num_hidden_layers} layers, hidden size {base.hidden_size:,}, vocabulary {base.vocab_size:,}"
    return (
        f"{base.model_type}, {shape}; weights {base.weight_fingerprint[:12]} (base {base_id(base)[:12]} in the store)"
    )


def _training(training: Mapping[str, Any]) -> str:
    config = training.get("config")
    steps = config if isinstance(config, Mapping) else {}
    stages = [
        f"{steps[f'{stage}_steps']} steps of {stage.upper()}" for stage in ("sft", "dpo") if steps.get(f"{stage}_steps")
    ]
    num_pairs = training.get("num_pairs")
    pairs = [counted(num_pairs, "pair")] if isinstance(num_pairs, int) and num_pairs else []
    seconds = training.get("seconds")
    time = (
        [f"{seconds:,.0f} s on {training.get('device', 'a device not told')}"]
        if isinstance(seconds, (int, float))
        else []
    )
    return ", ".join([*pairs, *stages, *time]) or NOT_TOLD


def _day(time: str) -> str:
    return time[:10] or NOT_TOLD


def _expiry(patch: Patch) -> str:
    return patch.expires[:10] or "never"
