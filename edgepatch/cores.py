"""How many threads to compute with: the cores that this process may use, less those that other work keeps busy.

The threads of llama.cpp wait for each other at a barrier after every operation, so one that shares its core with other work holds up all
of them: on two cores with other work on both, two threads gave 8 tokens a second where one gave 60.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil, floor
from pathlib import Path

from edgepatch.errors import InputError

WINDOW_S = 0.1
"""The kernel counts in hundredths of a second: a shorter look would see too few of them."""

NOISE = 0.25
"""Cores that may be busy without one of them being taken: what the system itself does, and what counting by ticks gets wrong."""

MOST_THREADS = 512
"""llama.cpp's own bound (GGML_MAX_N_THREADS)."""

LIMIT_VARIABLE = "OMP_NUM_THREADS"
STAT_FILE = Path("/proc/stat")
TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
NUM_COUNTERS = 8  # user nice system idle iowait irq softirq steal; guest time is within user's
IDLE = (3, 4)


@dataclass(frozen=True)
class Snapshot:
    """What had been computed on this machine at one moment.

    Attributes:
        busy, total: logical CPU -> ticks since the start of the machine; empty where the system does not tell.
        own_s: CPU seconds of this process and of its children that have ended.
        group_s: CPU seconds of the control group whose quota binds; 0 where there is none.
        at_s: when, on a clock that never goes back.
    """

    busy: Mapping[int, int] = field(default_factory=dict)
    total: Mapping[int, int] = field(default_factory=dict)
    own_s: float = 0.0
    group_s: float = 0.0
    at_s: float = 0.0


@dataclass(frozen=True)
class Allowance:
    """What this process may use.

    Attributes:
        cores: the logical CPUs of each physical core, of those that the affinity mask leaves; two threads on one core share its units.
        quota: cores' worth of CPU time that the control group gets; ``None`` without a limit.
        limit: most threads that the user allows (``OMP_NUM_THREADS``); ``None`` without one.
    """

    cores: tuple[frozenset[int], ...]
    quota: float | None = None
    limit: int | None = None

    @property
    def usable(self) -> int:
        """Whole cores, at least one."""
        return max(1, min(len(self.cores), floor(self.quota) if self.quota is not None else len(self.cores)))


@dataclass(frozen=True)
class ThreadChoice:
    """How many threads, and why.

    Attributes:
        threads: at least 1.
        usable: cores that this process may use.
        busy: how many of them other work keeps busy; ``None`` where that could not be measured.
        limit: as in ``Allowance``.
    """

    threads: int
    usable: int
    busy: float | None
    limit: int | None = None

    def __str__(self) -> str:
        reasons = ["not measured here" if self.busy is None else f"other work keeps {self.busy:.1f} cores busy"]
        if self.limit is not None and self.limit <= self.threads:
            reasons.append(f"{LIMIT_VARIABLE} allows {self.limit}")
        return f"{self.threads} of {self.usable} ({'; '.join(reasons)})"


class CoreWatch:
    """Looks twice at what the machine computes: now, and when the number of threads is needed. Loading the model lies in between.

    Args:
        look: takes a snapshot.
        allowance: what this process may use.
    """

    def __init__(self, look: Callable[[], Snapshot] | None = None, allowance: Allowance | None = None) -> None:
        self._allowance = allowance or read_allowance()
        self._look = look or read_snapshot
        self._before = self._look()

    def choose(self) -> ThreadChoice:
        """Waits until the look is long enough, if it is not yet."""
        time.sleep(max(0.0, self._before.at_s + WINDOW_S - time.monotonic()))
        return choose_threads(self._before, self._look(), self._allowance)


def begin_choice(num_threads: int | None) -> Callable[[], int]:
    """The number that the caller asks for; where there is none a look at the machine begins, and calling the result ends it.

    Raises:
        InputError: it is a number that no library computes with: llama.cpp dies of more, and what is not the model's fault is not to
            look like it.
    """
    if num_threads is not None:
        if not 1 <= num_threads <= MOST_THREADS:
            raise InputError(f"threads: expected 1 to {MOST_THREADS}, found {num_threads}")
        return lambda: num_threads
    watch = CoreWatch()
    return lambda: watch.choose().threads


def choose_threads(before: Snapshot, after: Snapshot, allowance: Allowance) -> ThreadChoice:
    """Threads for the cores that were free between two snapshots; what this process computed itself does not count as busy."""
    usable, busy = allowance.usable, _busy_cores(before, after, allowance)
    taken = 0 if busy is None else ceil(max(0.0, busy - NOISE))
    free = min(len(allowance.cores) - taken, usable)
    if allowance.quota is not None:
        free = min(free, floor(allowance.quota - _others_in_group(before, after) + NOISE))
    threads = max(1, free if allowance.limit is None else min(free, allowance.limit))
    return ThreadChoice(threads, usable, busy, allowance.limit)


def _busy_cores(before: Snapshot, after: Snapshot, allowance: Allowance) -> float | None:
    """Cores' worth of other work on the cores that may be used; the load average where the kernel's counters stand still."""
    shares = [sum(_share(before, after, cpu) for cpu in core) for core in allowance.cores]
    if not any(after.total.get(cpu, 0) > before.total.get(cpu, 0) for core in allowance.cores for cpu in core):
        return _load_average(len(allowance.cores))
    seconds = max(after.at_s - before.at_s, 1e-9)
    return max(0.0, sum(min(1.0, share) for share in shares) - (after.own_s - before.own_s) / seconds)


def _share(before: Snapshot, after: Snapshot, cpu: int) -> float:
    passed = after.total.get(cpu, 0) - before.total.get(cpu, 0)
    return (after.busy.get(cpu, 0) - before.busy.get(cpu, 0)) / passed if passed > 0 else 0.0


def _others_in_group(before: Snapshot, after: Snapshot) -> float:
    """Cores' worth of the quota that other processes of the control group use up."""
    used = (after.group_s - before.group_s) - (after.own_s - before.own_s)
    return max(0.0, used / max(after.at_s - before.at_s, 1e-9))


def _load_average(cores: int) -> float | None:
    """Of the last minute; ``None`` on systems whose figure also counts what only waits, or that have none."""
    if sys.platform != "linux":
        return None
    with suppress(OSError):
        return min(float(cores), os.getloadavg()[0])
    return None


# What the system says.


def read_snapshot() -> Snapshot:
    """The machine as it is now."""
    busy, total = {}, {}
    for cpu, *counters in re.findall(r"^cpu(\d+)" + r" +(\d+)" * NUM_COUNTERS, _text(STAT_FILE), re.MULTILINE):
        ticks = [int(c) for c in counters]
        total[int(cpu)] = sum(ticks)
        busy[int(cpu)] = sum(ticks) - sum(ticks[i] for i in IDLE)
    times = os.times()  # of children that have ended: one may have tried the model in between
    own_s = time.process_time() + times.children_user + times.children_system
    return Snapshot(busy, total, own_s, _group_seconds(), time.monotonic())


def read_allowance() -> Allowance:
    """What affinity, control group and environment leave to this process."""
    has_mask = hasattr(os, "sched_getaffinity")
    cpus = sorted(os.sched_getaffinity(0)) if has_mask else list(range(os.cpu_count() or 1))
    cores: dict[str, set[int]] = {}
    for cpu in cpus:
        siblings = _text(TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip()
        cores.setdefault(siblings or str(cpu), set()).add(cpu)
    group = _limited_group()
    return Allowance(tuple(frozenset(core) for core in cores.values()), group[0] if group else None, _thread_limit())


def _thread_limit() -> int | None:
    """The first number of ``OMP_NUM_THREADS`` (the others are for nested regions); ``None`` where it says nothing of use."""
    number = re.match(r"\s*(\d+)\s*(,|$)", os.environ.get(LIMIT_VARIABLE, ""))
    return int(number[1]) if number and int(number[1]) > 0 else None


def _limited_group() -> tuple[float, Path] | None:
    """Quota in cores, and the folder that tells it, of the control group with the tightest quota among ours and those above it."""
    quotas = [(quota, folder) for folder in _group_folders() if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _group_folders() -> list[Path]:
    """Folders of this process's control groups that may limit CPU time, of version 2 and 1, up to the root of each hierarchy."""
    folders: list[Path] = []
    for _, controllers, path in re.findall(r"^(\d+):([^:]*):(.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE):
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        # In a container the path is often that of the host, which is not there: the root then is the container's own group.
        own = Path(path.lstrip("/"))
        folders += [root / part for part in (own, *own.parents)]
    return folders


def _quota(folder: Path) -> float | None:
    """Cores' worth of CPU time; ``None`` without a limit."""
    words = _text(folder / "cpu.max").split()
    if not words:
        words = (_text(folder / "cpu.cfs_quota_us") + " " + _text(folder / "cpu.cfs_period_us")).split()
    if len(words) != 2 or not all(re.fullmatch(r"\d+", word) for word in words) or int(words[1]) == 0:
        return None  # "max" and -1: no limit
    return int(words[0]) / int(words[1])


def _group_seconds() -> float:
    """CPU seconds of the control group whose quota binds."""
    group = _limited_group()
    if group is None:
        return 0.0
    microseconds = re.search(r"^usage_usec (\d+)", _text(group[1] / "cpu.stat"), re.MULTILINE)
    if microseconds:
        return int(microseconds[1]) / 1e6
    nanoseconds = _text(group[1] / "cpuacct.usage").strip()
    return int(nanoseconds) / 1e9 if nanoseconds.isdigit() else 0.0


def _text(path: Path) -> str:
    """A small file of the system; empty where it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
