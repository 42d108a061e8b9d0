"""Sampling: the rule by hand, the distribution, and the pairing of random numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.decoding.noise import Noise, exponentials
from edgepatch.decoding.sampling import Sampling, TokenSampler, draw_token, draw_tokens
from edgepatch.errors import EdgepatchError, InputError


def plain_number(key, token):
    """The exponential number of a token, in whole numbers of Python: SplitMix64 as its authors print it."""
    word = (key + token * 0x9E3779B97F4A7C15) % 2**64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return -math.log((((word ^ (word >> 31)) >> 11) + 0.5) / 2**53)


def plain_draw(logits, sampling, key):
    """The rule in its plainest form: sort all, cut to top-k, cut to top-p, add Gumbel numbers, take the largest."""
    probabilities = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    order = np.argsort(-probabilities, kind="stable")[: sampling.top_k or None]
    cumulative = np.cumsum(probabilities[order])
    mass = cumulative[-1] if sampling.top_k else probabilities.sum()
    kept = min(int((cumulative < sampling.top_p * mass).sum()) + 1, len(order))
    return max(order[:kept], key=lambda i: math.log(probabilities[i]) - math.log(plain_number(key, int(i))))


@pytest.mark.parametrize("spread", [0.0, 0.5, 5.0])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.05, 0), (1.0, 1), (1.0, 40), (0.5, 400), (0.9, 9999)]
)
def test_draws_follow_the_rule(spread, top_p, top_k):
    rng = np.random.default_rng(5)
    sampling = Sampling(top_p=top_p, top_k=top_k, temperature=0.7)
    for round_number in range(20):
        logits = (rng.standard_normal(1000) * spread).astype(np.float32)
        key = Noise(round_number).key(round_number % 3)
        assert draw_token(logits, sampling, key) == plain_draw(logits, sampling, key)


def test_frequencies_are_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    noise = Noise(1)
    counts = np.bincount([draw_token(logits, Sampling(), noise.key(i)) for i in range(20000)], minlength=4) / 20000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.012
    nucleus = {draw_token(logits, Sampling(top_p=0.75), noise.key(i)) for i in range(500)}
    assert nucleus == {0, 1}


def test_numbers_of_neighbours_are_unrelated():
    """Seeds, steps and ids are small and close to each other; what is made of them must not be."""
    ids = np.arange(64)
    keys = [Noise(seed).key(step) for seed in (0, 1, 2, 2**64, 2**64 + 1) for step in range(40)]
    assert len(set(keys)) == len(keys)
    numbers = np.stack(exponentials(keys, [ids] * len(keys))).reshape(5, 40, 64)
    assert abs(numbers.mean() - 1) < 0.03
    assert abs(numbers.var() - 1) < 0.08
    for axis in range(3):
        one, other = np.delete(numbers, 0, axis).ravel(), np.delete(numbers, -1, axis).ravel()
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.04


def test_logits_that_differ_by_little_give_the_same_token():
    """As those of one model do behind a prompt that is in the cache or not, alone or beside others."""
    rng = np.random.default_rng(2)
    sampling, differing = Sampling(), 0
    for step in range(300):
        logits = (rng.standard_normal(4096) * 2).astype(np.float32)
        noisy = logits + (rng.standard_normal(4096) * 1e-3).astype(np.float32)
        key = Noise(7).key(step)
        differing += draw_token(logits, sampling, key) != draw_token(noisy, sampling, key)
    assert differing <= 3  # of 300; inverting the cumulative distribution gives about 22


def test_a_seed_repeats_and_every_step_has_numbers_of_its_own():
    logits = np.random.default_rng(3).standard_normal(400).astype(np.float32)
    one, two = (TokenSampler(Sampling(rng_seed=9), [], 400) for _ in range(2))
    ids = [one.draw(logits).token_id for _ in range(30)]
    assert ids == [two.draw(logits).token_id for _ in range(30)]
    assert len(set(ids)) > 10
    assert ids != [TokenSampler(Sampling(rng_seed=10), [], 400).draw(logits).token_id for _ in range(30)]
    assert draw_token(logits, Sampling(temperature=0), 5) == int(logits.argmax())


def test_nan_logits_are_an_error_not_a_token():
    with pytest.raises(EdgepatchError, match="NaN"):
        draw_token(np.array([0, np.nan], dtype=np.float32), Sampling(), 1)


@pytest.mark.parametrize(
    "wrong", [{"top_p": 0}, {"top_p": 1.1}, {"temperature": -1}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_ties_are_cut_where_the_slow_rule_cuts_them(top_p):
    """Of tokens that are equally likely, those of the lowest ids stay."""
    for round_number in range(60):
        rng = np.random.default_rng(round_number)
        logits = np.round(rng.standard_normal(1500) * 6).astype(np.float32)
        sampling = Sampling(temperature=4.0, top_p=top_p)
        assert draw_token(logits, sampling, round_number) == plain_draw(logits, sampling, round_number)


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
    keys = [Noise(i).key(i) for i in range(25)]
    for spread in (1, 6):
        rows = list((rng.standard_normal((25, vocab_size)) * spread).astype(np.float32))
        rows[3], rows[4] = np.round(rows[3]), rows[4].astype(np.float64)
        tokens = draw_tokens(rows, samplings, keys)
        assert tokens == [draw_token(*each) for each in zip(rows, samplings, keys, strict=True)]


def draws(logits, sampling, prompt=(), count=1, matcher=None):
    sampler = TokenSampler(sampling, prompt, len(logits), matcher)
    return [sampler.draw(logits) for _ in range(count)]


def test_without_options_a_sampler_is_draw_token():
    logits = np.random.default_rng(3).standard_normal(400).astype(np.float32)
    sampling, noise = Sampling(top_p=0.9, rng_seed=8), Noise(8)
    assert [d.token_id for d in draws(logits, sampling, count=50)] == [
        draw_token(logits, sampling, noise.key(step)) for step in range(50)
    ]
    zero = Sampling(top_p=0.9, rng_seed=8, logit_bias={5: 0.0})  # goes the other way, to the same place
    assert draws(logits, zero, count=50) == draws(logits, sampling, count=50)


def test_min_p_keeps_what_is_likely_enough():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))

    def kept(**settings):
        return {draw_token(logits, Sampling(min_p=0.25, **settings), Noise(1).key(i)) for i in range(800)}

    assert kept() == {0, 1, 2}
    assert kept(top_k=2) == {0, 1}
    # What min-p leaves is the whole of which top-p keeps a part: 0.5 of 0.95, not of 1.
    assert kept(top_p=0.52) == {0}


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
