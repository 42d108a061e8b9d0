"""The clients of the load: each kind of request brings what it must, and what should not happen is seen."""

import os
import random
from collections import Counter

import pytest

from edgepatch.bench.llama_server.server import instructions_of
from edgepatch.bench.served import Served
from edgepatch.bench.server_load.clients import load
from edgepatch.bench.server_load.requests import SHARES, draw
from edgepatch.bench.server_load.throughput import STREAMS, Endpoint, throughput
from edgepatch.compilation import left_out
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.runtimes import load_runtime
from kit.serving import KEY, MODEL, running


@pytest.fixture(scope="module")
def served(tiny_folder, tiny_patch):
    with running(lambda: load_runtime(tiny_folder, tiny_patch, num_sequences=3)) as server:
        yield Served(server.url, KEY, os.getpid())


def test_all_kinds_are_drawn_and_answered(served):
    rng = random.Random(0)
    assert set(Counter(draw(rng, MODEL, 500, 4).kind for _ in range(500))) == set(SHARES)
    seen = load(served, 3, 4.0, 510, 4)
    assert sum(seen.outcomes.values()) >= 3 and not seen.faults
    assert {outcome for _, outcome in seen.outcomes} <= {"done", "cancelled", "busy"}
    assert set(seen.fingerprints) == {served.fingerprint} and seen.first_token_s


def test_a_reply_that_is_none_is_seen(served, monkeypatch):
    """Asked of a context that is longer than it says, over-long prompts fit, and their replies are no refusals."""
    monkeypatch.setattr("edgepatch.bench.server_load.requests.SHARES", {"over-long": 1})
    seen = load(served, 1, 0.5, 20, 4)
    assert set(seen.outcomes) == {("over-long", "wrong")} and seen.faults


def test_servers_take_turns_and_each_tells_its_rate(served):
    ours = Endpoint(served.url, served.key, MODEL)
    rows = throughput({"one": ours, "other": ours}, 4, [], num_rounds=2)
    assert [row["streams"] for row in rows] == list(STREAMS)
    for rates in (rate for row in rows for rate in row["tokens_per_s"].values()):
        assert 0 < rates["low"] <= rates["median"] <= rates["high"]


@pytest.mark.parametrize("wrong", [{"key": "wrong"}, {"key": ""}, {"model": "another"}, {"num_tokens": 100_000}])
def test_a_stream_that_fails_is_no_rate(served, wrong):
    endpoint = Endpoint(served.url, wrong.get("key", served.key), wrong.get("model", MODEL))
    with pytest.raises(EdgepatchError, match="tokens, found"):
        throughput({"one": endpoint}, wrong.get("num_tokens", 4), [], num_rounds=1)


def program(folder, says):
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n", encoding="utf-8")
    path.chmod(0o700)
    return path


def test_a_llama_server_without_this_cpus_instructions_is_refused(tmp_path):
    everything = "AVX2 = 1 | FMA = 1 | DOTPROD = 1"
    assert instructions_of(program(tmp_path, f"0.1 I system_info: n_threads = 1 / 2 | {everything} | ")) == everything
    if left_out("FMA = 1"):
        with pytest.raises(InputError, match="compiled without"):
            instructions_of(program(tmp_path, "system_info: n_threads = 1 / 2 | FMA = 1 |"))
    with pytest.raises(InputError, match="tells no system_info"):
        instructions_of(program(tmp_path, "error"))
    with pytest.raises(InputError, match="No such file"):
        instructions_of(tmp_path / "missing")
