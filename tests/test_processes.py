"""Children: what they answer, how they may end, and that their end is never ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.processes import run_apart
from edgepatch.processes.kept import KeptChild
from edgepatch.processes.programs import Ended, run_program, running

HERE = "child_tasks"


@pytest.fixture(autouse=True)
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of functions for the child, found as this process finds its own."""
    (tmp_path / f"{HERE}.py").write_text(
        textwrap.dedent("""
            import ctypes, os, signal, subprocess, sys, time
            from edgepatch.errors import InputError, MismatchError

            def echo(value): print("noise on stdout"); return {"got": value, "cwd_first": sys.path[0]}
            def die(number): os.kill(os.getpid(), number)
            def crash(_): ctypes.string_at(0)
            def leave(code): print("last words", file=sys.stderr); sys.stderr.flush(); os._exit(code)
            def hang(marker): open(marker, "w").write(str(os.getpid())); time.sleep(600)
            def refuse(_): raise InputError("expected a, found b", hint="do c")
            def mismatch(_): raise MismatchError({"vocab_size": (1, 2)})
            def fail(_): raise ZeroDivisionError("by zero")
            def odd(_): return object()
            def variable(name): return os.environ.get(name)
            def do(request): return globals()[request[0]](*request[1:])
            def process(): return os.getpid()
            def spin():
                while True: pass
            def fill(size): return len(bytearray(size))
        """),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_an_answer_comes_back_whatever_is_printed():
    outcome = run_apart(f"{HERE}:echo", {"a": [1, "ä"]}, deadline_s=60)
    assert outcome.value["got"] == {"a": [1, "ä"]} and outcome.failure == "" and outcome.error is None


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGILL, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL])
def test_a_signal_is_told_by_name(number: signal.Signals):
    outcome = run_apart(f"{HERE}:die", int(number), deadline_s=60)
    assert outcome.signal == number.name and outcome.failure == f"died of {number.name}" and outcome.value is None


def test_a_real_fault_in_c_ends_the_child_alone():
    assert run_apart(f"{HERE}:crash", None, deadline_s=60).signal == "SIGSEGV"


@pytest.mark.parametrize("code", [0, 1, 7])
def test_an_end_without_an_answer_is_a_failure(code: int):
    outcome = run_apart(f"{HERE}:leave", code, deadline_s=60)
    assert outcome.value is None and outcome.failure == f"failed (exit code {code}): last words"


def test_errors_raised_on_purpose_keep_kind_words_and_hint():
    error = run_apart(f"{HERE}:refuse", None, deadline_s=60).error
    assert type(error) is InputError and str(error) == "expected a, found b" and error.hint == "do c"
    other = run_apart(f"{HERE}:mismatch", None, deadline_s=60).error
    assert type(other) is EdgepatchError and "vocab_size" in str(other)


@pytest.mark.parametrize(
    ("function", "words"), [("fail", "by zero"), ("odd", "not JSON serializable"), ("absent", "absent")]
)
def test_other_errors_are_failures_with_their_last_line(function: str, words: str):
    assert words in run_apart(f"{HERE}:{function}", None, deadline_s=60).failure


def test_a_child_that_hangs_is_ended(tmp_path: Path):
    outcome = run_apart(f"{HERE}:hang", str(tmp_path / "pid"), deadline_s=3)
    assert outcome.failure == "did not answer within 3 s"
    assert not _alive(int((tmp_path / "pid").read_text()))


def test_variables_are_set_for_the_child_alone():
    outcome = run_apart(
        f"{HERE}:variable", "EDGEPATCH_TEST_CHILD", deadline_s=60, environment={"EDGEPATCH_TEST_CHILD": "x"}
    )
    assert outcome.value == "x" and "EDGEPATCH_TEST_CHILD" not in os.environ


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_child_does_not_outlive_its_parent(tmp_path: Path, number: signal.Signals):
    marker = tmp_path / "pid"
    code = f"import sys; sys.path[:0] = {sys.path!r}; from edgepatch.processes import run_apart; run_apart('{HERE}:hang', {str(marker)!r}, deadline_s=600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (marker.is_file() and marker.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(60)
    for _ in range(100):
        if not _alive(int(marker.read_text())):
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def kept() -> Iterator[KeptChild]:
    child = KeptChild(f"{HERE}:do", 2**28)
    yield child
    child.close()


def test_a_kept_child_answers_again_and_again(kept: KeptChild):
    first = kept.ask(["process"], 10).value
    assert first not in (None, os.getpid()) and kept.ask(["process"], 10).value == first
    refused = kept.ask(["refuse", None], 10).error
    assert isinstance(refused, InputError) and refused.hint == "do c"
    assert kept.ask(["process"], 10).value == first  # an error raised on purpose ends nothing


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_kept_child_that_dies_is_replaced(kept: KeptChild, number: signal.Signals):
    first = kept.ask(["process"], 10).value
    assert kept.ask(["die", number], 10).signal == number.name
    assert kept.ask(["process"], 10).value not in (None, first)


def test_a_kept_child_has_limits_of_time_and_memory(kept: KeptChild):
    failure = kept.ask(["spin"], 0.2).failure
    assert failure in ("used more than 0.2 s of computing time", "did not answer within 1.2 s")  # on a busy machine
    assert kept.ask(["hang", os.devnull], 0.2).failure == "did not answer within 1.2 s"
    assert kept.ask(["fill", 2**20], 10).value == 2**20
    assert kept.ask(["fill", 2**30], 10).failure
    with pytest.raises(TypeError):
        kept.ask([object()], 10)
    assert kept.ask(["fill", 2**20], 10).value == 2**20


def test_a_prepared_request_harms_none_that_follows(kept: KeptChild):
    kept.prepare(["fill", 1], 10)
    assert kept.ask(["fill", 2], 10).value == 2
    for evil in (["die", signal.SIGSEGV], ["spin"]):
        kept.prepare(evil, 0.2)
        assert kept.ask(["fill", 3], 10).value == 3


def test_a_kept_child_belongs_to_the_process_that_started_it(kept: KeptChild):
    first = kept.ask(["process"], 10).value
    if not (fork := os.fork()):
        own = kept.ask(["process"], 10).value
        kept.close()
        os._exit(own == first)
    assert os.waitpid(fork, 0)[1] == 0
    assert kept.ask(["process"], 10).value == first


def test_a_kept_child_does_not_outlive_its_parent(tmp_path: Path):
    code = f"from edgepatch.processes.kept import KeptChild as K; import os; print(K('{HERE}:do', 2**28).ask(['process'], 10).value, flush=True); os.kill(os.getpid(), 9)"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    child = Path("/proc", done.stdout.strip())
    end = time.monotonic() + 10
    while (
        child.exists() and "Z" not in (child / "stat").read_text().rsplit(")")[-1].split()[0] and time.monotonic() < end
    ):
        time.sleep(0.02)
    assert done.stdout.strip() and time.monotonic() < end


# Other programs.


def test_a_program_that_does_its_work(tmp_path: Path):
    code = (
        "import os, sys; print(os.getcwd(), os.environ['WORD'], sys.stdin.read() == ''); print('so', file=sys.stderr)"
    )
    done = run_program([sys.executable, "-c", code], environment={"WORD": "ä"}, folder=tmp_path)
    assert done == Ended(f"{tmp_path} ä True\n", "so\n", "")


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import sys; print('first', file=sys.stderr); sys.exit('last\\n\\n')", "failed (exit code 1): last"),
        ("raise SystemExit(3)", "failed (exit code 3): it said nothing"),
        ("import os; os.kill(os.getpid(), 11)", "died of SIGSEGV"),
        ("import time; time.sleep(600)", "was not done within 1 s"),
    ],
)
def test_a_program_that_fails(code: str, failure: str):
    assert run_program([sys.executable, "-c", code], deadline_s=1 if "sleep" in code else 60).failure == failure


def test_a_program_that_is_not_there(tmp_path: Path):
    assert run_program([tmp_path / "none"]).failure == "could not be started: No such file or directory"


def test_a_program_is_ended_with_what_it_started(tmp_path: Path):
    pid = tmp_path / "pid"
    code = f"import subprocess, time; open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)"
    assert run_program([sys.executable, "-c", code], deadline_s=3).failure
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.05)


def test_a_program_beside_this_process_ends_with_the_block(tmp_path: Path):
    with (
        (tmp_path / "log").open("wb") as log,
        running([sys.executable, "-c", "print('up', flush=True); input()"], log) as child,
    ):
        assert child.wait(60) == 1  # nothing to read
    assert b"up" in (tmp_path / "log").read_bytes() and b"EOFError" in (tmp_path / "log").read_bytes()
    with running(["sleep", "600"]) as child:
        assert child.poll() is None
    assert child.returncode == -signal.SIGKILL
