"""The clients of the load: each kind of request brings what it must, and what should not happen is seen."""

import os
import random
from collections import Counter

import pytest

from edgepatch.bench.served import Served
from edgepatch.bench.server_load.clients import load
from edgepatch.bench.server_load.requests import SHARES, draw
from edgepatch.bench.server_load.throughput import STREAMS, Endpoint, throughput
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
