"""A store whose process ends, or whose disk fails, at any step of any change: the old state or the new one, and it goes on."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from attacks import store as harness
from attacks.faults import Faults, Killed, faulty
from attacks.store import DISK_ERRORS, VERBS, Case
from edgepatch.errors import EdgepatchError
from edgepatch.store import files
from edgepatch.store.device import Store
from kit.amounts import examples

KILLS = examples(20, 60)
"""Of real processes; ``edgepatch bench security --only F4`` kills 60."""


EVERY = {verb: 1 if verb in ("apply", "rollback") else examples(3, 1) for verb in VERBS}
"""Of so many steps of a verb one is taken here; ``edgepatch bench security --only F4 --only F5`` takes all."""


@pytest.mark.parametrize("verb", VERBS)
def test_the_process_ends_at_every_step(tmp_path, verb):
    points, wrong = harness.injected_kills(tmp_path, [verb], EVERY[verb])
    assert points > 25 // EVERY[verb]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("verb", VERBS)
def test_the_disk_fails_at_every_step(tmp_path, verb):
    # `edgepatch bench security` injects all three in all, at every step.
    errors = DISK_ERRORS if verb in ("apply", "rollback") else [errno.ENOSPC]
    every = 1 if verb == "apply" else examples(3, 1)
    points, wrong = harness.injected_errors(tmp_path, [verb], errors, every)
    assert points > 25 // every
    assert not wrong, "\n".join(wrong)


def test_kill_9(tmp_path):
    kills, wrong = harness.real_kills(tmp_path, KILLS)
    assert kills == KILLS
    assert not wrong, "\n".join(wrong)


def test_figures():
    rows = harness.figures(kills=1, verbs=["first root"])
    assert [(row["id"], row["passed"]) for row in rows] == [("F4", True), ("F5", True), ("F6", True)]
    for row in rows[:2]:
        assert re.fullmatch(r"100 % of \d+ injection points", row["value"])


def test_a_disk_that_fails_for_good(tmp_path, monkeypatch):
    """Not even the old state can be put back: the error says so."""
    source = harness._source(tmp_path)
    store = Store(tmp_path / "store")
    harness.prepare(store, source, 3)
    real, synced = files.sync_folder, []

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def fail(path: Path) -> None:
        synced.append(path)
        if path == store.folder:
            monkeypatch.setattr(files, "write_file", refuse)
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(files, "sync_folder", fail)
    with pytest.raises(EdgepatchError, match="Input/output error") as error:
        store.rollback()
    assert "new state" in error.value.hint
    monkeypatch.undo()
    assert store.read()[0].bases[store.find_base(None)].slots["detox"].previous == ()


# --- The harness itself can fail.


def test_the_harness_sees_a_state_that_is_neither(tmp_path, monkeypatch):
    """A store that writes in place, as a careless one does, is caught."""

    def in_place(path: Path, data: bytes) -> None:
        handle = files.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        files.os.write(handle, data)
        files.os.close(handle)

    source = harness._source(tmp_path)
    case = Case("apply", source, tmp_path / "case")
    monkeypatch.setattr(files, "write_file", in_place)
    wrong = [case.kill(at, 0.5) for at in range(len(case.steps))]
    assert any(wrong)


def test_the_harness_sees_what_was_not_made_durable(tmp_path, monkeypatch):
    source = harness._source(tmp_path)
    case = Case("apply", source, tmp_path / "case")
    real = Faults._note
    monkeypatch.setattr(Faults, "_note", lambda self, name, *rest: None if name == "fsync" else real(self, name, *rest))
    monkeypatch.setattr(Faults, "_forget", lambda self, handle: None)
    wrong = [case.kill(at) for at in range(len(case.steps))]
    assert any(wrong)


def test_a_dead_process_does_nothing_more(tmp_path):
    with faulty(Faults(0, None)):
        for _ in range(2):
            with pytest.raises(Killed):
                files.write_file(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []
    files.write_file(tmp_path / "file", b"x")


@pytest.mark.parametrize("error", DISK_ERRORS)
def test_the_message_names_the_fault(tmp_path, error):
    store = Store(tmp_path / "store")
    with faulty(Faults(0, error)), pytest.raises(EdgepatchError, match=re.escape(os.strerror(error))) as caught:
        store.set_root([])
    assert caught.value.exit_code == 1
