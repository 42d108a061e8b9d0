"""The fuzzer finds what it is for, and finds nothing in a short run over each reader."""

from __future__ import annotations

import random
import time

import pytest

from attacks import fuzz
from edgepatch.errors import PatchFormatError


def reader(data: bytes) -> None:
    if data[:1] == b"x":
        raise KeyError("a bug")
    if data[:1] == b"s":
        time.sleep(0.05)
    if data[:1] == b"r":
        raise PatchFormatError("refused")


@pytest.mark.parametrize(("data", "crashes", "accepted"), [(b"x", 1, 0), (b"s", 1, 1), (b"r", 0, 0), (b"", 0, 1)])
def test_crashes_and_hangs_are_counted(monkeypatch, data, crashes, accepted):
    monkeypatch.setattr(fuzz, "HANG_S", 0.04)
    tally = fuzz.Tally()
    fuzz.try_input(fuzz.Target(reader, list, fuzz.mutated_bytes), data, tally)
    assert (tally.inputs, len(tally.crashes), tally.accepted) == (1, crashes, accepted)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_short_run_over_each_reader(name):
    target = fuzz.TARGETS[name]
    target.read(target.seeds()[0])
    tally = fuzz.blind(target, 30, 600)
    assert tally.inputs == 600 and not tally.crashes


def test_mutants_differ_and_are_repeatable():
    (seed,) = fuzz.TARGETS["trust root"].seeds()
    mutants = [fuzz.mutated_bytes(seed, random.Random(n)) for n in range(50)]
    assert mutants == [fuzz.mutated_bytes(seed, random.Random(n)) for n in range(50)] and len(set(mutants)) > 40
