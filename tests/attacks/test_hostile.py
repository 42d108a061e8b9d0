"""The hostile client: it draws every kind, a share of its requests harms nobody, and what would be harm is counted."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from attacks import hostile
from attacks.hostile import HANG_S, PATIENCE_S, Bystanders, Tally, attack, attacked, client_of, computed_s, send
from attacks.hostile_requests import CHAT, KINDS, Attack, draw
from edgepatch.bench.served import Served
from kit.amounts import examples

NUMBERS = range(examples(100, 500))
"""Of requests; ``edgepatch bench security --only F15`` sends 5,000."""


@pytest.fixture(scope="module")
def served():
    with attacked() as both:
        yield both


def test_every_kind_is_drawn_and_the_same_each_time():
    drawn = [draw(random.Random(number), "m") for number in range(300)]
    assert len(Counter(one.kind for one in drawn)) == len(KINDS)
    again = [draw(random.Random(number), "m") for number in range(300)]
    assert [repr((one.kind, one.path, one.body)) for one in drawn] == [
        repr((one.kind, one.path, one.body)) for one in again
    ]


def test_hostile_requests_harm_nobody(served: tuple[Served, Bystanders]):
    tally = attack(*served, NUMBERS)
    assert not tally.faults, tally.faults
    assert sum(tally.sent.values()) == len(NUMBERS) and set(tally.statuses) >= {200, 400, 403, 404}
    assert all(tally.replies[who, "whole"] for who in ("stream", "JSON", "canary")), tally.replies


def test_what_is_taken_and_signed_by_another_is_counted(served: tuple[Served, Bystanders]):
    server, tally = served[0], Tally()
    body = {"model": server.model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with client_of(server) as http:
        assert send(http, server, Attack("x", CHAT, body), server.fingerprint, tally) == 200 and not tally.num_faults
        send(http, server, Attack("x", CHAT, body, must_refuse=True), server.fingerprint, tally)
        send(http, server, Attack("x", CHAT, body), "another", tally)
    assert tally.num_faults == 2 and "taken" in tally.faults[0] and "another fingerprint" in tally.faults[1]


def test_long_waits_and_ended_clients_are_counted(served: tuple[Served, Bystanders], monkeypatch: pytest.MonkeyPatch):
    tally = Tally()
    tally.seen("stream", "whole", [(PATIENCE_S + 1, PATIENCE_S - 1), (1, 1)])
    assert tally.num_faults == 0 and tally.longest_s["stream"] == (PATIENCE_S + 1, PATIENCE_S - 1)
    tally.seen("stream", "whole", [(1, 1), (PATIENCE_S + 1, PATIENCE_S + 0.1)])
    tally.seen("stream", "whole", [(HANG_S + 1, 0)])
    assert tally.num_faults == 2

    def ending(*_: object) -> Attack:
        raise OSError("gone")

    monkeypatch.setattr(hostile, "draw", ending)
    assert attack(*served, range(9)).num_faults == hostile.ATTACKERS


def test_computing_is_counted_with_that_of_children():
    code = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    before = computed_s(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", f"{code}\ninput()"], stdin=subprocess.PIPE)
    while computed_s(child.pid) < 0.3:
        assert child.poll() is None
    assert computed_s(os.getpid()) >= before + 0.3
    child.communicate(b"\n")
    assert computed_s(os.getpid()) >= before + 0.3
