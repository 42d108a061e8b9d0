"""Text on its way to the model: what is refused, or takes long to read, holds up nobody's reply, and counts into the request's time."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise

import httpx
import pytest

from edgepatch.runtimes import load_runtime
from edgepatch.text.limits import TextBound
from kit.serving import KEY, MODEL, Paced, running

ATTACK = textwrap.dedent("""
    import http.client, json, sys, threading, time
    port, kind, key = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    text = "word. " * 690_000
    asked = {"chat": {"messages": [{"role": "user", "content": text}]}, "text": {"prompt": text}}[kind]
    body = json.dumps({"model": "tiny", "max_tokens": 4, **asked}).encode()
    path = {"chat": "/v1/chat/completions", "text": "/v1/completions"}[kind]
    sys.stdin.readline()
    def ask():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", path, body, {"Content-Type": "application/json", "Authorization": "Bearer " + key})
        reply = connection.getresponse()
        sys.stdout.write(json.dumps([reply.status, json.loads(reply.read())["error"]["code"]]) + chr(10))
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
""")
"""Three prompts of 4 MB at once."""


class SlowReader(Paced):
    """A runtime that reads some prompts slowly."""

    def tokens(self, prompt, *more):
        if "slow" in str(prompt):
            time.sleep(5)
        return self._runtime.tokens(prompt, *more)


@pytest.fixture(scope="module")
def load(tiny_ggufs, tiny_patch):
    path = tiny_ggufs["F32"]
    exact = {"kv_type": "f32", "flash_attention": False}
    return lambda: Paced(load_runtime(path, tiny_patch, num_sequences=2, num_threads=1, **exact))


def longest_gap(server, attack: subprocess.Popen | None) -> float:
    """Seconds between two tokens of a stream, at most; an attack begins when the stream does."""
    ends = server.service.require_model().end_token_ids
    body = {"model": MODEL, "prompt": "The quick", "max_tokens": 100, "stream": True}
    body["logit_bias"] = {str(token): -100 for token in ends}
    times = []
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
            if len(times) == 5 and attack is not None:
                attack.stdin.write("go\n")
                attack.stdin.flush()
                attack = None
    return max(b - a for a, b in pairwise(times))


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_prompts_that_are_refused_stall_nobody(load, kind):
    with running(load) as server:
        port = server.url.rsplit(":", 1)[1]
        alone = longest_gap(server, None)
        attack = subprocess.Popen(
            [sys.executable, "-c", ATTACK, port, kind, KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        attacked = longest_gap(server, attack)
        answers = [json.loads(line) for line in attack.communicate(timeout=60)[0].splitlines()]
    assert answers == [[400, "context_length_exceeded"]] * 3
    assert attacked < 1.0 + 10 * alone  # it was 28 s


def test_reading_a_prompt_counts_into_the_time_of_the_request(load):
    with running(lambda: SlowReader(load(), 0), request_timeout_s=0.5) as server, server.client() as client:
        codes: list[tuple[int, str, float]] = []

        def ask(prompt: str) -> None:
            start = time.monotonic()
            reply = httpx.post(
                f"{server.url}/v1/completions",
                json={"model": MODEL, "prompt": prompt, "max_tokens": 1},
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=30,
            )
            code = reply.json()["error"]["code"] if reply.status_code != 200 else ""
            codes.append((reply.status_code, code, time.monotonic() - start))

        slow = threading.Thread(target=ask, args=("slow",))
        slow.start()
        time.sleep(0.1)
        quick = client.post("/v1/completions", json={"model": MODEL, "prompt": "quick", "max_tokens": 1})
        slow.join()
        assert quick.status_code == 200  # though the other is still being read
        [(status, code, taken_s)] = codes
        assert (status, code) == (504, "request_timeout") and taken_s < 4


def test_long_texts_wait_for_long_ones_alone(load):
    with running(load) as server, server.client() as client:
        long_ones = [server.service.text_threads.submit(2**20, lambda: time.sleep(1)) for _ in range(3)]
        start = time.monotonic()
        reply = client.post("/v1/completions", json={"model": MODEL, "prompt": "quick", "max_tokens": 1})
        assert reply.status_code == 200 and time.monotonic() - start < 0.9
        assert not long_ones[-1].done()


def test_all_prompts_of_a_request_have_a_limit_together(load):
    with running(load, max_body_bytes=2**23) as server, server.client() as client:
        server.service.require_model().text_bound = TextBound(1000)  # of a tokenizer that may make few tokens of it
        body = {"model": MODEL, "prompt": ["word " * 40_000] * 30, "max_tokens": 1}
        error = client.post("/v1/completions", json=body).json()["error"]
        assert error["code"] == "context_length_exceeded" and "in all prompts" in error["message"]
