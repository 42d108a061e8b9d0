"""The scheduler alone: turns, the queue, long prompts, cancellation, failure, the end."""

import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.decoding.replies import Piece
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError, InactivePatchError
from edgepatch.runtimes import load_runtime
from edgepatch.server import generations
from edgepatch.server.generations import Finished, Generation, Started
from edgepatch.server.metrics import Metrics
from edgepatch.server.refusals import Refusal, refusal_of
from edgepatch.server.replies.formats import ReplyFormat
from edgepatch.server.replies.streams import ReplyStream
from edgepatch.server.scheduler import Scheduler
from edgepatch.text.call_forms import GENERAL, CallForm
from edgepatch.text.thoughts import CHANNELS

GREEDY = Sampling(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def runtime(tiny_folder, tiny_patch):
    with load_runtime(tiny_folder, tiny_patch, num_sequences=2) as loaded:
        yield loaded


class Listener:
    """Gathers the events of one generation."""

    def __init__(self, tokens, sampling=GREEDY, log=None):
        self.events, self.done, self.log = [], threading.Event(), log
        self.generation = Generation(tokens, sampling, self)

    def __call__(self, event):
        self.events.append(event)
        if self.log is not None and isinstance(event, Piece):
            self.log.append(self)
        if isinstance(event, Finished):
            self.done.set()

    def wait(self):
        assert self.done.wait(30)
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def error(self):
        return self.events[-1].error


class Kept:
    """The module's runtime, which the scheduler must not close."""

    def __init__(self, runtime):
        self._runtime = runtime

    def __getattr__(self, name):
        return getattr(self._runtime, name)

    def close(self):
        self._runtime.reset()


@pytest.fixture
def scheduler(runtime):
    ready = threading.Event()
    scheduler = Scheduler(lambda: Kept(runtime), 16, Metrics(), ready.set)
    scheduler.start()
    assert ready.wait(10)
    yield scheduler
    scheduler.drain(0)
    assert scheduler.join(10)


def endless(runtime, **more):
    return Sampling(max_new_tokens=400, logit_bias=dict.fromkeys(runtime.end_token_ids, -100), rng_seed=1, **more)


def test_replies_take_turns_token_by_token(scheduler, runtime):
    log = []
    both = [Listener(runtime.tokens(text), endless(runtime), log) for text in ("fox", "dog")]
    scheduler.submit([one.generation for one in both])
    while len(log) < 40:
        time.sleep(0.001)
    scheduler.cancel([one.generation for one in both])
    assert log[:40] == both * 20


def test_running_replies_share_a_batch_and_a_failed_one_ends_them(runtime):
    class Batched(Kept):
        sizes, broken = [], False

        def advance(self, continuations):
            self.sizes.append(len(continuations))
            if self.broken:
                raise EdgepatchError("out of memory")
            return self._runtime.advance(continuations)

    batched, alone = (
        Batched(runtime),
        [runtime.generate(text, replace(GREEDY, max_new_tokens=n)) for text, n in (("fox", 30), ("dog", 9))],
    )
    scheduler = Scheduler(lambda: batched, 4, Metrics())
    scheduler.start()
    while scheduler.state == "loading":
        time.sleep(0.001)
    both = [Listener(runtime.tokens(text), replace(GREEDY, max_new_tokens=n)) for text, n in (("fox", 30), ("dog", 9))]
    scheduler.submit([one.generation for one in both])
    assert [one.wait() for one in both] == alone, "one reply goes on as before when the other has ended"
    assert batched.sizes == [1, 1] + [2] * 8 + [1] * 21, "the first token comes when its prompt is read"
    batched.broken = True
    failed = [Listener(runtime.tokens(text)) for text in ("fox", "dog")]
    scheduler.submit([one.generation for one in failed])
    assert [one.wait() for one in failed] == ["", ""] and all("out of memory" in str(one.error) for one in failed)
    batched.broken = False
    again = Listener(runtime.tokens("fox"), replace(GREEDY, max_new_tokens=30))
    scheduler.submit([again.generation])
    assert again.wait() == alone[0] and scheduler.state == "ok"
    scheduler.drain(0)
    assert scheduler.join(10)


def test_a_long_prompt_does_not_hold_up_the_others(scheduler, runtime, monkeypatch):
    monkeypatch.setattr(generations, "PREFILL_CHUNK", 16)
    log = []
    short = Listener(runtime.tokens("fox"), endless(runtime), log)
    scheduler.submit([short.generation])
    while len(log) < 3:
        time.sleep(0.001)
    long_prompt = (runtime.tokens("dog") * 300)[:300]
    long = Listener(long_prompt, GREEDY, log)
    scheduler.submit([long.generation])
    text = long.wait()
    scheduler.cancel([short.generation])
    assert log.index(long) - 3 >= 300 // 16 - 2, "the short one went on while the long prompt was read"
    assert short.done.wait(0.0) is False
    while scheduler.num_running:
        time.sleep(0.001)
    assert text == scheduler.call(lambda r: r.generate(long_prompt, GREEDY)).result(30)


def test_requests_take_turns_though_one_has_many_choices(scheduler, runtime):
    order = []
    blockers = [Listener(runtime.tokens("fox"), endless(runtime)) for _ in range(2)]
    scheduler.submit([b.generation for b in blockers])
    many = [Listener(runtime.tokens("many"), GREEDY, order) for _ in range(4)]
    one = Listener(runtime.tokens("one"), GREEDY, order)
    scheduler.submit([m.generation for m in many[:3]])
    scheduler.submit([one.generation])
    scheduler.cancel([b.generation for b in blockers])
    for listener in (*many[:3], one):
        listener.wait()
    last_of_many = max(order.index(m) for m in many[:3])
    assert order.index(one) < last_of_many


def test_a_conversation_finds_its_own_sequence_again(scheduler, runtime):
    first, second = runtime.tokens("The quick brown fox jumps"), runtime.tokens("Patching a model should be")
    for tokens in (first, second):
        listener = Listener(tokens)
        scheduler.submit([listener.generation])
        listener.wait()
    for start in (first, second):
        again = Listener([*start, *runtime.tokens("over")])
        scheduler.submit([again.generation])
        again.wait()
        assert again.events[0] == Started(len(start))


def test_an_error_ends_one_generation_alone(scheduler, runtime):
    wrong = Listener(runtime.tokens("fox"), Sampling(logit_bias={10**6: 1.0}))
    right = Listener(runtime.tokens("fox"))
    scheduler.submit([wrong.generation])
    scheduler.submit([right.generation])
    assert right.wait()
    wrong.wait()
    assert refusal_of(wrong.error).status == 400
    assert scheduler.state == "ok"


def test_calls_run_between_steps_and_hand_over_their_errors(scheduler, runtime):
    assert scheduler.call(lambda r: r.tokens("fox")).result(10) == runtime.tokens("fox")
    with pytest.raises(EdgepatchError):
        scheduler.call(lambda r: r.tokens([])).result(10)
    assert scheduler.state == "ok"


def test_a_seed_that_is_lost_ends_everything(runtime):
    class Lost(Kept):
        def begin(self, *args, **kwargs):
            raise InactivePatchError("the seed is gone")

    failed = threading.Event()
    scheduler = Scheduler(lambda: Lost(runtime), 4, Metrics(), on_failed=lambda error: failed.set())
    scheduler.start()
    while scheduler.state == "loading":
        time.sleep(0.001)
    listeners = [Listener(runtime.tokens("fox")) for _ in range(4)]
    scheduler.submit([one.generation for one in listeners])
    assert failed.wait(10)
    for listener in listeners:
        listener.wait()
        assert refusal_of(listener.error).status == 503
    assert scheduler.state == "failed" and isinstance(scheduler.error, InactivePatchError)
    with pytest.raises(Refusal, match="failed"):
        scheduler.submit([listeners[0].generation])
    with pytest.raises(Refusal, match="failed"):
        scheduler.call(lambda r: r.tokens("fox"))
    assert scheduler.join(10)


def test_draining_lets_replies_end_and_takes_no_more(scheduler, runtime):
    running = Listener(runtime.tokens("fox"), GREEDY)
    scheduler.submit([running.generation])
    scheduler.drain(20)
    with pytest.raises(Refusal, match="stopping"):
        scheduler.submit([running.generation])
    text = running.wait()
    assert running.error is None
    assert scheduler.join(10)
    assert text == runtime.generate("fox", GREEDY)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_prompt_is_scored_part_by_part(scheduler, runtime, monkeypatch, rows):
    """The logits of all of it are never there at once, and its scores are those of the whole."""
    monkeypatch.setattr(generations, "MAX_LOGITS_BYTES", 4 * runtime.spec.vocab_size * rows)
    tokens, events = runtime.tokens("The quick brown fox"), []
    generation = generations.Generation(tokens, None, events.append, scored=True, num_logprobs=2)
    steps = list(generations.steps_of(runtime, generation, 0))
    scored = next(step for step in steps if isinstance(step, generations.Scored))
    logits = runtime.logits(tokens, 0)[:-1].astype(np.float64)
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    np.testing.assert_allclose(scored.logprobs, expected[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
    np.testing.assert_allclose(scored.top_logprobs, -np.sort(-expected, axis=1)[:, :2], atol=1e-4)
    assert scored.top_ids.shape == (len(tokens) - 1, 2)


THINK = ("<think>", "</think>")
CALL_TEXT = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
GPT_OSS_CALL = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"x": 1}'
)


@pytest.mark.parametrize(
    ("pair", "is_open", "text", "thought", "said", "num_calls"),
    [
        (THINK, False, "<think>\nHm, 1 < 2.\n</think>\n\nYes.", "Hm, 1 < 2.", "Yes.", 0),
        (THINK, True, "Hm.\n</think>\n\nYes.", "Hm.", "Yes.", 0),
        (THINK, True, "cut off", "cut off", "", 0),
        (THINK, False, "No thought, </think> or not.", "", "No thought, </think> or not.", 0),
        (
            THINK,
            False,
            f"<think>Maybe {CALL_TEXT}? No.</think>I will not.",
            f"Maybe {CALL_TEXT}? No.",
            "I will not.",
            0,
        ),
        (THINK, False, f"<think>Then.</think>{CALL_TEXT}", "Then.", "", 1),
        (None, False, f"<think>Maybe {CALL_TEXT}? No.</think>No.", "", f"<think>Maybe {CALL_TEXT}? No.</think>No.", 0),
        (("[THINK]", "[/THINK]"), False, "[THINK]a[/THINK]b", "a", "b", 0),
        (
            CHANNELS,
            False,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
            "Hm.",
            "Yes.",
            0,
        ),
        (CHANNELS, False, GPT_OSS_CALL, "Hm.", "", 1),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_thoughts_are_split_off_and_hold_no_calls(pair, is_open, text, thought, said, num_calls, size):
    forms = (CallForm("channels", "to=functions.", None, ""), *GENERAL)
    stream = ReplyStream(ReplyFormat(pair, is_open, {"f": {}}, forms))
    parts = [stream.push(text[i : i + size]) for i in range(0, len(text), size)]
    rest = stream.finish()
    assert "".join(part[0] for part in parts) + rest[0] == thought
    assert "".join(part[1] for part in parts) + rest[1] == said
    assert len(rest[2]) == num_calls
    for call in rest[2]:
        assert call["function"] == {"name": "f", "arguments": '{"x": 1}'} and re.fullmatch("[A-Za-z0-9]{9}", call["id"])


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "streamed", "rest", "num_calls"),
    [
        ("Just text with < and <tool.", "Just text with < and <tool.", "", 0),
        (f"I look it up.\n{CALL}", "I look it up.\n", "", 1),
        (f"{CALL}\n{CALL}", "", "", 2),
        (f"Before.{CALL} After.", "Before.", " After.", 1),
        ('{"name": "f", "arguments": {"x": 1}}', "", "", 1),
        ('{"name": "g", "arguments": {"x": 1}}', "", '{"name": "g", "arguments": {"x": 1}}', 0),
        ("<tool_call>never closed", "", "<tool_call>never closed", 0),
        ("ends like one <tool_", "ends like one ", "<tool_", 0),
        ("  {not json", "", "  {not json", 0),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_is_streamed_as_soon_as_it_is_certainly_no_call(text, streamed, rest, num_calls, size):
    stream = ReplyStream(ReplyFormat(tools={"f": {}}, forms=GENERAL))
    parts = "".join(stream.push(text[i : i + size])[1] for i in range(0, len(text), size))
    thought, left, calls = stream.finish()
    assert (parts, left, len(calls), thought) == (streamed, rest, num_calls, "")
    assert all(call["function"] == {"name": "f", "arguments": '{"x": 1}'} for call in calls)
