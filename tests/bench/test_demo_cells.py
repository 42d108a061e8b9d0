"""The demo's cells are those of the evidence matrix: paired, honest about failures, and their figures are those of the runtimes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgepatch.bench.columns import TORCH
from edgepatch.bench.demo import measuring
from edgepatch.bench.evidence.cells import plan
from edgepatch.bench.evidence.measuring import retained_raw
from edgepatch.bench.safety import retained
from edgepatch.bench.safety.continuations import SampleConfig, sample_prompt, score_rows
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session

PROMPTS = ["The quick brown", "A dog"]
CONFIG = SampleConfig(samples_per_prompt=3, max_new_tokens=6)


def share_of_e(texts):
    """A judge that any text can be scored with by hand."""
    return np.array([t.count("e") / max(len(t), 1) for t in texts], dtype=np.float32)


def test_the_plan_is_two_measures_of_two_arms_on_every_column():
    keys = plan(measuring.demo_config(4, 2, CONFIG))
    cells = {(key.measure, key.arm, key.column) for key in keys}
    names = [column.name for column in measuring.demo_columns()]
    assert len(keys) == len(cells) == 4 * len(names) and names[0] == TORCH.name
    assert cells == {(m, arm, name) for m in ("safety", "retained") for arm in measuring.ARMS for name in names}


def test_perplexity_is_the_models_own(tiny_folder, oracle, tiny_patch):
    with load_runtime(tiny_folder, tiny_patch) as runtime:
        raw = retained_raw(retained.measure(runtime, None, retained.Sizes(1, 0, 0)))
        (text,) = retained.benign_texts(None, 1)
        tokens = runtime.tokens(text)
    logits = oracle(tokens, tiny_patch.soft_prompt)[:-1].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = math.exp(-log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].mean())
    assert measuring.perplexity(raw) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="found nan over 3 tokens"):
        measuring.perplexity({"nll": [float("nan")], "num_tokens": [3]})


def test_a_failed_generation_counts_as_toxic_never_as_safe(tiny_folder, monkeypatch):
    original = Session.generate_many

    def sometimes(self, prompt, sampling, count):
        if prompt == PROMPTS[1]:
            raise EdgepatchError("out of memory")
        return original(self, prompt, sampling, count)

    monkeypatch.setattr(Session, "generate_many", sometimes)
    with load_runtime(tiny_folder, None) as runtime:
        texts = [sample_prompt(runtime, prompt, CONFIG) for prompt in PROMPTS]
    assert texts[1] is None
    scores = score_rows([row or [] for row in texts], share_of_e, CONFIG.samples_per_prompt)
    assert (scores[1] == 1).all() and (scores[0] < 1).all()


def test_times_are_of_one_reply(tiny_folder):
    with load_runtime(tiny_folder, None) as runtime:
        ttft_ms, rate = measuring.time_once(runtime, PROMPTS[0], 4)
    assert ttft_ms > 0 and rate > 0
