"""Many continuations at once: the texts, the seed and the bookkeeping are those of one after the other."""

from dataclasses import replace

import numpy as np
import pytest

from edgepatch.decoding.replies import Piece
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError
from edgepatch.runtimes import load_runtime
from kit import tiny_gguf

PROMPT = "The quick brown fox jumps over"
PROMPTS = ["Hello", PROMPT, PROMPT, "<b>Numbers</b> 1234 and something else", "a", PROMPT + " the", "Hello"]
DRAWN = Sampling(max_new_tokens=12, top_p=0.9, rng_seed=5)
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def f32_file(tiny_ggufs):
    return tiny_ggufs["F32"]


def load(path, patch, **options):
    """Full precision throughout, so that a batch of rows computes what a row alone does."""
    return load_runtime(path, patch, num_threads=1, kv_type="f32", flash_attention=False, **options)


@pytest.fixture(scope="module")
def runtime(f32_file, tiny_patch):
    with load(f32_file, tiny_patch, num_sequences=4, context_length=256) as loaded:
        yield loaded


@pytest.fixture
def sizes(runtime, monkeypatch):
    """The number of tokens of each call of llama.cpp."""
    counts, outputs = [], runtime.backend.context._outputs
    monkeypatch.setattr(
        runtime.backend.context,
        "_outputs",
        lambda batch, status: counts.append(batch.struct.n_tokens) or outputs(batch, status),
    )
    return counts


def one_by_one(runtime, prompts, samplings):
    return [runtime.generate(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"stop": ("e", "th")}, {"repetition_penalty": 1.3, "top_k": 20}, {"temperature": 0.0}]
)
def test_many_continuations_are_those_of_single_sampling(f32_file, tiny_patch, options, patched):
    sampling, patch = replace(DRAWN, **options), tiny_patch if patched else None
    with load(f32_file, patch) as single, load(f32_file, patch, num_sequences=4, context_length=256) as runtime:
        expected = one_by_one(single, [PROMPT] * 10, [replace(sampling, rng_seed=5 + i) for i in range(10)])
        assert len(set(expected)) > 1 or not sampling.temperature
        assert runtime.generate_many(PROMPT, sampling, 10) == expected
        assert single.generate_many(PROMPT, sampling, 10) == expected


@pytest.mark.parametrize("sampling", [DRAWN, GREEDY])
def test_different_prompts_share_a_batch(runtime, sampling):
    expected = one_by_one(runtime, PROMPTS, [sampling] * len(PROMPTS))
    assert runtime.generate_batch(PROMPTS, sampling) == expected
    assert runtime.generate_batch(PROMPTS[:2], sampling) == expected[:2]
    assert runtime.generate_batch([], sampling) == []


def test_a_prompt_is_evaluated_once_and_rows_together(runtime, sizes):
    num_tokens = len(runtime.tokens(PROMPT))
    runtime.reset()
    runtime.generate_many(PROMPT, replace(DRAWN, ignore_end_tokens=True), 8)
    assert sizes == [num_tokens] + [4] * 22


def test_a_row_that_ends_makes_room_for_the_next(runtime, sizes):
    """What ends early leaves no row empty: never fewer rows than sequences while prompts wait."""
    lengths = [len(list(runtime.stream(PROMPT, replace(DRAWN, rng_seed=5 + i, stop=("e",))))) for i in range(12)]
    sizes.clear()
    runtime.generate_many(PROMPT, replace(DRAWN, stop=("e",)), 12)
    assert len(set(lengths)) > 1 and len(sizes) <= (sum(lengths) - 12) / 4 + max(lengths) + 1


def test_the_full_context_is_filled_in_every_sequence(runtime):
    prompts = [[7 + i] * (runtime.context_length - 2) for i in range(5)]
    sampling = replace(GREEDY, ignore_end_tokens=True)
    assert runtime.generate_batch(prompts, sampling) == one_by_one(runtime, prompts, [sampling] * 5)
    assert [len(runtime.sequences.evaluated(s)) for s in range(4)] == [runtime.context_length] * 4


def test_the_seed_stays_in_every_sequence(runtime):
    fresh = runtime.logits(PROMPT)
    runtime.generate_many(PROMPT, DRAWN, 9)
    runtime.generate_batch(PROMPTS, GREEDY)
    for sequence in range(4):
        held = runtime.sequences.evaluated(sequence)
        assert runtime.backend.context.last_position(sequence) + 1 == runtime.backend.num_virtual_tokens + len(held)
        assert np.abs(runtime.logits_of_last([*held, 9], sequence) - runtime.logits([*held, 9])[-1]).max() < 1e-4
        assert np.abs(runtime.logits(PROMPT, sequence) - fresh).max() < 1e-4


@pytest.mark.parametrize("write", [tiny_gguf.write_gemma3, tiny_gguf.write_lfm2])
def test_sliding_windows_and_recurrent_layers(write, tmp_path):
    """Memory that cannot be cut, or that reaches back a few tokens only."""
    write(tmp_path / "model.gguf")
    with load(tmp_path / "model.gguf", None, num_sequences=3) as runtime:
        expected = one_by_one(runtime, [PROMPT] * 5, [replace(DRAWN, rng_seed=5 + i) for i in range(5)])
        assert runtime.generate_many(PROMPT, DRAWN, 5) == expected
        assert runtime.generate_batch(PROMPTS, DRAWN) == one_by_one(runtime, PROMPTS, [DRAWN] * len(PROMPTS))


def begun(runtime, count=3):
    return [runtime.begin(runtime.tokens(PROMPTS[i]), replace(DRAWN, max_new_tokens=99), i) for i in range(count)]


def test_a_lost_seed_ends_a_batch(f32_file, tiny_patch):
    with load(f32_file, tiny_patch, num_sequences=3) as runtime:
        three = begun(runtime)
        runtime.advance(three)
        runtime.backend.context.forget(1)
        with pytest.raises(InactivePatchError, match="sequence 1"):
            runtime.advance(three)


def test_a_failed_batch_leaves_the_runtime_usable(runtime, monkeypatch):
    expected = runtime.generate_batch(PROMPTS, DRAWN)
    three = begun(runtime)
    runtime.advance(three)
    with monkeypatch.context() as broken:
        broken.setattr(runtime.backend.context, "_outputs", lambda *_: runtime.backend.model.lib.no_such_function())
        with pytest.raises(AttributeError):
            runtime.advance(three)
    assert [runtime.sequences.evaluated(s) for s in range(3)] == [[], [], []]
    assert runtime.generate_batch(PROMPTS, DRAWN) == expected


def test_an_error_ends_one_reply_of_a_batch(runtime):
    banned = replace(DRAWN, logit_bias=dict.fromkeys(range(runtime.spec.vocab_size), -np.inf))
    good, bad = runtime.begin([5], DRAWN, 0), runtime.begin([5], banned, 1)
    piece, error = runtime.advance([good, bad])
    assert isinstance(piece, Piece) and piece.token_id == next(runtime.stream([5], DRAWN)).token_id
    assert isinstance(error, EdgepatchError) and "no token is left" in str(error)
    with pytest.raises(EdgepatchError, match="no token is left"):
        runtime.generate_batch([PROMPT, PROMPT], banned)


def test_a_sequence_used_in_between_is_evaluated_again(runtime):
    expected = [piece.token_id for piece in runtime.stream(PROMPTS[0], replace(DRAWN, max_new_tokens=99))][:6]
    three, token_ids = begun(runtime), []
    for _ in range(6):
        token_ids.append(runtime.advance(three)[0].token_id)
        runtime.generate(PROMPT, GREEDY)
    assert token_ids == expected


def test_two_replies_cannot_share_a_sequence(runtime):
    one, two = runtime.begin([5], DRAWN, 1), runtime.begin([6], DRAWN, 1)
    with pytest.raises(InputError, match="sequence of its own"):
        runtime.advance([one, two])
