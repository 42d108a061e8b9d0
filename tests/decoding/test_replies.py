"""Replies: stop strings, endings, and what a stream, a text and a batch of continuations have in common."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgepatch.decoding.constraints import Constraint
from edgepatch.decoding.replies import Reply, StopMatcher
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.runtimes import load_runtime

PROMPT = "The quick brown fox"
SAMPLING = Sampling(max_new_tokens=24, rng_seed=5)


def cut_at_stop(text, stops):
    """The rule in its plainest form: at the first place where a stop string is complete, the longest of those counts."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


ALPHABET = "abé🙂"


@given(
    st.lists(st.text(ALPHABET, max_size=12), max_size=10),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
)
@example(["aab", "a", "b"], ["aaba", "ab"])
@example(["a🙂", "🙂", "é"], ["🙂🙂é"])
def test_stop_strings_are_found_however_the_text_is_cut(parts, stops):
    matcher, delivered = StopMatcher(stops), ""
    expected, is_stopped = cut_at_stop("".join(parts), stops)
    for part in parts:
        delivered += matcher.push(part)
        assert expected.startswith(delivered), "the beginning of a stop string was delivered"
    assert matcher.is_stopped == is_stopped
    assert delivered + matcher.flush() == expected


@given(st.lists(st.text(ALPHABET, max_size=8), max_size=8), st.text(ALPHABET, min_size=1, max_size=4))
def test_no_more_is_held_back_than_can_begin_a_stop_string(parts, stop):
    matcher, text, delivered = StopMatcher([stop]), "", ""
    for part in parts:
        text += part
        delivered += matcher.push(part)
        if not matcher.is_stopped:
            assert stop.startswith(text[len(delivered) :])


def scripted(texts, sampling, ends=frozenset()):
    """A reply of which every token is certain: token i stands for ``texts[i]``."""
    reply = Reply(replace(sampling, temperature=0), [0], len(texts), len(texts), lambda token: texts[token], ends)
    for i in range(len(texts)):
        piece = reply.next(np.eye(len(texts), dtype=np.float32)[i])
        yield piece
        if piece.finish_reason:
            return


def test_a_stop_string_over_tokens_ends_the_reply_before_it():
    pieces = list(scripted(["Hi ", "EN", "x E", "N", "D!", "never"], Sampling(stop=("END",))))
    assert [(p.text, p.finish_reason) for p in pieces] == [("Hi ", ""), ("", ""), ("ENx ", ""), ("", ""), ("", "stop")]
    assert [p.token_id for p in pieces] == [0, 1, 2, 3, 4]


def test_what_is_held_back_is_delivered_at_every_other_end():
    assert [(p.text, p.finish_reason) for p in scripted(["a", "EN"], Sampling(stop=("END",)))] == [
        ("a", ""),
        ("EN", "length"),
    ]
    ended = list(scripted(["a", "EN", "</s>", "b"], Sampling(stop=("END",)), ends=frozenset({2})))
    assert [(p.text, p.finish_reason) for p in ended] == [("a", ""), ("", ""), ("EN", "stop")]
    both = list(scripted(["a", "b"], Sampling(stop=("b",))))
    assert both[-1].finish_reason == "stop", "a stop string in the last token is no reply that was cut off"


def test_end_tokens_can_be_ignored():
    pieces = list(scripted(["a", "</s>", "b"], Sampling(ignore_end_tokens=True), ends=frozenset({1})))
    assert [p.finish_reason for p in pieces] == ["", "", "length"]


@pytest.fixture(scope="module")
def runtime(tiny_folder, tiny_patch):
    with load_runtime(tiny_folder, tiny_patch, num_sequences=2) as loaded:
        yield loaded


def test_a_stop_string_cuts_the_same_text(runtime):
    whole = runtime.generate(PROMPT, SAMPLING)
    start = next(i for i in range(2, len(whole) - 3) if "\ufffd" not in whole[i : i + 3])
    for stop in (whole[start : start + 3], whole[start + 2]):
        expected, _ = cut_at_stop(whole, [stop])
        pieces = list(runtime.stream(PROMPT, replace(SAMPLING, stop=(stop,))))
        assert "".join(p.text for p in pieces) == expected
        assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ("e", "th")},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_p": 0.02},
        {"logit_bias": {9: -100, 40: 3.0}, "top_k": 20},
        {"constraint": Constraint("regex", "[a-f ]{6,12}")},
        {"ignore_end_tokens": True},
    ],
)
def test_a_batch_honours_what_a_stream_does(runtime, options, monkeypatch):
    sampling = replace(SAMPLING, **options)
    with monkeypatch.context() as unbatched:
        unbatched.setattr(runtime.backend, "max_batch_rows", 0)
        singles = runtime.generate_many(PROMPT, sampling, 5)
    assert runtime.generate_many(PROMPT, sampling, 5) == singles
    assert singles != runtime.generate_many(PROMPT, SAMPLING, 5) or "ignore_end_tokens" in options


def test_a_batch_ignores_end_tokens_only_where_asked(runtime, monkeypatch):
    likely = frozenset(p.token_id for p in runtime.stream(PROMPT, SAMPLING))
    monkeypatch.setattr(runtime, "end_token_ids", likely)
    ending = runtime.generate_many(PROMPT, SAMPLING, 3)
    assert ending[0] == ""
    assert runtime.generate_many(PROMPT, replace(SAMPLING, ignore_end_tokens=True), 3)[0] != ""


def test_texts_refuse_what_only_a_stream_can_give(runtime):
    asked = replace(SAMPLING, num_logprobs=2)
    for call in (lambda: runtime.generate(PROMPT, asked), lambda: runtime.generate_many(PROMPT, asked, 2)):
        with pytest.raises(InputError, match="num_logprobs"):
            call()


def test_logprobs_of_a_stream_are_those_of_its_logits(runtime):
    tokens = runtime.tokens(PROMPT)
    pieces = list(runtime.stream(tokens, replace(SAMPLING, num_logprobs=3, temperature=0.5)))
    logits = runtime.logits([*tokens, *(p.token_id for p in pieces[:-1])])[len(tokens) - 1 :].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, piece in zip(logprobs, pieces, strict=True):
        assert piece.logprob == pytest.approx(row[piece.token_id], abs=1e-4)
        assert [p for _, p in piece.top_logprobs] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)


def test_streams_on_two_sequences_may_be_interleaved_and_closed(runtime):
    other = replace(SAMPLING, rng_seed=9, stop=("zz",), repetition_penalty=1.2)
    alone = [runtime.generate(PROMPT, SAMPLING), runtime.generate("Patching a model", other)]
    one, two = runtime.stream(PROMPT, SAMPLING), runtime.stream("Patching a model", other, sequence=1)
    texts = ["", ""]
    for a, b in zip(one, two, strict=False):
        texts[0] += a.text
        texts[1] += b.text
    texts[0] += "".join(p.text for p in one)
    texts[1] += "".join(p.text for p in two)
    assert [a.startswith(t) for a, t in zip(alone, texts, strict=True)] == [True, True] and texts[0] == alone[0]
    begun = runtime.stream(PROMPT, SAMPLING)
    next(begun)
    begun.close()
    assert runtime.generate(PROMPT, SAMPLING) == alone[0]


def test_prompts_are_of_one_kind(runtime):
    for prompt in ([1, "a"], [1, {"role": "user"}], [True], [1.5]):
        with pytest.raises(InputError, match="token ids alone"):
            runtime.tokens(prompt)
    with pytest.raises(InputError, match="message 1: expected an object"):
        runtime.tokens([{"role": "user", "content": "x"}, 5])
    with pytest.raises(InputError, match="tools need chat messages"):
        list(runtime.stream(PROMPT, tools=[{"type": "function", "function": {"name": "f"}}]))


def test_a_ban_of_everything_leaves_the_runtime_usable(runtime):
    with pytest.raises(EdgepatchError, match="no token is left"):
        runtime.generate(PROMPT, Sampling(logit_bias=dict.fromkeys(range(runtime.spec.vocab_size), float("-inf"))))
    assert runtime.generate(PROMPT, SAMPLING)
