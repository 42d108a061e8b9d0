"""The demo on a model that people use: the patches that ship, forms of the model, bare and patched, and prompts answered twice.

It is ``bench safety`` at the sizes of a demo. The patches are shipped ones, side by side: to train them takes longer than a demo may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.bench.evidence import own_model
from edgepatch.bench.evidence.questions import Amounts, Question
from edgepatch.bench.report.own_model import render_page
from edgepatch.bench.safety import gender_prompts
from edgepatch.bench.safety.harm import chat
from edgepatch.bench.safety.retained import Sizes
from edgepatch.bench.smollm2.shipped import DOMAIN_OF, newest_patches
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.judges.semantic import SEMANTIC
from edgepatch.progress import Progress, silent, stage
from edgepatch.prompts.sets import load_prompts
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.prompts import Prompt

TYPES = ("Q4_K_M", "onnx-int8")
DOMAINS = ("toxicity", "gender", "harm")
HARM_JUDGE = SEMANTIC
AMOUNTS = Amounts(24, 5, 24, Sizes(4, 1, 8), 0, (), 16)
"""A glance: intervals are wide. ``bench safety`` measures more."""

REPLY = Sampling.plain(max_new_tokens=40, temperature=1.0, rng_seed=1)


@dataclass(frozen=True)
class Answers:
    """One prompt, answered twice with the same random numbers.

    Attributes:
        prompt: the text that is gone on with, or the user's request.
        bare, patched: what the model says.
    """

    prompt: str
    bare: str
    patched: str


def shipped_patches() -> list[Path]:
    """The newest patches of the domains that the demo measures.

    Raises:
        InputError: one of them is not there, because this is no checkout; the bare model would be shown as a patched one.
    """
    newest = newest_patches()
    patches = [path for name, path in newest.items() if DOMAIN_OF[name] in DOMAINS]
    if len(patches) < len(DOMAINS):
        raise InputError(
            f"expected a patch for each of {', '.join(DOMAINS)}, found {', '.join(newest)}",
            hint="run the demo from a source checkout, or name patches with --patch",
        )
    return patches


def run_real_demo(
    model: Path,
    patches: Sequence[Path],
    out: Path,
    data: Path | None = None,
    progress: Progress = silent,
    tell: Any = print,
) -> tuple[dict[str, Any], list[Answers]]:
    """Makes the forms of the model, measures them bare and patched, and lets both answer.

    Args:
        model: GGUF file.
        patches: its patches, which act side by side.
        out: folder for forms, raw cells, ``results.json`` and ``report.html``.
        data: data folder; ``None`` takes the prompts that ship with edgepatch.
        progress: told of every step of a stage.
        tell: gets what the user must know before the work.

    Returns:
        The results document, and the answers to a prompt of each domain.

    Raises:
        InputError: something cannot be used, or ``out`` cannot be written.
    """
    question = Question(model, tuple(patches), TYPES, DOMAINS, AMOUNTS, harm_judge=HARM_JUDGE, is_quick=True)
    document = own_model.run(question, out, data, progress, tell)
    with stage(progress, "two answers"):
        answers = two_answers(model, patches, example_prompts())
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "results.json", (text + "\n").encode())
    write_atomically(out / "report.html", render_page(document).encode())
    return document, answers


def example_prompts() -> dict[str, Prompt]:
    """What a reader sees -> what the model gets: one of each domain, which no training has seen."""
    texts = (load_prompts("toxic", "eval")[0], gender_prompts.evaluation_prompts(None)[0].text)
    request = load_prompts("harm_requests", "eval")[0]
    return {**{f"{text} ...": text for text in texts}, f"{request}!": chat(request)}


def two_answers(model: Path, patches: Sequence[Path], prompts: Mapping[str, Prompt]) -> list[Answers]:
    """The same prompts with the same random numbers, without the patches and with them."""
    replies = []
    for acting in (None, list(patches)):
        with load_runtime(model, acting) as session:
            replies.append([session.generate(prompt, REPLY) for prompt in prompts.values()])
    return [Answers(*row) for row in zip(prompts, *replies, strict=True)]
