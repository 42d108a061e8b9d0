"""Sampling: the rule by hand, the distribution, and the pairing of random numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.decoding.sampling import Sampling, TokenSampler, draw_token, draw_tokens
from edgepatch.errors import EdgepatchError, InputError


def plain_draw(logits, sampling, uniform):
    """The rule in its plainest form: sort all, cut to top-k, cut to top-p, invert."""
    probabilities = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    order = np.argsort(-probabilities, kind="stable")[: sampling.top_k or None]
    cumulative = np.cumsum(probabilities[order])
    mass = cumulative[-1] if sampling.top_k else probabilities.sum()
    kept = min(int((cumulative < sampling.top_p * mass).sum()) + 1, len(order))
    return order[int((cumulative[: kept - 1] <= uniform * cumulative[kept - 1]).sum())]


@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.05, 0), (1.0, 1), (1.0, 40), (0.5, 400), (0.9, 9999)]
)
def test_draws_follow_the_rule(spread, top_p, top_k):
    rng = np.random.default_rng(5)
    sampling = Sampling(top_p=top_p, top_k=top_k, temperature=0.7)
    for round_number in range(40):
        logits = (rng.standard_normal(1000) * spread).astype(np.float32)
        uniform = np.random.default_rng(round_number).random()
        drawn = draw_token(logits, sampling, np.random.default_rng(round_number))
        if spread:
            assert drawn == plain_draw(logits, sampling, uniform)
        assert 0 <= drawn < 1000


def test_frequencies_are_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    rng = np.random.default_rng(1)
    counts = np.bincount([draw_token(logits, Sampling(), rng) for _ in range(20000)], minlength=4) / 20000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.012
    nucleus = {draw_token(logits, Sampling(top_p=0.75), rng) for _ in range(500)}
    assert nucleus == {0, 1}


def test_greedy_takes_the_best_and_still_advances_the_generator():
    logits = np.array([0, 3, 1], dtype=np.float32)
    one, two = np.random.default_rng(1), np.random.default_rng(1)
    assert draw_token(logits, Sampling(temperature=0), one) == 1
    two.random()
    assert one.random() == two.random()


def test_nan_logits_are_an_error_not_a_token():
    with pytest.raises(EdgepatchError, match="NaN"):
        draw_token(np.array([0, np.nan], dtype=np.float32), Sampling(), np.random.default_rng(1))


@pytest.mark.parametrize(
    "wrong", [{"top_p": 0}, {"top_p": 1.1}, {"temperature": -1}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_quick_draw_of_the_whole_vocabulary_is_the_slow_one(temperature):
    """Where the likeliest tokens alone decide, nothing else is sorted; ties are where that could go wrong."""
    for round_number in range(150):
        rng = np.random.default_rng(round_number)
        logits = np.round(rng.standard_normal(3000) * 6).astype(np.float32)
        drawn = draw_token(logits, Sampling(temperature=temperature), np.random.default_rng(round_number))
        assert drawn == plain_draw(
            logits, Sampling(temperature=temperature), np.random.default_rng(round_number).random()
        )


SETTINGS = [
    {"top_p": 0.9},
    {},
    {"temperature": 0},
    {"top_k": 40},
    {"top_k": 1500, "temperature": 0.7},
    {"min_p": 0.01, "top_p": 0.95},
    {"temperature": 3.0},
]


@pytest.mark.parametrize("vocab_size", [50, 3000, 70000])
def test_rows_drawn_together_are_those_drawn_alone(vocab_size):
    rng = np.random.default_rng(vocab_size)
    samplings = [Sampling(**SETTINGS[i % len(SETTINGS)]) for i in range(25)]
    for spread in (1, 6):
        rows = list((rng.standard_normal((25, vocab_size)) * spread).astype(np.float32))
        rows[3], rows[4] = np.round(rows[3]), rows[4].astype(np.float64)
        tokens = draw_tokens(rows, samplings, [np.random.default_rng(i) for i in range(25)])
        assert tokens == [
            draw_token(row, s, np.random.default_rng(i)) for i, (row, s) in enumerate(zip(rows, samplings, strict=True))
        ]
        plain = [i for i, s in enumerate(samplings) if s.temperature and not s.min_p]
        assert [tokens[i] for i in plain] == [
            plain_draw(rows[i], samplings[i], np.random.default_rng(i).random()) for i in plain
        ]


def draws(logits, sampling, prompt=(), count=1, matcher=None):
    sampler = TokenSampler(sampling, prompt, len(logits), matcher)
    return [sampler.draw(logits) for _ in range(count)]


def test_without_options_a_sampler_is_draw_token():
    logits = np.random.default_rng(3).standard_normal(400).astype(np.float32)
    sampling, rng = Sampling(top_p=0.9, rng_seed=8), np.random.default_rng(8)
    assert [d.token_id for d in draws(logits, sampling, count=50)] == [
        draw_token(logits, sampling, rng) for _ in range(50)
    ]
    zero = Sampling(top_p=0.9, rng_seed=8, logit_bias={5: 0.0})  # goes the other way, to the same place
    assert draws(logits, zero, count=50) == draws(logits, sampling, count=50)


def test_min_p_keeps_what_is_likely_enough():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    rng = np.random.default_rng(1)
    kept = {draw_token(logits, Sampling(min_p=0.25), rng) for _ in range(800)}
    assert kept == {0, 1, 2}
    assert {draw_token(logits, Sampling(min_p=0.25, top_k=2), rng) for _ in range(400)} == {0, 1}
    # What min-p leaves is the whole of which top-p keeps a part: 0.5 of 0.95, not of 1.
    assert {draw_token(logits, Sampling(min_p=0.25, top_p=0.52), rng) for _ in range(400)} == {0}


def test_bias_moves_and_bans():
    logits = np.array([1.0, 0.0, -1.0], dtype=np.float32)
    greedy = Sampling(temperature=0)
    assert draws(logits, replace(greedy, logit_bias={2: 2.5}))[0].token_id == 2
    assert draws(logits, replace(greedy, logit_bias={0: -math.inf}))[0].token_id == 1
    banned = Sampling(rng_seed=1, temperature=100, logit_bias={0: -math.inf, 2: -math.inf})
    assert {d.token_id for d in draws(logits, banned, count=300)} == {1}
    assert logits.tolist() == [1.0, 0.0, -1.0], "the model's own logits are left alone"


def test_a_whole_vocabulary_banned_is_an_error():
    logits = np.zeros(5, dtype=np.float32)
    with pytest.raises(InputError, match="no token is left"):
        draws(logits, Sampling(logit_bias=dict.fromkeys(range(5), -math.inf)))
    draws(logits, Sampling(logit_bias=dict.fromkeys(range(5), -100)))
    with pytest.raises(InputError, match="token id 5 is outside"):
        draws(logits, Sampling(logit_bias={5: 1}))


def test_penalties_by_hand():
    logits = np.array([2.0, 1.5, 1.4, -1.0], dtype=np.float32)
    greedy = Sampling(temperature=0)

    def ids(prompt=(), count=1, **options):
        return [d.token_id for d in draws(logits, replace(greedy, **options), prompt, count)]

    assert ids(prompt=[0], repetition_penalty=1.4) == [1], "2 / 1.4 < 1.5"
    assert ids(prompt=[1], repetition_penalty=0.01) == [1], "a logit as large as it can be, but finite"
    assert ids(prompt=[0], presence_penalty=2, frequency_penalty=2) == [0], "the prompt is not the reply"
    assert ids(count=3, repetition_penalty=1.4) == [0, 1, 0], "1.43, 1.5, 1.4; then 1.43, 1.07, 1.4"
    assert ids(count=3, presence_penalty=0.55) == [0, 1, 0], "1.45, 1.5, 1.4; then 1.45, 0.95, 1.4"
    assert ids(count=4, frequency_penalty=0.55) == [0, 1, 0, 2], "the second 0 costs twice"
    sampler = TokenSampler(replace(greedy, repetition_penalty=3.0), [3], 4)
    assert sampler._adjust(logits).tolist() == pytest.approx([2.0, 1.5, 1.4, -3.0], rel=1e-6)


def test_logprobs_are_the_models_own():
    logits = np.random.default_rng(2).standard_normal(300).astype(np.float32) * 4
    sampling = Sampling(rng_seed=4, temperature=0.5, top_k=3, logit_bias={int(logits.argmax()): -100}, num_logprobs=5)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    for draw in draws(logits, sampling, count=20):
        assert draw.logprob == pytest.approx(expected[draw.token_id], abs=1e-6)
        assert [i for i, _ in draw.top_logprobs] == np.argsort(-logits)[:5].tolist()
        assert [p for _, p in draw.top_logprobs] == pytest.approx(np.sort(expected)[::-1][:5].tolist(), abs=1e-6)
    alone = draws(logits, replace(sampling, num_logprobs=0))[0]
    assert alone.logprob is not None and alone.top_logprobs == ()
    plain = draws(logits, replace(sampling, num_logprobs=None))[0]
    assert (plain.logprob, plain.top_logprobs) == (None, ())
    assert len(draws(logits[:3], Sampling(num_logprobs=20))[0].top_logprobs) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"presence_penalty": 1.0}, {"temperature": 0}])
def test_damaged_logits_are_an_error_with_every_option(value, options):
    with pytest.raises(EdgepatchError, match="logits"):
        draws(np.array([0, value, 1], dtype=np.float32), Sampling(**options))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1.5),
        ("max_new_tokens", None),
        ("temperature", "hot"),
        ("temperature", math.nan),
        ("top_p", True),
        ("top_k", 2.0),
        ("rng_seed", -1),
        ("rng_seed", "1"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {"1": 1}),
        ("logit_bias", [1]),
        ("stop", "x"),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop", ("x" * 1000,)),
        ("num_logprobs", -1),
        ("num_logprobs", 21),
        ("constraint", "json"),
        ("ignore_end_tokens", 1),
    ],
)
def test_every_setting_is_checked_and_named(name, value):
    with pytest.raises(InputError, match=name):
        Sampling(**{name: value})


def test_settings_from_names():
    assert Sampling.from_dict({"top_k": 3, "stop": ["x"]}) == Sampling(top_k=3, stop=("x",))
    with pytest.raises(InputError, match="unknown: top_q"):
        Sampling.from_dict({"top_q": 3})
    assert hash(Sampling(logit_bias={1: 2.0})) == hash(Sampling(logit_bias={1: 2.0}))


def test_parameters_have_floors():
    """Next to nothing is no setting: a penalty that only overflows is refused, and a temperature under which one token is left is 0."""
    for penalty in (5e-324, 1e-9, 0.009):
        with pytest.raises(InputError, match="repetition_penalty"):
            Sampling(repetition_penalty=penalty)
    assert Sampling(temperature=5e-324).temperature == Sampling(temperature=1e-7).temperature == 0
    logits = np.array([1.0, 3.0e38, -3.0e38, 2.0], np.float32)
    sampling = Sampling(repetition_penalty=0.01, presence_penalty=-2, frequency_penalty=-2, rng_seed=1)
    sampler = TokenSampler(sampling, [0, 1, 2, 3], 4)
    assert all(0 <= sampler.draw(logits).token_id < 4 for _ in range(5))
