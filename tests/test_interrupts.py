"""Signals: what is whole stays whole, what a C library calls swallows none, and every long verb says what is left."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from edgepatch import interrupts
from edgepatch.interrupts import Stopped, called_from_c, held_back, orderly
from edgepatch.patch.file import read_patch
from edgepatch.training.config import TrainConfig
from edgepatch.training.pairs.preferences import Pair, write_pairs
from edgepatch.training.patching import PatchTraining
from kit.forks import Fork

BENIGN = [
    "The quick brown fox jumps over the lazy dog.",
    "It sleeps in the warm afternoon sun.",
    "Verify, apply, roll back.",
]


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_each_signal_becomes_an_interrupt_with_its_code(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, orderly():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert isinstance(caught.value, Stopped) and caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with orderly():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGHUP, before)


class Dying:
    """Stopped while it is taken down: Python can raise nothing there."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["destructor", "weak reference"])
def test_a_signal_that_python_cannot_raise_is_not_lost(kind):
    before = sys.unraisablehook
    with pytest.raises(Stopped) as caught, orderly():
        if kind == "destructor":
            Dying()
        else:
            texts = frozenset(BENIGN)
            weak = weakref.ref(texts, lambda _: [os.kill(os.getpid(), signal.SIGINT), time.sleep(0.01)])
            del texts
            assert weak() is None
        time.sleep(5)
    assert caught.value.exit_code == 130 and sys.unraisablehook == before


def test_what_is_held_back_acts_at_the_end():
    done = []
    with pytest.raises(Stopped), orderly():
        with held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            done.append("whole")
        done.append("never")
    assert done == ["whole"]
    with orderly(), held_back():
        done.append("no signal")
    assert done[1:] == ["no signal"]


def test_other_threads_hold_nothing_back():
    """Handlers are the main thread's; in another one the block is just run."""
    done = []

    def work() -> None:
        with orderly(), held_back():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_a_signal_in_a_callback_of_c_is_not_lost():
    """ctypes prints what a callback raises, and goes on."""
    numbers = (ctypes.c_int * 4)(4, 3, 2, 1)
    calls = []

    @called_from_c
    def compare(one, other):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return one[0] - other[0]

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
    began = time.monotonic()
    with pytest.raises(Stopped), orderly():
        ctypes.CDLL(None).qsort(numbers, 4, ctypes.sizeof(ctypes.c_int), kind(compare))
        time.sleep(60)
    assert list(numbers) == [1, 2, 3, 4], "the library came to its end"
    assert time.monotonic() < began + 30, "a call that waits is woken"


# Verbs, in processes of their own.


def stopped_at(line: str, log: Path, number: signal.Signals, *arguments: object) -> tuple[int, str]:
    """(exit code, last line of stderr) of a verb that gets a signal as soon as its log holds a line."""
    size = log.stat().st_size if log.exists() else 0
    with Fork(*arguments) as process:
        while not (log.exists() and line in log.read_text()[size:]):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in errors and "Exception ignored" not in errors
    return process.returncode, errors.splitlines()[-1]


def leftovers(folder: Path) -> list[str]:
    """Files that no verb may leave."""
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


PAIRS = [Pair(f"The fox {i}", " sleeps in the sun", " jumps over the dog", 0.1, 0.9) for i in range(12)]


@pytest.fixture
def training(tiny_folder, tmp_path) -> list[object]:
    """Arguments of a training of seconds."""
    write_pairs(PAIRS, tmp_path / "pairs.jsonl")
    (tmp_path / "benign.txt").write_text("\n".join(BENIGN))
    sizes = ["--num-virtual-tokens", 4, "--batch-size", 4, "--sft-steps", 15, "--dpo-steps", 15, "--pinned"]
    return ["train", tiny_folder, "--pairs", tmp_path / "pairs.jsonl", "--benign", tmp_path / "benign.txt", *sizes]


def test_a_training_that_is_stopped_again_and_again_gives_the_same_patch(training, tiny_folder, tmp_path):
    out, run = tmp_path / "p.safetensors", tmp_path / "run"
    log, command = run / "train.log", [*training, "-o", out, "--run", run]
    for line, number in ((" SFT 0/15 ", signal.SIGTERM), (" DPO ", signal.SIGHUP)):
        code, last = stopped_at(line, log, number, *command)
        assert code == 128 + number and not out.exists()
        assert re.fullmatch(
            rf"interrupted at .+ \d+/\d+: what is trained is kept in {run}; the same command goes .*", last
        )
        assert log.read_text().splitlines()[-1].split(" ", 1)[1].startswith(last) and not leftovers(tmp_path)
    with Fork(*command) as process:
        assert process.wait(timeout=300) == 0, process.communicate()
    config = TrainConfig(num_virtual_tokens=4, batch_size=4, sft_steps=15, dpo_steps=15, block=0, turns=False)
    whole = PatchTraining(tiny_folder, config).soft_prompt(PAIRS, BENIGN, "patch")
    assert np.array_equal(read_patch(out).soft_prompt.embeddings, whole.soft_prompt.embeddings)


def test_a_training_without_a_run_folder_says_that_nothing_is_kept(training, tmp_path):
    out = tmp_path / "p.safetensors"
    code, last = stopped_at(" load model ", tmp_path / "p.safetensors.log", signal.SIGTERM, *training, "-o", out)
    assert code == 143 and "nothing is kept; with --run FOLDER" in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["benign.txt", "p.safetensors.log", "pairs.jsonl"]


def test_a_conversion_that_is_stopped_leaves_nothing_and_no_child(tiny_folder, tmp_path):
    target = tmp_path / "onnx"
    arguments = ("convert", "base", tiny_folder, target, "--to", "onnx")
    code, last = stopped_at(" export ", tmp_path / "onnx.log", signal.SIGTERM, *arguments)
    assert code == 143 and last.endswith("nothing is kept; the same command starts again")
    assert [p.name for p in tmp_path.iterdir()] == ["onnx.log"]
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(target) not in commands


def test_a_demo_that_is_stopped_says_what_stays(tmp_path):
    code, last = stopped_at(" load models ", tmp_path / "demo.log", signal.SIGTERM, "demo", "--lab", "--out", tmp_path)
    assert code == 143 and f"complete files stay in {tmp_path}" in last and "the same command starts again" in last
    assert [p.name for p in tmp_path.iterdir()] == ["demo.log"]


def test_a_background_job_is_not_ended_by_ctrl_c_in_front(training, tmp_path):
    """A shell starts it with SIGINT ignored; it stays so, and SIGTERM ends it."""
    log, out = tmp_path / "p.safetensors.log", tmp_path / "p.safetensors"
    command = [sys.executable, "-m", "edgepatch.cli", *map(str, training), "-o", str(out)]
    ignoring = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=ignoring) as process:
        while not log.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
