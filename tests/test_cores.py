"""How many threads: the rule on made snapshots, what the system says, and one look at cores that are really busy."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepatch import cores, defaults
from edgepatch.cores import Allowance, CoreWatch, Snapshot, choose_threads
from edgepatch.errors import InputError
from edgepatch.runtimes import load_runtime

TWO, FOUR = (tuple(frozenset({cpu}) for cpu in range(count)) for count in (2, 4))
HYPERTHREADS = (frozenset({0, 2}), frozenset({1, 3}))


def after(shares: list[float], own_s: float = 0.0, group_s: float = 0.0, seconds: float = 0.1) -> Snapshot:
    """What a look sees that began with a fresh ``Snapshot``: the busy share of each logical CPU."""
    ticks = round(1000 * seconds)
    return Snapshot(
        {cpu: round(share * ticks) for cpu, share in enumerate(shares)},
        dict.fromkeys(range(len(shares)), ticks),
        own_s,
        group_s,
        seconds,
    )


@pytest.mark.parametrize(
    ("later", "allowance", "threads", "busy"),
    [
        (after([0, 0]), Allowance(TWO), 2, 0),
        (after([1, 0]), Allowance(TWO), 1, 1),
        (after([1, 1]), Allowance(TWO), 1, 2),  # at least one
        (after([0.1, 0.1]), Allowance(TWO), 2, 0.2),  # what a system does anyway
        (after([0.5, 0]), Allowance(TWO), 1, 0.5),  # half a core of other work holds up a barrier
        (after([1, 0], own_s=0.1), Allowance(TWO), 2, 0),  # it is ourselves who load a model
        (after([1, 1], own_s=0.1), Allowance(TWO), 1, 1),
        (after([0.4, 0.5, 0.6, 0.5]), Allowance(FOUR), 2, 2),
        (after([1, 1, 0, 0]), Allowance(FOUR[2:]), 2, 0),  # others are busy on cores that are not ours
        (after([1, 0, 0, 0]), Allowance(HYPERTHREADS), 1, 1),  # a core whose other thread is busy is not free
        (after([1, 0, 1, 0]), Allowance(HYPERTHREADS), 1, 1),  # both threads of one core: one core
        (after([0, 0, 0, 0]), Allowance(HYPERTHREADS), 2, 0),
        (after([0] * 4), Allowance(FOUR, quota=2.0), 2, 0),
        (after([0] * 4), Allowance(FOUR, quota=1.5), 1, 0),
        (after([0] * 4), Allowance(FOUR, quota=0.5), 1, 0),
        (after([1, 1, 0, 0], group_s=0.1), Allowance(FOUR, quota=3.0), 2, 2),  # of the quota another process has one
        (after([1, 0, 0, 0], group_s=0.1), Allowance(FOUR, quota=2.0), 1, 1),
        (after([1, 0, 0, 0], own_s=0.1, group_s=0.1), Allowance(FOUR, quota=2.0), 2, 0),
        (after([0] * 4), Allowance(FOUR, limit=3), 3, 0),
        (after([1] * 4), Allowance(FOUR, limit=3), 1, 4),  # an upper bound, not a wish for more
    ],
)
def test_the_rule(later, allowance, threads, busy):
    zero = Snapshot(dict.fromkeys(later.busy, 0), dict.fromkeys(later.total, 0))
    choice = choose_threads(zero, later, allowance)
    assert (choice.threads, choice.busy) == (threads, pytest.approx(busy, abs=0.02))
    assert str(choice).startswith(f"{threads} of {allowance.usable} (")


def test_the_choice_explains_itself():
    choice = choose_threads(Snapshot(), after([1, 0]), Allowance(TWO))
    assert str(choice) == "1 of 2 (other work keeps 1.0 cores busy)"
    choice = choose_threads(Snapshot(), after([0] * 4), Allowance(FOUR, limit=2))
    assert str(choice) == "2 of 4 (other work keeps 0.0 cores busy; OMP_NUM_THREADS allows 2)"


def test_counters_that_stand_still_leave_the_load_average_or_nothing(monkeypatch):
    """As in a sandbox that shows an empty /proc/stat, and on systems without one."""
    monkeypatch.setattr(os, "getloadavg", lambda: (2.9, 0.0, 0.0))
    monkeypatch.setattr(sys, "platform", "linux")
    assert choose_threads(Snapshot(), Snapshot(), Allowance(FOUR)).threads == 1
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    assert choose_threads(Snapshot(), Snapshot(), Allowance(FOUR)).busy == 4
    monkeypatch.setattr(sys, "platform", "darwin")
    choice = choose_threads(Snapshot(), Snapshot(), Allowance(FOUR))
    assert choice.threads == 4 and choice.busy is None and "not measured" in str(choice)


@pytest.mark.parametrize(
    ("text", "limit"), [("4", 4), (" 3 ", 3), ("8,2", 8), ("0", None), ("", None), ("-1", None), ("many", None)]
)
def test_the_users_own_limit(monkeypatch, text, limit):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert cores.read_allowance().limit == limit


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),  # the tightest above us
        ("0::/on/the/host\n", {"cpu.max": "200000 100000\n"}, 2.0),  # a container's path is not its own
        ("2:cpuacct:/\n1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:cpu:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "1\n", "cpu,cpuacct/cpu.cfs_period_us": "0\n"}, None),
        ("", {}, None),
    ],
)
def test_quota_of_control_groups(tmp_path, monkeypatch, groups, files, quota):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    read = cores._text
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "_text", lambda path: groups if path == Path("/proc/self/cgroup") else read(path))
    assert cores.read_allowance().quota == quota


def test_a_snapshot_of_this_machine():
    if not cores.STAT_FILE.is_file():
        pytest.skip("no /proc/stat here")
    allowance, snapshot = cores.read_allowance(), cores.read_snapshot()
    assert {cpu for core in allowance.cores for cpu in core} <= set(snapshot.total)
    assert all(snapshot.busy[cpu] <= snapshot.total[cpu] for cpu in snapshot.total)
    assert 1 <= allowance.usable <= (os.cpu_count() or 1)


def test_cores_that_are_busy_are_seen_and_our_own_work_is_not(monkeypatch):
    if not cores.STAT_FILE.is_file():
        pytest.skip("no /proc/stat here")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    usable = cores.read_allowance().usable
    code = "import time\nend = time.time() + 2.5\nprint(flush=True)\nwhile time.time() < end: pass"
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(usable)]
    try:
        for child in children:
            child.stdout.readline()
        watch = CoreWatch()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:  # we compute too, as while a model loads
            pass
        choice = watch.choose()
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()
    assert choice.threads == 1
    assert choice.busy >= (usable - 1) / 2, "what we take from them ourselves does not count"


@pytest.mark.parametrize(("age_s", "wait_s"), [(0.0, cores.WINDOW_S), (0.06, cores.WINDOW_S - 0.06), (5.0, 0.0)])
def test_a_watch_waits_for_the_rest_of_its_window_alone(monkeypatch, age_s, wait_s):
    """Where the model took longer to load, a start pays nothing."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    CoreWatch(look=lambda: Snapshot(at_s=now - age_s), allowance=Allowance(TWO)).choose()
    assert waits == [pytest.approx(wait_s)]


def test_runtimes_take_the_choice_unless_they_are_told(tiny_folder, tiny_ggufs, onnx_folders, monkeypatch):
    for limit in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        monkeypatch.setattr(cores, "read_allowance", lambda limit=limit: Allowance(FOUR, limit=int(limit)))
        monkeypatch.setattr(cores, "read_snapshot", iter([Snapshot(), after([1, 0, 0, 0])] * 2).__next__)
        with load_runtime(tiny_ggufs["F16"], None, context_length=64) as runtime:
            assert (
                runtime.num_threads
                == runtime.backend.model.lib.llama_n_threads(runtime.backend.context.handle)
                == int(limit)
            )
        with load_runtime(onnx_folders["fp32"], None) as runtime:
            assert runtime.num_threads == int(limit)
    with load_runtime(tiny_ggufs["F16"], None, context_length=64, num_threads=2) as runtime:
        assert runtime.num_threads == 2
    with load_runtime(tiny_folder, None) as runtime:
        assert runtime.num_threads is None, "PyTorch's own number"


@pytest.mark.parametrize("number", [-1, 0, 513, 10**5])
def test_a_number_of_threads_that_no_library_takes_is_not_the_models_fault(tiny_ggufs, onnx_folders, number):
    for model in (tiny_ggufs["F16"], onnx_folders["fp32"]):
        with pytest.raises(InputError, match=f"threads: expected 1 to 512, found {number}$"):
            load_runtime(model, None, num_threads=number)


def test_what_doctor_would_choose():
    settings = defaults.chosen_settings()
    assert settings["threads"]["reason"].startswith(f"{settings['threads']['chosen']} of ")
    trial = settings["training_dtype"]
    assert trial["chosen"] in ("float32", "bfloat16") and set(trial["seconds"]) == {"float32", "bfloat16"}
    assert all(0 < seconds < 2 for seconds in trial["seconds"].values()) and trial["chosen"] in trial["reason"]


def test_a_trial_that_dies_is_told_and_ends_nobody(monkeypatch):
    from edgepatch.processes import Outcome

    monkeypatch.setattr(defaults, "run_apart", lambda *_, **__: Outcome(failure="died of SIGILL", signal="SIGILL"))
    trial = defaults.chosen_settings()["training_dtype"]
    assert trial["chosen"] is None and "died of SIGILL" in trial["reason"]
