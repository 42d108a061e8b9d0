"""The toxicity domain: what may be trained on, other text in front, and the measure."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench import datasets
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.metrics import expected_max_toxicity
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.toxicity import (
    FRONT_TOKENS,
    ToxicityDomain,
    behind,
    continuation_perplexity,
    distinct,
    fronts,
    put_behind,
)
from edgepatch.errors import InputError
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.prompts.sets import load_benign_text, load_prompts
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.preferences import PairConfig

SMALL = SampleConfig(samples_per_prompt=3, max_new_tokens=6)
DATA = Path(os.environ["EDGEPATCH_DATA"]) if os.environ.get("EDGEPATCH_DATA") else None


@pytest.fixture(scope="module")
def runtime(tiny_folder: Path):
    with load_runtime(tiny_folder, None) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def domain() -> ToxicityDomain:
    return ToxicityDomain(config=SMALL)


def test_passages_have_the_drawn_lengths_and_one_kind_each(runtime: Session):
    kinds = (["calm words about rivers and lakes"], ["ANGRY WORDS ABOUT PEOPLE"])
    passages = fronts(kinds, runtime.encode, np.random.default_rng(2))
    texts = [next(passages) for _ in range(40)]
    assert all(text == text.lower() for text in texts[::2])
    assert all(text == text.upper() for text in texts[1::2])
    lengths = [len(runtime.encode(text)) for text in texts]
    assert FRONT_TOKENS[0] * 0.7 <= min(lengths) < 50
    assert 110 < max(lengths) <= FRONT_TOKENS[1] * 1.1
    again = fronts(kinds, runtime.encode, np.random.default_rng(2))
    assert texts == [next(again) for _ in range(40)]


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_share_of_the_prompts_stands_behind_a_passage(share: float):
    prompts = [f"prompt {i}" for i in range(40)]
    changed = put_behind(prompts, share, iter(["front"] * 40), np.random.default_rng(1))
    assert sum(new == f"front\n{old}" for new, old in zip(changed, prompts, strict=True)) == 40 * share
    assert sum(new == old for new, old in zip(changed, prompts, strict=True)) == 40 * (1 - share)


def test_own_training_texts_hold_nothing_that_is_evaluated(runtime: Session, domain: ToxicityDomain):
    evaluated = load_prompts("toxic", "eval") + load_prompts("benign", "eval") + load_benign_text("eval")
    trained = "\n".join([*domain.training_prompts(runtime.encode), *domain.benign_texts()])
    assert not [text for text in evaluated if text in trained]
    assert len(domain.training_prompts(runtime.encode)) == len(load_prompts("toxic", "train"))
    assert domain.evaluation_prompts() == load_prompts("toxic", "eval")


@pytest.mark.skipif(DATA is None, reason="needs the data sets, see bench/data.md")
def test_training_texts_from_data_hold_nothing_that_is_evaluated(runtime: Session):
    domain = ToxicityDomain(DATA, num_training_prompts=120)
    evaluated = set(domain.evaluation_prompts()) | {c.prompt for c in datasets.rtp_nontoxic(DATA)}
    prompts = domain.training_prompts(runtime.encode)
    assert len(domain.evaluation_prompts()) == 496
    assert len(prompts) == 120
    assert not evaluated & set(domain.short_prompts())
    shipped = set(
        load_benign_text("train") + load_prompts("toxic", "train")
    )  # the text of the attacks in bench/safety/unpatching.py
    assert not shipped & set().union(*domain.front_texts())


def test_benign_texts_are_partly_long(runtime: Session, domain: ToxicityDomain):
    lengths = [len(text.split()) for text in domain.benign_texts()]
    assert sum(length >= 110 for length in lengths) >= 5
    assert min(lengths) < 12


def test_pairs_come_from_the_prompts_that_were_sampled():
    domain = ToxicityDomain(
        front_share=0.5, num_training_prompts=8, pairs=PairConfig(samples_per_prompt=6, pairs_per_prompt=1)
    )
    seen = []
    with load_runtime(LAB_FOLDER / "base", None) as base, load_runtime(LAB_FOLDER / "reference", None) as reference:
        pairs = domain.training_pairs(base, reference, progress=lambda *step, **_: seen.append(step))
        prompts = domain.training_prompts(base.encode)
    fronted = set(prompts) - set(domain.short_prompts())
    assert len(fronted) == 4
    assert {pair.prompt for pair in pairs} <= set(prompts)
    assert any(pair.prompt in fronted for pair in pairs)
    assert all(pair.chosen_score <= 0.2 and pair.rejected_score >= pair.chosen_score + 0.4 for pair in pairs)
    assert seen[-1] == ("pairs", 8, 8)


def test_distinct_counts_ngrams_over_words():
    assert distinct(["a b a", "a b c d"], 1) == pytest.approx(4 / 7)
    assert distinct(["a b a", "a b c d"], 2) == pytest.approx(4 / 7)  # ab ba bc cd
    assert distinct(["", "  "], 1) == 0


def test_perplexity_of_continuations_is_the_oracles(runtime: Session, oracle):
    prompt, texts = "The quick brown fox", [" jumps over the dog", " sleeps", ""]
    losses = []
    for text in texts[:2]:
        start, ids = runtime.tokens(prompt), runtime.tokens(prompt + text)
        logits = oracle(ids, None).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-logs[i - 1, ids[i]] for i in range(len(start), len(ids))]
    assert continuation_perplexity(runtime, prompt, texts) == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert continuation_perplexity(runtime, prompt, [""]) is None


def test_values_are_the_worst_of_each_prompts_samples(runtime: Session, domain: ToxicityDomain):
    outcome = domain.evaluate(runtime, num_items=4, fluency_judge=runtime)
    assert outcome.items == [load_prompts("toxic", "eval")[i * 85 // 4] for i in range(4)]
    assert [len(row) for row in outcome.texts] == [3] * 4
    scores = np.array([ToxicityScorer.load("report").score(row) for row in outcome.texts])
    np.testing.assert_allclose(outcome.values, scores.max(axis=1))
    assert outcome.score == pytest.approx(expected_max_toxicity(scores).value)
    assert outcome.failures == 0
    assert set(outcome.figures) == {
        "expected_max_toxicity",
        "toxicity_probability",
        "mean_toxicity",
        "dist_1",
        "dist_2",
        "dist_3",
        "words_per_sample",
        "perplexity_median",
        "perplexity_mean",
    }
    assert all(figure.low <= figure.value <= figure.high for figure in outcome.figures.values())
    assert outcome.figures["mean_toxicity"].value == pytest.approx(scores.mean())
    assert domain.evaluate(runtime, num_items=4).texts == outcome.texts
    assert domain.evaluate(runtime, num_items=4, rng_seed=50).texts != outcome.texts


def test_an_instruction_stands_in_front(runtime: Session, domain: ToxicityDomain):
    outcome = domain.evaluate(runtime, num_items=1, instruction="Be kind.")
    assert list(outcome.texts[0]) == runtime.generate_many(
        behind("Be kind.", outcome.items[0]), SMALL.of_prompt(outcome.items[0]), 3
    )


def test_a_prompt_that_fails_counts_as_toxic(runtime: Session, domain: ToxicityDomain):
    items = domain.evaluate(runtime, num_items=6).items
    lengths = sorted(len(runtime.tokens(behind("a", item))) for item in items)
    filler = "a" + " a" * (runtime.context_length - lengths[2] - len(runtime.encode(" a")) + 2)
    fitting = [len(runtime.tokens(behind(filler, item))) <= runtime.context_length for item in items]
    assert 0 < sum(fitting) < 6
    outcome = domain.evaluate(runtime, num_items=6, instruction=filler)
    assert outcome.failures == 6 - sum(fitting)
    assert [bool(row) for row in outcome.texts] == fitting
    assert all(value == 1 for value, fits in zip(outcome.values, fitting, strict=True) if not fits)


def test_the_control_asks_harmless_prompts(runtime: Session, domain: ToxicityDomain):
    outcome = domain.control(runtime, num_items=2)
    assert set(outcome.items) <= set(load_prompts("benign", "eval"))


def test_a_share_is_checked():
    with pytest.raises(InputError, match="front_share"):
        ToxicityDomain(front_share=1.5)


def test_judges_are_named_and_stay_apart():
    with pytest.raises(InputError, match="must not report"):
        ToxicityDomain(judge="filter")
    with pytest.raises(InputError, match="no judge nobody"):
        ToxicityDomain(judge="nobody")


def test_the_semantic_judge_scores_by_name(minilm):
    assert ToxicityDomain(judge="semantic").judge.name == "semantic-toxicity-report"
