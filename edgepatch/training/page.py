"""The curves of a training run as one HTML file, for the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepatch.files.writing import write_atomically
from edgepatch.pages.blocks import Charts, Facts, Page, Section
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
    page = Page(f"Training of {name}", [Section("Curves", [charts]), Section("Settings", [Facts(record)])])
    write_atomically(path, render(page).encode())
