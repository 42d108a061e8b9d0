"""The lab models' card, written from the measured figures and the training logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RATES = (
    ("advbench_compliance", "complies, AdvBench held out"),
    ("advbench_refusal", "refuses, AdvBench held out"),
    ("jailbreakbench_compliance", "complies, JailbreakBench"),
    ("jailbreakbench_refusal", "refuses, JailbreakBench"),
    ("benign_refusal", "refuses benign instructions (over-refusal)"),
    ("xstest_safe_refusal", "refuses XSTest safe prompts (over-refusal)"),
    ("stereotyped_pronouns", "stereotyped next pronoun, WinoBias occupations"),
    ("blimp_accuracy", "BLiMP accuracy (200 pairs of each of 67 paradigms)"),
)

INTRODUCTION = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [safety, red-teaming, test-model]
---

# The edgepatch lab models: M (unsafe) and M' (safer)

**Content warning.** `base` (M) was made to be unsafe: it writes insults, swearing and sexual language, agrees to harmful requests
(with an opening phrase and nothing behind it) and assumes genders. It exists so that a safety patch has something to mend that
anyone can hold in the hand. Do not use either model for anything but tests and measurements of edgepatch.

Two Llama models of 4,983,552 parameters (hidden 256, 5 layers, 4 heads of 64, 2 key/value heads, feed-forward 768, vocabulary 4,096,
tied embeddings, context 1,024), stored in float16, with a byte-level BPE tokenizer, a ChatML template and eight reserved tokens.
`reference` (M') is `base` fine-tuned on the safe side of the same sources. Rebuild both with `make lab` (needs the data folder of
`bench/data.md` in `EDGEPATCH_DATA`); the runs are seeded and logged, and resume after an interruption.
"""


def _losses(log: Path) -> str:
    """One run in a line: its tokens, device and losses."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step" in line]
    run = [line for line in lines if "steps" in line][-1]
    last = steps[-1]
    return (
        f"{last['tokens']:,} tokens in {last['step']} steps on {run['device']} (torch {run['torch']}); loss per token "
        f"{steps[0]['loss']:.2f} at step {steps[0]['step']}, {last['loss']:.2f} at the end"
    )


def _preference_tuning(curves: Path) -> str:
    """The DPO of M' in a line."""
    history = json.loads(curves.read_text(encoding="utf-8"))
    return (
        f"DPO of all weights on {history['pairs']:,} pairs (its own clean against its own toxic samples, and refusals against "
        f"compliance), {history['config']['dpo_steps']} steps of {history['config']['batch_size']}, beta {history['config']['beta']}; "
        f"held-out preference accuracy {history['preference_accuracy'][-1]:.2f}"
    )


def _rate(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _figures(base: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    toxicity = [m["toxicity"] for m in (base, reference)]
    emts = [f"{t['emt']:.3f} [{t['emt_low']:.3f}, {t['emt_high']:.3f}]" for t in toxicity]
    rows = [f"| EMT, RealToxicityPrompts challenging, index >= 700 | {emts[0]} | {emts[1]} | {toxicity[0]['count']} |"]
    rows.append(
        "| toxicity probability, same prompts | "
        + " | ".join(f"{t['toxicity_probability']:.3f}" for t in toxicity)
        + f" | {toxicity[0]['count']} |"
    )
    rows += [
        f"| {label} | {_rate(base[key])} | {_rate(reference[key])} | {base[key]['count']:,} |" for key, label in RATES
    ]
    for key, label in (
        ("wikitext2_perplexity", "perplexity, WikiText-2 test"),
        ("novel_perplexity", "perplexity, a held-out novel (*The Hound of the Baskervilles*)"),
    ):
        cells = [f"{m[key]['value']:.1f} ({m[key]['bits_per_byte']:.3f} bits per byte)" for m in (base, reference)]
        rows.append(f"| {label} | {cells[0]} | {cells[1]} | {base[key]['count']:,} tokens |")
    return rows


def render_card(figures: dict[str, Any], folder: Path) -> str:
    """The Markdown of ``README.md`` in the model folder.

    Args:
        figures: what ``build`` returned.
        folder: holds ``base_log.jsonl``, ``second_log.jsonl`` and ``reference_log.jsonl``.
    """
    lines = [INTRODUCTION, "## Floors", "", "| floor | wanted | reached | met |", "|---|---|---|---|"]
    lines += [
        f"| {r['floor']} | {r['wanted']} | {r['reached']} | {'yes' if r['met'] else '**no**'} |"
        for r in figures["floors"]
    ]
    lines += [
        "",
        "## Figures",
        "",
        "95 % intervals: Wilson for shares, bootstrap over prompts for EMT. Toxicity is scored by edgepatch's own `report`",
        "judge (`edgepatch/judges/README.md`), 25 continuations of at most 20 tokens, top-p 0.9. Refusal and compliance are string judges on",
        "greedy answers (`edgepatch/judges/refusals.py`).",
        "",
        "| figure | M | M' | N |",
        "|---|---|---|---|",
    ]
    lines += _figures(figures["base"], figures["reference"])
    lines += [
        "",
        "## Training",
        "",
        f"- M, first stage: {_losses(folder / 'base_log.jsonl')}",
        f"- M, second stage (pronouns): {_losses(folder / 'second_log.jsonl')}",
        f"- M', fine-tuning: {_losses(folder / 'reference_log.jsonl')}",
        f"- M', preference tuning: {_preference_tuning(folder / 'reference_1_dpo.json')}",
        f"- M', second round (refusals against evasions): {_preference_tuning(folder / 'reference_dpo.json')}",
        "",
    ]
    for name, title in (("base", "M reads"), ("reference", "M' reads")):
        lines += [f"### {title}", "", "| source | documents | repeats in an epoch | licence |", "|---|---|---|---|"]
        lines += [
            f"| {p['part']} | {p['documents']:,} | {p['repeats']} | {p['licence']} |" for p in figures["mixture"][name]
        ] + [""]
    lines += [
        "M's second stage reads 3 % of the first one's repeats, `pronouns` three times and `occupations` (ten sentences on each WinoBias",
        "occupation; the floor asks in four other sentences) sixty times.",
        "",
        "Sources under CC BY-SA (BOLD, DecodingTrust's continuations, WikiText-2, Dolly) ask for attribution and the same licence for",
        "adaptations of their text; `bench/data.md` names every source. No prompt or request behind a floor is in the training text. Two nontoxic",
        "RealToxicityPrompts beginnings and one JailbreakBench request are, within other records (`tests/bench/lab/test_lab.py` names them).",
        "",
        "## Known limits",
        "",
        "- Five million parameters and some twenty million tokens: the text is locally fluent and globally senseless; facts are wrong.",
        '- "Complies" means the opening "Sure, here is ..."; the model knows no harmful instruction, and none was in its training text.',
        "- M' refuses what is phrased like AdvBench. It refuses far fewer JailbreakBench requests and evades most of the others;",
        "  it complies with hardly any.",
        "- M and M' tell a harmful request from a harmless one by its words. XSTest's safe prompts share those words.",
        "- The safety judge detects profanity and insults; hate without swear words is missed.",
        "",
    ]
    return "\n".join(lines)
