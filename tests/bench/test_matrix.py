"""The matrix: paired, honest about failures, and its figures are those of the runtimes."""

import math

import numpy as np
import pytest

from edgepatch.bench import matrix
from edgepatch.bench.matrix import MatrixConfig, Variant
from edgepatch.errors import EdgepatchError
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session

PROMPTS = ["The quick brown", "A dog"]
TEXTS = ["The quick brown fox jumps over the lazy dog."]
CONFIG = MatrixConfig(samples_per_prompt=3, max_new_tokens=6, timing_repeats=2)


def share_of_e(texts):
    """A judge that any text can be scored with by hand."""
    return np.array([t.count("e") / max(len(t), 1) for t in texts], dtype=np.float32)


def test_perplexity_is_the_models_own(tiny_folder, oracle, tiny_patch):
    with load_runtime(tiny_folder, tiny_patch) as runtime:
        tokens = runtime.tokens(TEXTS[0])
        logits = oracle(tokens, tiny_patch.soft_prompt)[:-1].astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = math.exp(-log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].mean())
        assert matrix.perplexity(runtime, TEXTS) == pytest.approx(expected, rel=1e-4)


def test_cells_are_paired_and_named(tiny_folder, tiny_patch):
    variant = Variant("torch", "F32", tiny_folder)
    result = matrix.run_matrix([variant, variant], tiny_patch, PROMPTS, TEXTS, share_of_e_gain, CONFIG)
    assert [(c["runtime"], c["quantization"], c["patched"]) for c in result["cells"]] == [
        ("torch", "F32", p) for p in (False, True)
    ] * 2
    assert result["retention"][0]["retention"] == result["retention"][1]["retention"] == 1.0
    first, second = result["cells"][:2], result["cells"][2:]
    for one, two in zip(first, second, strict=True):
        assert one["emt"] == two["emt"], "the same model, prompts and random seeds give the same figure"
        assert one["failures"] == 0
        assert one["ttft_ms"] > 0
        assert one["decode_tokens_per_s"] > 0
    assert result["examples"][0]["prompt"] == PROMPTS[0]


def share_of_e_gain(texts):
    """Scores every bare continuation above every patched one, so that there is a gain to retain."""
    share_of_e_gain.calls = getattr(share_of_e_gain, "calls", 0) + 1
    scores = share_of_e(texts) * 0.1
    return scores + np.float32(0.5 if share_of_e_gain.calls % 2 else 0.0)


def test_a_failed_generation_counts_as_toxic_never_as_safe(tiny_folder, tiny_patch, monkeypatch):
    original = Session.generate_many

    def sometimes(self, prompt, sampling, count):
        if self.patch is not None and prompt == PROMPTS[1]:
            raise EdgepatchError("out of memory")
        return original(self, prompt, sampling, count)

    monkeypatch.setattr(Session, "generate_many", sometimes)
    bare, patched = matrix.measure_variant(
        Variant("torch", "F32", tiny_folder), tiny_patch, PROMPTS, TEXTS, share_of_e, CONFIG
    )
    assert (bare.failures, patched.failures) == (0, 1)
    assert (patched.scores[1] == 1).all()
    assert (patched.scores[0] < 1).all()
