"""``edgepatch bench smollm2``: the evidence on a model that people use. Every shipped patch on every form of SmolLM2, alone and together.

It is ``bench safety`` at other sizes: each patch is measured in the domain that it was made for, all of them side by side in every
domain, and the written safety text that people use without a patch in every domain of the model as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepatch.bench.evidence import own_model
from edgepatch.bench.evidence.questions import Amounts, Question, Scope
from edgepatch.bench.evidence.verdict import judge
from edgepatch.bench.safety.retained import Sizes
from edgepatch.bench.smollm2.shipped import DOMAIN_OF
from edgepatch.judges.semantic import SEMANTIC
from edgepatch.progress import Progress, silent

TYPES = ("torch", "Q8_0", "Q4_K_M", "onnx-int8", "F16", "Q6_K", "Q4_0", "Q3_K_M", "Q2_K", "onnx-fp32", "onnx-int4")
"""Behind the file as published; those first that claims rest on."""

NUM_TOGETHER = 5
"""Forms on which all patches are measured side by side."""

AMOUNTS = Amounts(24, 8, 24, Sizes(6, 1, 16), 8, (128, 512, 1500), 32)
"""What two cores measure in two hours; intervals are wide."""


def question_of(
    model: Path, patches: Mapping[str, Path], types: Sequence[str], amounts: Amounts, num_workers: int, num_threads: int
) -> Question:
    """What is measured.

    Args:
        model: SmolLM2's GGUF file.
        patches: short name -> file.
        types: further forms.
        amounts: how much of each.
        num_workers, num_threads: processes, and threads of each.
    """
    scopes = {name: Scope((DOMAIN_OF[name],)) for name in patches}
    together = {"patch": Scope(num_forms=NUM_TOGETHER), "safe_prompt": Scope(num_forms=1)}
    return Question(
        model,
        tuple(patches.values()),
        tuple(types),
        tuple(DOMAIN_OF[name] for name in patches),
        amounts,
        harm_judge=SEMANTIC,
        num_workers=num_workers,
        num_threads=num_threads,
        beside={name: (path,) for name, path in patches.items()},
        is_instructed=True,
        scopes=scopes | together,
    )


def run(
    question: Question, out: Path, data: Path | None, progress: Progress = silent, tell: Any = print
) -> dict[str, Any]:
    """Measures, and judges each patch in its own domain beside all of them together.

    Args:
        question: as ``question_of`` puts it.
        out: folder of forms and raw cells; what is there is not measured again.
        data: folder of the public data sets, or ``None``.
        progress: told of forms and cells.
        tell: gets what the user must know before the work.

    Returns:
        The document of ``bench safety``, and ``verdicts``: arm -> its verdict.

    Raises:
        InputError: something cannot be used, or nothing can be written.
    """
    document = own_model.run(question, out, data, progress, tell)
    return {**document, "verdicts": verdicts(document, list(question.beside))}


def verdicts(document: Mapping[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """Arm -> its verdict in the domains that it was measured in."""
    judged = {"patch": document["verdict"]}
    for arm in arms:
        rows, fronted = (_as_judged(document[name], arm) for name in ("cells", "fronted"))
        named = list(dict.fromkeys(row["domain"] for row in document["cells"] if row["arm"] == arm))
        judged[arm] = judge(rows, fronted, document["reference"], named)
    return judged


def _as_judged(rows: Sequence[Mapping[str, Any]], arm: str) -> list[dict[str, Any]]:
    """The rows of the bare model, and those of an arm in the place of the one that is judged."""
    return [{**row, "arm": {arm: "patch"}.get(row["arm"], "bare")} for row in rows if row["arm"] in ("bare", arm)]
