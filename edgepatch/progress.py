"""How far long work is: one callback for the whole library, and the lines that a log file holds of it."""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import edgepatch

LEAST_S, LEAST_SHARE, SURE_S = 3.0, 0.02, 30.0
"""The time that is left is told from so many seconds on, where so much of the work or so much time stands behind it."""

SILENCE_S = 30.0
"""After so long without a line the last one is told again, with the time that has passed."""

START = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ edgepatch ")
NOTHING_KEPT = "nothing is kept; the same command starts again"


class Progress(Protocol):
    """Told of long work: (stage, units done, units in all), and figures of the moment by name: loss, accuracy.

    A stage begins with what is done of it already. One whose units cannot be counted is one unit.
    """

    def __call__(self, stage: str, done: int, total: int, /, **figures: float) -> None: ...


def silent(stage: str, done: int, total: int, /, **figures: float) -> None:
    """Progress that nobody asked for."""


def within(progress: Progress, name: str) -> Progress:
    """Progress of a part of the work, whose stages get the part's name in front."""
    return lambda stage, done, total, /, **figures: progress(f"{name} {stage}", done, total, **figures)


@contextmanager
def stage(progress: Progress, name: str) -> Iterator[None]:
    """A stage of one unit."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)


# Time.


@dataclass
class Course:
    """How far a stage is.

    Attributes:
        began: when it was first told of, in seconds of a monotonic clock.
        first: units that were done by then; what a run before this one did says nothing about this one's speed.
        done, total: units.
    """

    began: float
    first: int
    done: int
    total: int

    @property
    def share(self) -> float:
        """Of the work, that is done: 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    def left_s(self, now: float) -> float | None:
        """Seconds until the end at the speed so far; ``None`` while that is a guess."""
        elapsed, moved = now - self.began, self.done - self.first
        work = self.total - self.first
        if moved <= 0 or elapsed < LEAST_S or (moved < LEAST_SHARE * work and elapsed < SURE_S):
            return None
        return elapsed / moved * max(0, self.total - self.done)


class Courses:
    """The stages of some work by name; one that begins anew, or with another total, is a new one."""

    def __init__(self) -> None:
        self._known: dict[str, Course] = {}

    def update(self, name: str, done: int, total: int, now: float) -> tuple[Course, bool]:
        """The stage as it is now, and whether this is news: it begins, or it ends."""
        course = self._known.get(name)
        if course is None or done < course.done or total != course.total:
            course = self._known[name] = Course(now, done, done, total)
            return course, True
        is_end = done >= total > course.done
        course.done = done
        return course, is_end


@dataclass(frozen=True)
class Rhythm:
    """How often lines are written: at the latest after ``most_s`` seconds; after ``least_s`` where a ``share`` of the work was done."""

    least_s: float
    most_s: float
    share: float

    def is_due(self, seconds: float, share: float) -> bool:
        """Whether a line is due.

        Args:
            seconds: since the last one.
            share: of the work, that was done since then.
        """
        return seconds >= self.most_s or (seconds >= self.least_s and share >= self.share)


OF_LOG, OF_STREAM = Rhythm(2, 5, 0.05), Rhythm(5, 30, 0.05)


def duration(seconds: float) -> str:
    """For people: "62 s", "2 min 25 s", "3 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def describe(name: str, course: Course, now: float, figures: dict[str, float]) -> str:
    """For example "DPO 120/400 30 % elapsed 62 s left 2 min 25 s loss 1.234"."""
    words = [f"{name} {course.done}/{course.total} {int(course.share * 100)} % elapsed {duration(now - course.began)}"]
    left = course.left_s(now)
    if left is not None and course.done < course.total:
        words.append(f"left {duration(left)}")
    return " ".join([*words, *(f"{figure} {value:.4g}" for figure, value in figures.items())])


def time_stamp() -> str:
    """Now, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# Lines.


class Lines:
    """Progress as lines, each when it is due.

    Args:
        write: gets a line without its end.
        rhythm: how often.
        clock: seconds that only rise.
    """

    def __init__(
        self, write: Callable[[str], None], rhythm: Rhythm, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._rhythm, self._clock = write, rhythm, clock
        self._courses, self._lock = Courses(), threading.Lock()
        self._present: tuple[str, Course, dict[str, float]] | None = None
        self._told, self._told_at, self._told_share = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int, /, **figures: float) -> None:
        """As ``Progress``."""
        with self._lock:
            now = self._clock()
            course, is_news = self._courses.update(stage, done, total, now)
            self._present = (stage, course, figures)
            since = now - self._told_at
            if is_news or stage != self._told or self._rhythm.is_due(since, course.share - self._told_share):
                self._tell(now)

    def tick(self) -> None:
        """Tells once more of a stage that says nothing for long: it is at work still."""
        with self._lock:
            now = self._clock()
            if self._present and self._present[1].share < 1 and now - self._told_at >= SILENCE_S:
                self._tell(now)

    def _tell(self, now: float) -> None:
        assert self._present is not None  # there is no line about nothing
        stage, course, figures = self._present
        self._told, self._told_at, self._told_share = stage, now, course.share
        self._write(f"{time_stamp()} {describe(stage, course, now, figures)}")


class LogFile:
    """A file that lines are added to. What cannot be written is told once; the work goes on without a log.

    The file begins with the first line, so that nothing is left of work that is refused at once.

    Args:
        path: a new file, or a log of ours.
        tell: gets the reason where there is no log.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path, self._tell = path, tell
        self._descriptor, self._is_lost = -1, False

    @property
    def is_begun(self) -> bool:
        """Whether there is a line."""
        return self._descriptor >= 0

    def write(self, line: str) -> None:
        """Adds a line."""
        if self._is_lost:
            return
        try:
            if self._descriptor < 0:
                self._descriptor = _open_log(self.path)
                self._append(f"{time_stamp()} edgepatch {edgepatch.__version__}: {command_line()}")
            self._append(line)
        except OSError as error:
            self._is_lost = True
            self._tell(f"no log in {self.path}: {error.strerror or error}; the work goes on")

    def _append(self, line: str) -> None:
        data = (re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", line) + "\n").encode("utf-8", "replace")
        if os.write(self._descriptor, data) != len(data):
            raise OSError(None, "the disk is full")

    def close(self) -> None:
        """Nothing is written afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._is_lost = -1, True


def command_line() -> str:
    """The command that this process runs."""
    name = Path(sys.argv[0]).name
    is_ours = name == "edgepatch" or Path(sys.argv[0]).parent.name == "cli"
    return shlex.join(["edgepatch" if is_ours else name, *sys.argv[1:]])


def published_command() -> str:
    """The command that this process runs, as results name it: without the folders of this machine."""
    return shlex.join(re.sub(r"^(--[\w-]+=)?/.*/", r"\1", word) for word in shlex.split(command_line()))


def _open_log(path: Path) -> int:
    """A descriptor that appends; a file that is no log stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # With O_NONBLOCK a pipe that nobody reads fails when it is full, instead of stopping the work.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            if not START.match(os.pread(descriptor, 64, 0)):
                raise OSError(None, "it holds something else than a log")
            if os.pread(descriptor, 1, status.st_size - 1) != b"\n":  # a full disk cut the last line
                os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Stream:
    """Lines on an open file, as long as somebody reads them."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._is_lost = write, False

    def __call__(self, line: str) -> None:
        """Adds a line."""
        if self._is_lost:
            return
        try:
            self._write(line + "\n")
        except (OSError, ValueError):  # ValueError: it is closed
            self._is_lost = True


@contextmanager
def logged(
    path: Path | None,
    tell: Callable[[str], None],
    others: Sequence[Lines | Progress] = (),
    kept: Callable[[], str] = lambda: NOTHING_KEPT,
) -> Iterator[Progress]:
    """Progress of some work in a log file and wherever else; the log's last line says how the work ended.

    Args:
        path: of the log, or ``None``.
        tell: gets what the user must know: that there is no log, or what is left of work that a signal ended.
        others: told as well.
        kept: what is left of it, and how to go on.
    """
    log = LogFile(path, tell) if path else None
    listeners: list[Lines | Progress] = [*([Lines(log.write, OF_LOG)] if log else []), *others]
    place, ending, began = "the start", "finished", time.monotonic()

    def progress(stage: str, done: int, total: int, /, **figures: float) -> None:
        nonlocal place
        place = f"{stage} {done}/{total}"
        for each in listeners:
            each(stage, done, total, **figures)

    try:
        with _heartbeat([each for each in listeners if isinstance(each, Lines)]):
            yield progress
    except KeyboardInterrupt:
        ending = f"interrupted at {place}: {kept()}"
        with suppress(OSError):  # the terminal may be gone
            tell(ending)
        raise
    except BaseException as error:
        reason = next(iter(str(error).splitlines()), "")
        ending = f"stopped at {place}: {type(error).__name__}: {reason}"
        raise
    finally:
        if log:
            if log.is_begun:
                log.write(f"{time_stamp()} {ending}; {duration(time.monotonic() - began)} in all")
            log.close()


@contextmanager
def _heartbeat(lines: Sequence[Lines]) -> Iterator[None]:
    end = threading.Event()

    def beat() -> None:
        while not end.wait(1):
            for each in lines:
                each.tick()

    thread = threading.Thread(target=beat, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
