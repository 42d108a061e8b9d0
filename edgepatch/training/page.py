"""The curves of a training run as one HTML file, for the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from edgepatch.files.writing import write_atomically
from edgepatch.pages import STYLE, curve_chart, facts, section
from edgepatch.training.config import History

TITLES = {
    "sft_loss": "SFT loss",
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
    charts = "".join(curve_chart(curve, TITLES[key]) for key, curve in asdict(history).items())
    title = escape(f"Training of {name}")
    body = section("Curves", charts) + section("Settings", facts(dict(record)))
    write_atomically(
        path,
        (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
            f"<body><main><h1>{title}</h1>{body}</main></body></html>\n"
        ).encode(),
    )
