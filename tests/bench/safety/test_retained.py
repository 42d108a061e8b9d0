"""Everything else must stay: losses against Transformers, minimal pairs, flips, over-refusal."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.metrics import wilson_interval
from edgepatch.bench.safety import retained
from edgepatch.bench.safety.retained import Retained, Sizes
from edgepatch.errors import InputError
from edgepatch.patch.file import Patch
from edgepatch.prompts.sets import load_benign_text, load_minimal_pairs
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session

TEXTS_ONLY = Sizes(num_texts=3, num_minimal_pairs=0, num_requests=0)
PAIRS = [
    ("The dog sleeps in the sun.", "The dog sleep in the sun."),
    ("They verify it.", "They verifies it."),
    ("A b.", "B a."),
]


@pytest.fixture(scope="module")
def runtime(tiny_folder: Path):
    with load_runtime(tiny_folder, None) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with two paradigms of minimal pairs and five paragraphs."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "general").mkdir()
    paragraphs = ["the quick brown fox jumps over the lazy dog and then it sleeps " * n for n in range(1, 9)]
    (folder / "general/wikitext2_test.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in PAIRS]
    with zipfile.ZipFile(folder / "general/BLiMP.zip", "w") as archive:
        for name in ("agreement", "order"):
            archive.writestr(f"data/{name}.jsonl", "\n".join(lines))
    return folder


def sums(oracle, ids: list[int], first: int, patch: Patch | None = None) -> float:
    """Negative log-likelihood of the tokens from ``first`` on, by Transformers alone."""
    logits = oracle(ids, patch.soft_prompt if patch else None).astype(np.float64)
    logs = logits - logits.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    return float(-sum(logs[i - 1, ids[i]] for i in range(first, len(ids))))


def test_losses_are_those_of_transformers(runtime: Session, tiny_folder: Path, tiny_patch: Patch, oracle):
    bare = retained.measure(runtime, None, TEXTS_ONLY)
    with load_runtime(tiny_folder, tiny_patch) as loaded:
        patched = retained.measure(loaded, None, TEXTS_ONLY)
    ids = [runtime.tokens(text) for text in bare.texts]
    assert set(bare.texts) < set(load_benign_text("eval"))
    assert bare.num_tokens.tolist() == patched.num_tokens.tolist() == [len(row) - 1 for row in ids]
    np.testing.assert_allclose(bare.nll, [sums(oracle, row, 1) for row in ids], rtol=1e-5)
    np.testing.assert_allclose(patched.nll, [sums(oracle, row, 1, tiny_patch) for row in ids], rtol=1e-5)
    ratio = retained.perplexity_ratio(patched, bare)
    assert ratio.value == pytest.approx(retained.perplexity(patched).value / retained.perplexity(bare).value)
    assert ratio.low <= ratio.value <= ratio.high
    assert retained.perplexity_ratio(bare, bare) == (1, 1, 1)


def test_an_instruction_is_a_condition_and_not_scored(runtime: Session, oracle):
    bare, instructed = (retained.measure(runtime, None, TEXTS_ONLY, instruction) for instruction in ("", "Be kind."))
    assert instructed.num_tokens.tolist() == bare.num_tokens.tolist()
    front = runtime.tokens("Be kind.\n")
    ids = [front + runtime.tokens(text)[1:] for text in instructed.texts]
    np.testing.assert_allclose(instructed.nll, [sums(oracle, row, len(front)) for row in ids], rtol=1e-5)
    assert not np.allclose(instructed.nll, bare.nll, rtol=1e-4)


def test_minimal_pairs_compare_whole_sentences(runtime: Session, data: Path, oracle):
    measured = retained.measure(runtime, data, Sizes(num_texts=2, num_minimal_pairs=2, num_requests=0))
    assert list(measured.minimal_pairs) == PAIRS[:2] * 2
    losses = [[sums(oracle, runtime.tokens(sentence), 1) for sentence in pair] for pair in measured.minimal_pairs]
    assert measured.correct.tolist() == [good < bad for good, bad in losses]
    mirrored = [(bad, good) for good, bad in PAIRS[:2] * 2]
    assert [retained._is_first_likelier(runtime, pair, "") for pair in mirrored] == [
        not right for right in measured.correct
    ]
    assert all(60 <= len(text.split()) <= 160 for text in measured.texts)
    assert measured.over_refusal is None


def test_without_data_minimal_pairs_and_requests_are_our_own(runtime: Session):
    measured = retained.measure(runtime, None, Sizes(num_texts=1, num_minimal_pairs=1, num_requests=2))
    own = load_minimal_pairs()
    assert list(measured.minimal_pairs) == [pairs[0] for pairs in own.values()]
    assert measured.correct.shape == (len(own),) and len(own) == 10
    assert measured.over_refusal is not None
    assert measured.over_refusal.values.shape == (2,)
    assert retained.over_refusal_change(measured, measured) == (0, 0, 0)
    with pytest.raises(InputError, match="not measured"):
        retained.over_refusal_change(measured, replace(measured, over_refusal=None))


def test_flips_are_counted_item_by_item():
    before = np.array([True, True, True, False, False, True, False, False])
    after = np.array([True, False, True, True, False, True, True, True])
    assert retained.negative_flips(before, after) == (1 / 8, *wilson_interval(1, 8))
    assert retained.positive_flips(before, after) == (3 / 8, *wilson_interval(3, 8))
    assert retained.negative_flips(before, before).value == 0
    with pytest.raises(InputError, match="8 and 7"):
        retained.negative_flips(before, after[1:])


def test_ratios_need_the_same_texts():
    def of(nll: list[float], tokens: list[int]) -> Retained:
        return Retained(["t"] * len(nll), np.array(nll), np.array(tokens), (), np.array([], dtype=np.bool_), None)

    one = of([10.0, 20.0], [5, 10])
    assert retained.perplexity(one).value == pytest.approx(np.exp(2))
    assert retained.perplexity_ratio(of([11.0, 22.0], [5, 10]), one).value == pytest.approx(np.exp(0.2))
    with pytest.raises(InputError, match="same texts"):
        retained.perplexity_ratio(of([10.0, 20.0], [5, 11]), one)
