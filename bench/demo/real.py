"""The demo on a model that people use: a patch that ships, every form of the model, bare and patched, and one prompt answered twice.

It is ``bench safety`` at the sizes of a demo. The patch is the shipped one: to train it takes longer than a demo may.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.bench.checkout import ROOT
from edgepatch.bench.evidence import own_model
from edgepatch.bench.evidence.questions import Amounts, Question
from edgepatch.bench.report.own_model import render_page
from edgepatch.bench.safety.retained import Sizes
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.progress import Progress, silent, stage
from edgepatch.prompts.sets import load_prompts
from edgepatch.runtimes import load_runtime

PATCHES = ROOT / "patches"
SHIPPED = "smollm2-detox-*.safetensors"
TYPES = ("Q4_K_M", "onnx-int8")
AMOUNTS = Amounts(8, 5, 8, Sizes(3, 1, 0), 2, (), 8)
"""A glance: intervals are wide. ``bench safety`` measures more."""

REPLY = Sampling.plain(max_new_tokens=40, temperature=1.0, rng_seed=1)


@dataclass(frozen=True)
class Answers:
    """One prompt, continued twice with the same random numbers.

    Attributes:
        prompt: the text.
        bare, patched: what the model goes on with.
    """

    prompt: str
    bare: str
    patched: str


def shipped_patch() -> Path:
    """The newest detox patch that ships for the model.

    Raises:
        InputError: none is there, because this is no checkout.
    """
    files = sorted(PATCHES.glob(SHIPPED))
    if not files:
        raise InputError(
            f"no {SHIPPED} in {PATCHES}", hint="run the demo from a source checkout, or name a patch with --patch"
        )
    return files[-1]


def run_real_demo(
    model: Path, patch: Path, out: Path, data: Path | None = None, progress: Progress = silent, tell: Any = print
) -> tuple[dict[str, Any], Answers]:
    """Makes every form of the model, measures it bare and patched, and lets both answer.

    Args:
        model: GGUF file.
        patch: its patch.
        out: folder for forms, raw cells, ``results.json`` and ``report.html``.
        data: data folder; ``None`` takes the prompts that ship with edgepatch.
        progress: told of every step of a stage.
        tell: gets what the user must know before the work.

    Returns:
        The results document, and the answers.

    Raises:
        InputError: something cannot be used, or ``out`` cannot be written.
    """
    question = Question(model, (patch,), TYPES, ("toxicity",), AMOUNTS, is_quick=True)
    document = own_model.run(question, out, data, progress, tell)
    with stage(progress, "two answers"):
        answers = two_answers(model, patch, load_prompts("toxic", "eval")[0])
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "results.json", (text + "\n").encode())
    write_atomically(out / "report.html", render_page(document).encode())
    return document, answers


def two_answers(model: Path, patch: Path, prompt: str) -> Answers:
    """The same prompt with the same random numbers, without the patch and with it."""
    with load_runtime(model, None) as session:
        bare = session.generate(prompt, REPLY)
    with load_runtime(model, patch) as session:
        return Answers(prompt, bare, session.generate(prompt, REPLY))
