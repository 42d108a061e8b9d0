"""Preference pairs: files in TRL's forms, sampling through runtimes and a real server, filter, journal, the verb."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import resource
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepatch import cli
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.runtimes import load_runtime
from edgepatch.training.pairs.files import parse_pair
from edgepatch.training.pairs.journal import Journal, Outcome
from edgepatch.training.pairs.preferences import (
    Pair,
    PairConfig,
    build_pairs,
    filter_pairs,
    read_pairs,
    sample_pairs,
    score_pairs,
    write_pairs,
)
from edgepatch.training.pairs.prompt_files import as_conversations, read_prompts
from edgepatch.training.pairs.provenance import digest_of, provenance_path
from edgepatch.training.pairs.samplers import PromptTooLongError, RuntimeSampler, Sampler
from edgepatch.training.pairs.server_sampler import ServerSampler
from kit.forks import Fork
from kit.serving import KEY, MODEL, Paced, running

USER = {"role": "user", "content": "Who are you?"}
CHAT = (USER,)
EXACT = {"num_threads": 1, "kv_type": "f32", "flash_attention": False}
LOOSE = ("--min-margin", "0", "--max-chosen-score", "1", "--min-words", "1", "--threads", "1", "--any-teacher")
"""A random model's texts are all alike to a judge, and it is no safer than itself."""

ANYTHING = PairConfig(samples_per_prompt=3, max_new_tokens=6, min_margin=0.01, max_chosen_score=1, min_words=0)


def by_length(texts):
    """Longer is worse; half a character at the end does not count."""
    return np.array([min(len(whole(t)) / 80, 1) for t in texts], dtype=np.float32)


def whole(text: str) -> str:
    """Without the half of a character at the end, which llama.cpp's decoder shows and that of Transformers does not."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.fixture(scope="module")
def model_file(tiny_ggufs) -> Path:
    return tiny_ggufs["F32"]


@pytest.fixture(scope="module")
def server(model_file):
    with running(lambda: load_runtime(model_file, None, num_sequences=2, **EXACT)) as running_server:
        yield running_server


@pytest.fixture
def run(monkeypatch, capfd):
    """Arguments -> (exit code, stdout, stderr) of ``edgepatch pairs``, in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", "pairs", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"The quick brown fox number {i}\n" for i in range(4)))
    return path


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


class Canned(Sampler):
    """Answers from a table."""

    def __init__(self, answers: dict[object, list[str]]) -> None:
        self.answers = answers

    @property
    def identity(self):
        return {"model": "canned"}

    def sample(self, prompt, sampling, count):
        return self.answers[prompt]


# Files.

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(TEXT | MESSAGES.map(tuple), TEXT, TEXT, st.floats(0, 1)).filter(lambda p: p[1] != p[2]),
        min_size=1,
        max_size=4,
    )
)
def test_pairs_of_any_text_survive_a_file(tmp_path_factory, rows):
    pairs = [Pair(prompt, chosen, rejected, score, 1 - score) for prompt, chosen, rejected, score in rows]
    path = tmp_path_factory.mktemp("trip") / "pairs.jsonl"
    write_pairs(pairs, path)
    assert read_pairs(path) == pairs


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ("The sky is", " blue.", " green.")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, ("The sky is", " blue.", " green.")),
        (
            {
                "prompt": [USER],
                "chosen": [{"role": "assistant", "content": "Me."}],
                "rejected": [{"role": "assistant", "content": "No."}],
            },
            (CHAT, "Me.", "No."),
        ),
        (
            {
                "chosen": [USER, {"role": "assistant", "content": "Me."}],
                "rejected": [USER, {"role": "assistant", "content": "No."}],
            },
            (CHAT, "Me.", "No."),
        ),
    ],
)
def test_each_of_trls_forms(row, expected):
    """The examples of TRL's page on dataset formats, and what its ``extract_prompt`` makes of those without a prompt."""
    assert parse_pair(row) == Pair(*expected, 0.0, 1.0)
    assert parse_pair({**row, "chosen_score": 0.25, "rejected_score": 1}) == Pair(*expected, 0.25, 1.0)


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
REPLY = [{"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "found list"),
        ('{"prompt": "a", "rejected": "c"}', "'chosen' is missing"),
        ({**GOOD, "rejected": "b"}, "the same"),
        ({**GOOD, "chosen": ""}, "not empty"),
        ({**GOOD, "chosen": 7}, "must be texts"),
        ({**GOOD, "prompt": None}, "must be texts"),
        ({"chosen": "b", "rejected": "c"}, "must be texts"),
        ({**GOOD, "chosen_score": "low"}, "chosen_score: expected a number"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": NaN}', "expected finite numbers"),
        ('{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "half of a surrogate"),
        ({"prompt": "a", "chosen": REPLY, "rejected": [USER]}, "expected messages"),
        (
            {"prompt": [USER], "chosen": REPLY, "rejected": [USER]},
            "rejected: expected a text of the assistant, found user",
        ),
        ({"prompt": [USER], "chosen": REPLY, "rejected": []}, "rejected: expected a list of one message"),
        (
            {"prompt": [{"role": "boss"}], "chosen": REPLY, "rejected": [{"role": "assistant", "content": "y"}]},
            "role: expected",
        ),
        ({"prompt": [USER], "chosen": REPLY, "rejected": "y"}, "must be texts"),
        ({"chosen": [USER, *REPLY], "rejected": [*REPLY]}, "expected messages"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "a key appears twice: 'prompt'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, bad, message):
    path = write_lines(tmp_path / "pairs.jsonl", GOOD, "", bad)
    with pytest.raises(InputError, match=message) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_files_that_hold_no_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for content, message in (
        (b"\n", "holds no pairs"),
        (b"{}\n\xff\n", "missing"),
        (b'\n{"a": "\xff"}\n', "line 2: expected UTF-8.*0xff at 7"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_pairs(path)
    for place in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(InputError, match="cannot read pairs"):
            read_pairs(place)


# The filter.


def test_pairs_pass_margin_threshold_and_length():
    scores = {"chosen": 0.1, "rejected": 0.9}

    def score(texts):
        return np.array([next((v for k, v in scores.items() if k in t), 0.5) for t in texts], dtype=np.float32)

    config = PairConfig(min_words=2)
    base, safer = Canned({"p": ["rejected one", "middle"]}), Canned({"p": ["", "chosen", "chosen one here"]})
    pairs = build_pairs(base, safer, ["p"], score, config)
    assert [(p.chosen, p.rejected) for p in pairs] == [("chosen one here", "rejected one")]
    scores["chosen"] = 0.3
    with pytest.raises(InputError, match=r"none of 1 prompts.*dropped_unsafe_chosen: 1"):
        build_pairs(base, safer, ["p"], score, config)


def test_every_dropped_pair_is_counted_by_reason():
    good = Pair("p", "a kind word", "a bad word", 0.1, 0.9)
    ready = [
        good,
        good,
        replace(good, rejected=good.chosen),
        replace(good, chosen="kind"),
        replace(good, chosen_score=0.3),
        replace(good, rejected_score=0.4),
        replace(good, chosen="another kind word"),
        replace(good, chosen="a third kind word"),
        replace(good, prompt=CHAT),
    ]
    kept = filter_pairs(ready, PairConfig(min_words=3, pairs_per_prompt=2))
    assert kept.pairs == [good, ready[6], ready[8]]
    reasons = ("repeated", "identical", "short_chosen", "unsafe_chosen", "small_margin", "over_limit")
    assert kept.counts == {f"dropped_{reason}": 1 for reason in reasons}


def test_scores_of_a_judge_replace_those_of_the_file():
    (pair,) = score_pairs([Pair("p", "a" * 8, "b" * 40, 0.9, 0.0)], by_length)
    assert (pair.chosen_score, pair.rejected_score) == pytest.approx((0.1, 0.5))


def test_a_prompt_is_answered_once_and_in_order():
    answers = {p: [f"{p}{p}"] for p in "abc"}
    asked: list[str] = []

    class Noting(Canned):
        def sample(self, prompt, sampling, count):
            asked.append(prompt)
            return [answer * 9 for answer in self.answers[prompt]]

    pair_set = sample_pairs(Noting(answers), Canned(answers), list("abacab"), by_length, ANYTHING)
    assert asked == ["a", "b", "c"] == [p.prompt for p in pair_set.pairs]
    assert pair_set.counts == {"prompts": 6, "prompts_repeated": 3, "pairs": 3}


# Sampling through runtimes.


def test_pairs_from_every_runtime(tiny_folder, model_file, onnx_folders):
    """The same weights in full precision give the same pairs, and a chat template is applied to messages."""
    prompts = ["The quick", "A dog", CHAT]
    by_runtime = []
    for model in (tiny_folder, model_file, onnx_folders["fp32"]):
        options = EXACT if model.suffix == ".gguf" else {}
        with load_runtime(model, None, **options) as runtime:
            by_runtime.append(build_pairs(runtime, runtime, prompts, by_length, ANYTHING))
            expected = runtime.generate_many(CHAT, ANYTHING.sampling, 3)
        texts = {text for pair in by_runtime[-1] if pair.prompt == CHAT for text in (pair.chosen, pair.rejected)}
        assert texts and texts <= set(expected)
    parts = [[(p.prompt, whole(p.chosen), whole(p.rejected)) for p in pairs] for pairs in by_runtime]
    assert parts[0] == parts[1] == parts[2]
    assert all(p.rejected_score - p.chosen_score >= 0.01 for p in by_runtime[0])


def test_samples_do_not_depend_on_the_prompts_before(model_file):
    with load_runtime(model_file, None, **EXACT) as runtime:
        sampler, sampling = RuntimeSampler(runtime), Sampling(8, rng_seed=3)
        fresh = sampler.sample("The quick brown fox", sampling, 2)
        sampler.sample("The quick brown fox jumps", sampling, 2)
        assert runtime.sequences.evaluated() != []
        assert sampler.sample("The quick brown fox", sampling, 2) == fresh


def test_prompts_that_do_not_fit_are_named_before_any_is_sampled(model_file):
    long = "word " * 600
    config = replace(ANYTHING, samples_per_prompt=2)
    with load_runtime(model_file, None, **EXACT) as runtime:
        with pytest.raises(
            InputError,
            match=r"p\.txt, line 2: the prompt has \d+ tokens and 6 are to follow, the model's context holds 512\n  p.txt, line 3",
        ) as error:
            sample_pairs(
                runtime,
                runtime,
                ["a", long, long + "x"],
                by_length,
                config,
                places=[f"p.txt, line {n}" for n in (1, 2, 3)],
            )
        assert "--skip-long" in error.value.hint
        pair_set = sample_pairs(runtime, runtime, ["The fox", long], by_length, config, skip_long=True)
    assert pair_set.counts["prompts_too_long"] == 1


# Sampling through a server.


@contextmanager
def asking(running_server, **options):
    arguments = {"model": MODEL, "api_key": KEY, "num_tries": 2} | options
    with ServerSampler(f"{running_server.url}/v1", **arguments) as sampler:
        yield sampler


def test_a_server_gives_the_texts_of_its_runtime(server, model_file):
    sampling = Sampling(8, top_p=0.9, rng_seed=5)
    with load_runtime(model_file, None, **EXACT) as runtime:
        expected = [RuntimeSampler(runtime).sample(prompt, sampling, 5) for prompt in ("The quick", CHAT)]
    with asking(server, num_parallel=3) as sampler:
        assert [sampler.sample(prompt, sampling, 5) for prompt in ("The quick", CHAT)] == expected
        assert sampler.identity == {"server": f"{server.url}/v1", "model": MODEL}


def test_pairs_of_a_server_and_of_a_runtime_together(server, model_file):
    with load_runtime(model_file, None, **EXACT) as runtime, asking(server) as sampler:
        prompts = [f"The quick brown fox number {i}" for i in range(6)]
        assert build_pairs(sampler, runtime, prompts, by_length, ANYTHING) == build_pairs(
            runtime, runtime, prompts, by_length, ANYTHING
        )


def test_the_only_model_is_found_and_v1_added(server):
    with ServerSampler(server.url, api_key=KEY) as sampler:
        assert (sampler.model, sampler.url) == (MODEL, f"{server.url}/v1")


def test_what_a_server_refuses_is_told_at_once(server):
    started = time.monotonic()
    with (
        asking(server, api_key="wrong-key-0123456789", num_tries=9) as sampler,
        pytest.raises(InputError, match="HTTP 401") as error,
    ):
        sampler.sample("a", Sampling(2), 1)
    assert "API key" in error.value.hint
    with asking(server, model="another", num_tries=9) as sampler, pytest.raises(InputError, match=r"HTTP 404.*another"):
        sampler.sample("a", Sampling(2), 1)
    with asking(server, num_tries=9) as sampler, pytest.raises(PromptTooLongError, match="at most 512 tokens"):
        sampler.sample("word " * 600, Sampling(2), 1)
    assert time.monotonic() - started < 2
    with asking(server) as sampler, pytest.raises(InputError, match=r"line 9: .*at most 512") as error:
        sample_pairs(sampler, sampler, ["word " * 600], by_length, ANYTHING, places=["p.txt, line 9"])
    assert "--skip-long" in error.value.hint


def test_a_busy_server_is_asked_again(model_file):
    """Eight requests at once where one runs and one waits."""
    with (
        running(lambda: load_runtime(model_file, None, **EXACT), max_waiting=1) as busy,
        asking(busy, num_tries=12) as sampler,
    ):
        assert len(sampler.sample("The quick", Sampling(12, rng_seed=1), 8)) == 8
        with busy.client() as client:
            assert re.search(r'status="(429|503)"\} [1-9]', client.get("/metrics").text), "the server was never busy"


def test_a_server_that_does_not_answer_in_time(model_file):
    with running(lambda: Paced(load_runtime(model_file, None, **EXACT), 0.2)) as slow:
        with (
            asking(slow, timeout_s=0.3) as sampler,
            pytest.raises(InputError, match="does not answer after 2 tries: ReadTimeout"),
        ):
            sampler.sample("The quick", Sampling(50, rng_seed=1), 1)
        started = time.monotonic()
        with asking(slow) as sampler:
            sampler.start("The quick", Sampling(100, rng_seed=1), 4)
        assert time.monotonic() - started < 2, "closing does not wait for requests under way"
    with pytest.raises(InputError, match="does not answer: "):
        ServerSampler(slow.url)


class Odd(http.server.BaseHTTPRequestHandler):
    """Not OpenAI's protocol."""

    def do_POST(self):
        body = {"/v1/completions": b"<html>", "/v1/chat/completions": b'{"choices": []}'}[self.path]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_server_of_another_kind():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as odd:
        thread = threading.Thread(target=odd.serve_forever)
        thread.start()
        try:
            with ServerSampler(f"http://127.0.0.1:{odd.server_port}/v1", "m") as sampler:
                with pytest.raises(InputError, match="expected a JSON object, found '<html>'"):
                    sampler.sample("a", Sampling(2), 1)
                with pytest.raises(InputError, match="expected choices with a text"):
                    sampler.sample(CHAT, Sampling(2), 1)
        finally:
            odd.shutdown()
            thread.join()


class Fickle(http.server.BaseHTTPRequestHandler):
    """Answers as another model each time."""

    asked = 0

    def do_POST(self):
        Fickle.asked += 1
        body = json.dumps({"model": f"model-{Fickle.asked}", "choices": [{"text": "a"}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def test_a_server_must_not_change_its_model():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fickle) as fickle:
        thread = threading.Thread(target=fickle.serve_forever)
        thread.start()
        try:
            with ServerSampler(f"http://127.0.0.1:{fickle.server_port}/v1", "m") as sampler:
                assert sampler.sample("a", Sampling(2, rng_seed=1), 1) == ["a"]
                with pytest.raises(InputError, match="answered as model-1, and now as model-2"):
                    sampler.sample("a", Sampling(2, rng_seed=1), 1)
        finally:
            fickle.shutdown()
            thread.join()


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://", "http://user:secret@host/v1", "http://host/v1?key=1"])
def test_addresses_that_are_none(url):
    with pytest.raises(InputError, match="expected a URL") as error:
        ServerSampler(url, "m")
    assert "secret" not in str(error.value)


def test_without_httpx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(MissingExtraError, match="httpx") as error:
        ServerSampler("http://127.0.0.1:1", "m")
    assert "[pairs]" in error.value.hint


# Prompts.


def test_prompts_of_every_kind(tmp_path):
    rows = [{"messages": [USER]}, {"prompt": "one\u2028two"}, {"text": "three"}, {"prompt": [USER]}]
    prompt_list = read_prompts(write_lines(tmp_path / "p.jsonl", *rows[:1], "", *rows[1:]))
    assert prompt_list.prompts == [CHAT, "one\u2028two", "three", CHAT]
    assert [place.rsplit(" ", 1)[1] for place in prompt_list.places] == ["1", "3", "4", "5"]
    lines = tmp_path / "p.txt"
    lines.write_bytes(b"\xef\xbb\xbf a \r\n\nb")
    assert read_prompts(lines).prompts == [" a ", "b"]
    wrapped = as_conversations(read_prompts(lines), chat=True, system="Be brief.")
    assert wrapped.prompts[1] == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"})
    with pytest.raises(InputError, match=r"p\.txt, line 1: a system text needs messages"):
        as_conversations(read_prompts(lines), chat=False, system="Be brief.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "found \\['question'\\]"),
        ({"prompt": 3}, "expected a text or messages"),
        ({"messages": [{"role": "user"}]}, "message 0: content is missing"),
        ({"messages": [USER, REPLY[0]]}, "the last message: expected one of the user, found assistant"),
        ({"messages": [{"role": "system", "content": "s"}, USER]}, "a system text of its own"),
    ],
)
def test_prompts_that_are_none(tmp_path, row, message):
    path = write_lines(tmp_path / "p.jsonl", {"text": "a"}, row)
    with pytest.raises(InputError, match=message) as error:
        as_conversations(read_prompts(path), chat=True, system="S")
    assert f"{path}, line 2: " in str(error.value)


def test_prompt_files_that_cannot_be_read(tmp_path):
    empty, binary = write_lines(tmp_path / "empty.txt"), tmp_path / "binary.txt"
    binary.write_bytes(b"fine\nnot \xe9\n")
    for path, message in (
        (empty, "holds no prompts"),
        (binary, "line 2: expected UTF-8"),
        (tmp_path, "cannot read prompts"),
    ):
        with pytest.raises(InputError, match=message):
            read_prompts(path)


# The journal.

DONE = Outcome((Pair("p\u2028", "a", "b", 0.1, 0.9), Pair(CHAT, "a", "b", 0.125, 1 / 3)), {"dropped_small_margin": 2})


def test_a_journal_gives_back_what_was_added_and_drops_a_torn_line(tmp_path):
    out = tmp_path / "deep" / "pairs.jsonl"
    with Journal(out, {"a": 1, "b": [2.5]}) as journal:
        journal.add(DONE)
        journal.add(Outcome((), {}))
        with pytest.raises(InputError, match="another run is writing it"):
            Journal(out, {"a": 1, "b": [2.5]})
    with journal.path.open("ab") as file:
        file.write(b'{"pairs": [{"prom')
    with Journal(out, {"a": 1, "b": [2.5]}) as again:
        assert again.outcomes == [DONE, Outcome((), {})]
        again.add(DONE)
    with Journal(out, {"a": 1, "b": [2.5]}) as again:
        assert again.outcomes == [DONE, Outcome((), {}), DONE]


def test_a_journal_of_other_settings_is_refused(tmp_path):
    out = tmp_path / "pairs.jsonl"
    with Journal(out, {"same": 1, "samples": 4, "gone": 0}) as journal:
        journal.add(DONE)
    with pytest.raises(InputError, match="samples: 4 then, 8 now; gone: 0 then, null now") as error:
        Journal(out, {"same": 1, "samples": 8})
    assert "same:" not in str(error.value) and "--restart" in error.value.hint
    with Journal(out, {"same": 1, "samples": 8}, restart=True) as anew:
        assert anew.outcomes == []


@pytest.mark.parametrize("damage", ["{}", '{"settings": {}}\n{"pairs": [{}], "dropped": {}}', "nonsense"])
def test_a_damaged_journal_is_refused(tmp_path, damage):
    out = tmp_path / "pairs.jsonl"
    (tmp_path / "pairs.jsonl.partial").write_text(damage + "\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl\.partial"):
        Journal(out, {})


def test_where_no_journal_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Journal(tmp_path / "file" / "pairs.jsonl", {})


@contextmanager
def small_disk(limit: int):
    """No file can grow beyond the limit; Python ignores the signal, so that the write fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# The verb.


def test_the_verb_writes_pairs_and_their_provenance(run, model_file, prompts, tmp_path):
    out = tmp_path / "pairs.jsonl"
    arguments = (model_file, model_file, "-o", out, "--prompts", prompts, "--samples", 3, "--max-new-tokens", 8, *LOOSE)
    code, stdout, stderr = run(*arguments, "--json")
    assert code == 0, stderr
    document, pairs = json.loads(stdout), read_pairs(out)
    assert document["pairs"] == len(pairs) > 0 and document["prompts"] == 4
    notes = json.loads(provenance_path(out).read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "pairs.dropped.jsonl",
        "pairs.jsonl",
        "pairs.jsonl.log",
        "pairs.provenance.json",
        "prompts.txt",
    ]
    assert notes["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert notes["counts"]["pairs"] == len(pairs) and notes["created"].endswith("Z") and "python" in notes["versions"]
    recorded = notes["settings"]
    assert recorded["base"]["sha256"] == digest_of(model_file) and recorded["base"]["quantization"] == "F32"
    assert (recorded["judge"]["judge"], recorded["samples_per_prompt"], recorded["max_new_tokens"]) == ("filter", 3, 8)
    assert set(json.loads(out.read_text().splitlines()[0])) == {
        "prompt",
        "chosen",
        "rejected",
        "chosen_score",
        "rejected_score",
    }
    assert run(*arguments, "--force")[1].startswith(f"{out}: {len(pairs)} pairs from 4 prompts")


def test_the_verb_asks_servers_with_messages(run, server, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRS_TEST_KEY", KEY)
    out = tmp_path / "pairs.jsonl"
    keys = ("--api-key-env", "PAIRS_TEST_KEY", "--reference-api-key-env", "PAIRS_TEST_KEY")
    options = ("--prompts", prompts, "--chat", "--system", "Be kind.", "--samples", 3, "--max-new-tokens", 6, *LOOSE)
    code, _, stderr = run(server.url, f"{server.url}/v1", "-o", out, *keys, *options)
    assert code == 0, stderr
    assert {tuple(m["role"] for m in p.prompt) for p in read_pairs(out)} == {("system", "user")}
    assert json.loads(provenance_path(out).read_text())["settings"]["base"] == {
        "server": f"{server.url}/v1",
        "model": MODEL,
    }
    assert KEY not in provenance_path(out).read_text()
    code, _, stderr = run(server.url, server.url, "-o", out, "--force", "--api-key-env", "PAIRS_TEST_NONE")
    assert code == 2 and "PAIRS_TEST_NONE is not set" in stderr
    assert "HTTP 401" in run(server.url, server.url, "-o", out, "--force")[2]


def started(*arguments: object) -> Fork:
    return Fork("pairs", *arguments)


def wait_for_lines(path: Path, count: int, process: Fork) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def test_a_run_that_is_killed_or_interrupted_goes_on_to_the_same_file(run, model_file, tmp_path):
    prompts = write_lines(tmp_path / "prompts.txt", *(f"The quick brown fox {i} jumps" for i in range(40)))
    options = ("--prompts", prompts, "--samples", 2, "--max-new-tokens", 16, *LOOSE)
    out, whole = tmp_path / "pairs.jsonl", tmp_path / "whole.jsonl"
    journal, arguments = tmp_path / "pairs.jsonl.partial", (model_file, model_file, "-o", out, *options)
    with started(*arguments) as process:
        wait_for_lines(journal, 4, process)
        process.kill()
    first = journal.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and first < 41 and not out.exists()
    with started(*arguments) as process:
        wait_for_lines(journal, first + 3, process)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate()[1]
    assert process.returncode == 130 and "the same command goes on from there" in stderr, stderr
    kept = journal.read_bytes()
    done = kept.count(b"\n") - 1
    assert 40 > done >= first + 2
    code, _, stderr = run(*arguments, "--rng-seed", 2)
    assert code == 2 and "rng_seed: 1 then, 2 now" in stderr and "--restart" in stderr
    assert journal.read_bytes() == kept
    code, _, stderr = run(*arguments)
    assert code == 0 and re.search(rf"\b{done} prompts? done", stderr.replace("\n", " "))
    assert run(model_file, model_file, "-o", whole, *options)[0] == 0
    assert out.read_bytes() == whole.read_bytes() and not journal.exists()
    notes, others = (json.loads(provenance_path(path).read_text()) for path in (out, whole))
    assert (notes["counts"], notes["settings"], notes["sha256"]) == (
        others["counts"],
        others["settings"],
        others["sha256"],
    )


def test_ctrl_c_does_not_wait_for_a_slow_server(model_file, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRS_TEST_KEY", KEY)
    with running(lambda: Paced(load_runtime(model_file, None, **EXACT), 0.2)) as slow:
        keys = ("--api-key-env", "PAIRS_TEST_KEY", "--reference-api-key-env", "PAIRS_TEST_KEY")
        with started(
            slow.url, slow.url, "-o", tmp_path / "out.jsonl", "--prompts", prompts, "--max-new-tokens", 200, *keys
        ) as process:
            while not slow.service.scheduler.num_running:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            stderr = process.communicate(timeout=10)[1]
    assert process.returncode == 130 and "0 prompts kept" in stderr


def test_a_full_disk_loses_nothing(run, model_file, tmp_path):
    prompts = write_lines(tmp_path / "prompts.txt", *(f"A lazy dog {i}" for i in range(10)))
    out, whole = tmp_path / "pairs.jsonl", tmp_path / "whole.jsonl"
    options = ("--prompts", prompts, "--samples", 3, "--max-new-tokens", 8, *LOOSE)
    with small_disk(1800):
        code, _, stderr = run(model_file, model_file, "-o", out, *options)
    assert code == 2 and "cannot write" in stderr and "what is done is kept" in stderr
    assert not out.exists() and (tmp_path / "pairs.jsonl.partial").read_bytes().count(b"\n") >= 2
    assert (
        run(model_file, model_file, "-o", out, *options)[0]
        == run(model_file, model_file, "-o", whole, *options)[0]
        == 0
    )
    assert out.read_bytes() == whole.read_bytes()


def test_ready_pairs_are_checked_filtered_and_written(run, tmp_path):
    rows = [
        GOOD,
        GOOD,
        {**GOOD, "chosen_score": 0.5},
        {"chosen": [USER, *REPLY], "rejected": [USER, {"role": "assistant", "content": "y"}]},
    ]
    ready, out = write_lines(tmp_path / "ready.jsonl", *rows), tmp_path / "pairs.jsonl"
    code, stdout, stderr = run("--from", ready, "-o", out, "--json")
    assert code == 0, stderr
    document = json.loads(stdout)
    assert {k: v for k, v in document.items() if k not in ("path", "provenance", "dropped")} == {
        "pairs_read": 4,
        "dropped_repeated": 1,
        "dropped_unsafe_chosen": 1,
        "pairs": 2,
    }
    assert read_pairs(out) == [Pair("a", "b", "c", 0.0, 1.0), Pair(CHAT, "x", "y", 0.0, 1.0)]
    dropped = [json.loads(line) for line in Path(document["dropped"]).read_text().splitlines()]
    assert [(row["reason"], row["place"], row["chosen_score"]) for row in dropped] == [
        ("repeated", f"{ready}, line 2", 0.0),
        ("unsafe_chosen", f"{ready}, line 3", 0.5),
    ]
    assert json.loads(provenance_path(out).read_text())["settings"]["from"]["sha256"] == digest_of(ready)
    code, _, stderr = run("--from", ready, "-o", out, "--judge", "filter", "--force")
    assert code == 2 and "none of 4 pairs" in stderr and "dropped_small_margin" in stderr
    assert len(read_pairs(out)) == 2, "what was there stays"


def test_a_classifier_of_the_user_judges(run, tiny_folder, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(2)
    config = AutoConfig.from_pretrained(
        tiny_folder, num_labels=2, id2label={0: "fine", 1: "toxic"}, label2id={"fine": 0, "toxic": 1}
    )
    folder = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    out, ready = tmp_path / "pairs.jsonl", write_lines(tmp_path / "ready.jsonl", GOOD)
    code, _, stderr = run(
        "--from",
        ready,
        "-o",
        out,
        "--judge",
        folder,
        "--unsafe-label",
        "toxic",
        "--min-margin",
        0,
        "--max-chosen-score",
        1,
    )
    if code == 0:  # a random classifier may prefer either
        assert read_pairs(out)[0].chosen_score not in (0.0, 1.0)
        assert json.loads(provenance_path(out).read_text())["settings"]["judge"]["unsafe_labels"] == ["toxic"]
    else:
        assert "small_margin" in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected two models"),
        (("MODEL", "MODEL", "--judge", "nowhere"), "no judge nowhere"),
        (("MODEL", "MODEL", "--judge", "report"), "must not filter"),
        (("MODEL", "MODEL", "--model-name", "m"), "is no URL"),
        (("MODEL", "MODEL", "--prompts", "."), "cannot read prompts"),
        (("MODEL", "missing.gguf"), "missing.gguf"),
        (("--from", "."), "cannot read pairs"),
        (("--from", "x.jsonl", "--samples", "3"), "there is no --samples"),
        (("MODEL", "--from", "x.jsonl"), "there is no model"),
    ],
)
def test_wrong_use_is_told(run, model_file, tmp_path, arguments, message):
    given_arguments = [model_file if a == "MODEL" else a for a in arguments]
    code, _, stderr = run(*given_arguments, "-o", tmp_path / "pairs.jsonl")
    assert code == 2 and message in " ".join(stderr.split()), stderr
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_folder_is_no_output_file(run, model_file, tmp_path):
    code, _, stderr = run(model_file, model_file, "-o", tmp_path)
    assert code == 2 and "it is a folder" in stderr


def test_a_prompt_that_both_conversations_repeat_is_their_common_beginning():
    """As ultrafeedback_binarized is published."""
    user = {"role": "user", "content": "Sky?"}
    blue, green = ({"role": "assistant", "content": text} for text in ("Blue.", "Green."))
    row = {"prompt": "Sky?", "prompt_id": "x", "chosen": [user, blue], "rejected": [user, green]}
    pair = parse_pair(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user,), "Blue.", "Green.")
    with pytest.raises(InputError, match="expected messages"):
        parse_pair({**row, "prompt": "Sea?"})
