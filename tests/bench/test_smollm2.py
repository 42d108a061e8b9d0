"""``bench smollm2``: each patch in its own domain, all together in every domain, a verdict for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepatch.bench.columns import TORCH, Column
from edgepatch.bench.evidence.cells import EvidenceConfig
from edgepatch.bench.evidence.questions import Amounts, Question, Scope, plan_model
from edgepatch.bench.smollm2 import matrix
from edgepatch.bench.smollm2.shipped import newest_patches
from edgepatch.errors import InputError
from edgepatch.patch.file import read_patch

FORMS = (Column("llamacpp Q4_1", "llamacpp", "Q4_1", "a.gguf", "f16"), TORCH)


def question() -> Question:
    patches = {"detox": Path("detox.safetensors"), "fairness": Path("fairness.safetensors")}
    return matrix.question_of(Path("model.gguf"), patches, ("torch",), Amounts(), 1, 1)


def test_an_arm_is_measured_in_its_domain_and_on_its_forms_alone():
    asked = question()
    config = EvidenceConfig(known_columns=FORMS, domains=asked.domains, arms=("bare", "patch"), composition=False)
    keys = plan_model(config, list(asked.arms), ["toxic-128"], asked.scopes | {"safe_prompt": Scope(num_forms=1)})
    measured = {(key.arm, key.domain, key.column) for key in keys if key.measure == "safety"}
    assert {domain for arm, domain, _ in measured if arm == "fairness"} == {"gender"}
    assert {domain for arm, domain, _ in measured if arm == "patch"} == {"toxicity", "gender"}
    assert {column for arm, _, column in measured if arm == "safe_prompt"} == {FORMS[0].name}
    assert {column for arm, _, column in measured if arm == "detox"} == {form.name for form in FORMS}
    assert {key.arm for key in keys if key.front} == {"bare", "safe_prompt", "patch", "detox"} - {"safe_prompt"}
    assert {key.domain for key in keys if key.measure == "margins" and key.arm == "fairness"} == {"gender"}


def test_each_patch_has_a_verdict_of_its_own():
    def row(arm: str, domain: str, gain: float) -> dict:
        ends = {"gain_low": gain - 0.1, "gain_high": gain + 0.1} if arm != "bare" else {}
        kept = {"perplexity_change": 0.0, "over_refusal_change": 0.0, "margin_retention": None, "retention": 1.0}
        score = {"score": 0.5 - gain, "gain": gain if arm != "bare" else None, "emt5": None}
        return {"domain": domain, "arm": arm, "column": "torch F32", "failed": [], **score, **ends, **kept}

    rows = [
        row("bare", "toxicity", 0.0),
        row("bare", "gender", 0.0),
        row("patch", "toxicity", 0.3),
        row("patch", "gender", 0.0),
        row("detox", "toxicity", 0.3),
        row("fairness", "gender", 0.0),
    ]
    document = {"cells": rows, "fronted": [], "reference": "torch F32", "verdict": {"holds": False}}
    judged = matrix.verdicts(document, ["detox", "fairness"])
    assert {arm: verdict["holds"] for arm, verdict in judged.items()} == {
        "patch": False,
        "detox": True,
        "fairness": False,
    }


def test_the_shipped_patches_are_taken_in_their_newest_version(tmp_path):
    for name in ("detox-0.9.0", "detox-0.10.0", "harm-0.1.0", "other-0.1.0"):
        (tmp_path / f"smollm2-{name}.safetensors").touch()
    assert {name: path.stem for name, path in newest_patches(tmp_path).items()} == {
        "detox": "smollm2-detox-0.10.0",
        "harm": "smollm2-harm-0.1.0",
    }
    with pytest.raises(InputError, match="no patch"):
        newest_patches(tmp_path / "empty")
    for name, path in newest_patches().items():
        assert read_patch(path).name == f"smollm2-{name}"
