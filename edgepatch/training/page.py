"""The curves of a training run as one HTML file, for the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from edgepatch.files.writing import write_atomically
from edgepatch.pages.blocks import Charts, Details, Facts, Page, Section
from edgepatch.pages.charts import curve
from edgepatch.pages.rendering import render
from edgepatch.training.config import History

TITLES = {
    "sft_loss": "SFT loss",
    "distillation_loss": "KL to the teacher, nats a token",
    "dpo_loss": "DPO loss",
    "kl": "KL to the bare model, nats a token",
    "preference_accuracy": "preference accuracy on held-out pairs",
    "held_out_kl": "KL on held-out benign text, nats a token",
}


def write_training_page(history: History, record: Mapping[str, Any], name: str, path: Path) -> None:
    """Writes the page.

    Args:
        history: of the run.
        record: what the patch tells of its training.
        name: of the patch.
        path: the HTML file.

    Raises:
        InputError: the file cannot be written.
    """
    charts = Charts([curve(values, TITLES[field]) for field, values in asdict(history).items()])
    plain = {key: value for key, value in record.items() if not isinstance(value, Mapping)}
    nested = [Details(key, [Facts(value)]) for key, value in record.items() if isinstance(value, Mapping)]
    about = {
        "made for": f"the patch {name}",
        "pairs": str(record.get("num_pairs", "")),
        "time": f"{record['seconds']:,} s on {record.get('device', 'a device not told')}"
        if "seconds" in record
        else "",
    }
    sections = [Section("Curves", [charts]), Section("Settings", [Facts(plain), *nested])]
    write_atomically(path, render(Page(f"Training of {name}", sections, answer(history), about=about)).encode())


def answer(history: History) -> str:
    """Whether the run learned, from what it lowered, at first and at last, and from what it was held against."""
    told = []
    for field in ("distillation_loss", "sft_loss", "dpo_loss"):
        if len(losses := _ends(getattr(history, field))) > 1:
            told.append(
                f"{TITLES[field]} {'fell' if losses[-1] < losses[0] else 'did not fall'}: {losses[0]:.3f} to {losses[-1]:.3f}"
            )
    if accuracies := history.preference_accuracy:
        told.append(f"{accuracies[-1]:.0%} of held-out pairs are preferred as they should be")
    text = "; ".join(told)
    return f"{text[0].upper()}{text[1:]}." if text else "Nothing was trained."


def _ends(losses: Sequence[float]) -> list[float]:
    """Means of the first and of the last tenth of the steps: a single step is noise."""
    count = max(1, len(losses) // 10)
    return [fmean(losses[:count]), fmean(losses[-count:])] if len(losses) > 1 else []
