"""Progress: the time that is left, the lines of a log, and what is shown on a terminal, in a pipe and on a full disk."""

from __future__ import annotations

import itertools
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgepatch import progress
from edgepatch.progress import OF_LOG, OF_STREAM, Course, Courses, Lines, LogFile, Rhythm, describe, duration, logged

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
TIME = r"\d+ (?:s|min \d+ s|h \d+ min)"
LINE = re.compile(rf"{STAMP} .+ \d+/\d+ \d+ % elapsed {TIME}(?: left {TIME})?(?: \w+ -?[\d.e+-]+)*")
HEADER = re.compile(rf"{STAMP} edgepatch \S+: .+")


def test_results_name_commands_without_folders(monkeypatch: pytest.MonkeyPatch):
    words = ["/opt/bin/edgepatch", "bench", "clients", "/home/me/a b.gguf", "--out=/tmp/x/y.json", "--work", "out/c"]
    monkeypatch.setattr(sys, "argv", words)
    assert progress.published_command() == "edgepatch bench clients 'a b.gguf' --out=y.json --work out/c"


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(rhythm: Rhythm) -> tuple[Lines, Clock, list[str]]:
    written: list[str] = []
    clock = Clock()
    return Lines(written.append, rhythm, clock), clock, written


# Time.


@pytest.mark.parametrize(
    ("first", "done", "total", "seconds", "left"),
    [
        (0, 120, 400, 62, 144.67),
        (100, 200, 400, 50, 100),  # a run that went on counts what it did itself
        (0, 0, 10, 100, None),
        (0, 50, 100, 2, None),  # too early
        (0, 1, 100, 20, None),  # too little
        (0, 1, 100, 40, 3960),  # little, but much time
        (0, 2, 100, 3, 147),
        (10, 10, 10, 5, None),
    ],
)
def test_the_time_left_follows_the_rate_of_this_process(first, done, total, seconds, left):
    actual = Course(1000.0, first, done, total).left_s(1000.0 + seconds)
    assert actual == (None if left is None else pytest.approx(left, abs=0.01))


def test_a_stage_that_starts_over_is_a_new_one():
    courses = Courses()
    assert [courses.update("a", done, 4, now)[1] for now, done in enumerate([0, 1, 4, 4])] == [True, False, True, False]
    again, is_news = courses.update("a", 1, 4, 9.0)
    assert is_news and (again.began, again.first) == (9.0, 1)
    assert courses.update("a", 1, 8, 9.5)[1], "another total"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119.4, "119 s"), (145, "2 min 25 s"), (7199, "119 min 59 s"), (11400, "3 h 10 min")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_line_holds_stage_share_times_and_figures():
    line = describe("DPO", Course(0.0, 0, 120, 400), 62.0, {"loss": 1.2345678, "accuracy": 1.0})
    assert line == "DPO 120/400 30 % elapsed 62 s left 2 min 25 s loss 1.235 accuracy 1"
    assert LINE.fullmatch(f"{progress.time_stamp()} {line}")
    assert describe("pairs", Course(0.0, 0, 399, 400), 2.0, {}).startswith("pairs 399/400 99 %")
    assert describe("nothing", Course(0.0, 0, 0, 0), 0.0, {}) == "nothing 0/0 100 % elapsed 0 s"


# Rhythm.


@pytest.mark.parametrize("rhythm", [OF_LOG, OF_STREAM])
@pytest.mark.parametrize("step_s", [0.01, 0.7, 40])
def test_lines_come_at_least_and_at_most_so_often(rhythm, step_s):
    """First, last and every stage; between them never closer than the least distance, nor further than the most and a step."""
    lines, clock, written = lines_of(rhythm)
    moments = []
    for stage in ("SFT", "DPO"):
        for done in range(201):
            before = len(written)
            lines(stage, done, 200, loss=0.5)
            moments += [(clock.now, done)] * (len(written) - before)
            clock.now += step_s
    assert [w.split(" ")[1:3] for w in (written[0], written[-1])] == [["SFT", "0/200"], ["DPO", "200/200"]]
    assert sum(" DPO 0/200 " in line for line in written) == sum(" SFT 200/200 " in line for line in written) == 1
    steps = [(a[0], b[0]) for a, b in itertools.pairwise(moments) if b[1] not in (0, 200)]
    assert all(b - a >= rhythm.least_s for a, b in steps)
    assert all(b - a <= rhythm.most_s + step_s for a, b in steps)
    assert all(LINE.fullmatch(line) for line in written)


def test_a_stage_that_says_nothing_is_told_again():
    lines, clock, written = lines_of(OF_LOG)
    lines("load model", 0, 1)
    for _ in range(59):
        clock.now += 1
        lines.tick()
    assert len(written) == 2 and written[1].endswith("load model 0/1 0 % elapsed 30 s")
    lines("load model", 1, 1)
    clock.now += 100
    lines.tick()
    assert len(written) == 3, "it is at its end"


# The file.


def test_a_log_begins_with_its_command_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/edgepatch", "train", "a b", "x\ny"])
    path, messages = tmp_path / "new" / "work.log", []
    for _ in range(2):
        with logged(path, messages.append) as tell:
            assert path.exists() == bool(_), "nothing is left of work that never began"
            tell("SFT", 0, 2)
            tell("SFT", 2, 2, loss=0.5)
    lines = path.read_text().splitlines()
    assert len(lines) == 8 and messages == []
    for first in (0, 4):
        assert HEADER.fullmatch(lines[first]) and lines[first].endswith(": edgepatch train 'a b' 'x\ufffdy'")
        assert LINE.fullmatch(lines[first + 1]) and LINE.fullmatch(lines[first + 2])
        assert re.fullmatch(rf"{STAMP} finished; 0 s in all", lines[first + 3])


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (KeyboardInterrupt(), "interrupted at SFT 1/2: all is kept"),
        (ValueError("first\nsecond"), "stopped at SFT 1/2: ValueError: first"),
    ],
)
def test_the_last_line_says_how_the_work_ended(tmp_path, error, ending):
    messages = []
    with pytest.raises(type(error)), logged(tmp_path / "log", messages.append, kept=lambda: "all is kept") as tell:
        tell("SFT", 1, 2)
        raise error
    assert (tmp_path / "log").read_text().splitlines()[-1].split(" ", 1)[1] == f"{ending}; 0 s in all"
    assert messages == ([ending] if isinstance(error, KeyboardInterrupt) else [])


def foreign_file(folder: Path) -> Path:
    (folder / "thesis.txt").write_text("precious\n")
    return folder / "thesis.txt"


@pytest.mark.parametrize(
    "place",
    [
        foreign_file,
        lambda folder: folder,
        lambda folder: Path("/dev/full"),
        lambda folder: foreign_file(folder) / "below.log",
    ],
)
def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, place):
    path, messages, done = place(tmp_path), [], []
    with logged(path, messages.append) as tell:
        for step in range(4):
            tell(f"stage {step}", 0, 1)
            done.append(step)
    assert done == [0, 1, 2, 3]
    assert len(messages) == 1 and str(path) in messages[0] and "the work goes on" in messages[0]
    if (tmp_path / "thesis.txt").exists():
        assert (tmp_path / "thesis.txt").read_text() == "precious\n"


def test_a_torn_last_line_stays_alone(tmp_path):
    path = tmp_path / "log"
    first = LogFile(path, pytest.fail)
    first.write("one")
    first.close()
    path.write_bytes(path.read_bytes() + b"cut in the mid")
    second = LogFile(path, pytest.fail)
    second.write("two")
    second.close()
    lines = path.read_text().splitlines()
    assert [lines[1], lines[2], lines[4]] == ["one", "cut in the mid", "two"] and HEADER.fullmatch(lines[3])


def test_lines_of_several_threads_stay_whole(tmp_path):
    with logged(tmp_path / "log", pytest.fail) as tell:
        threads = [
            threading.Thread(target=lambda n=n: [tell(f"part {n} {i}", 0, 1) for i in range(50)]) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 202 and all(LINE.fullmatch(line) for line in lines[1:-1])


# What a user sees. Each is a process of its own: the standard streams are what it is about.

WORK = """
import os, subprocess, sys, time, warnings
from pathlib import Path
from edgepatch.cli.console import note, progress_bars

with progress_bars(Path(sys.argv[1])) as tell:
    tell("SFT", 0, 100)
    tell("SFT", 50, 100, loss=1.25)
    print("foreign print")
    print("foreign print to stderr", file=sys.stderr)
    warnings.warn("foreign warning")
    os.write(2, b"foreign write\\n")
    subprocess.run(["sh", "-c", "echo foreign child; echo foreign child >&2"])
    import tqdm
    for _ in tqdm.tqdm(range(3), desc="foreign bar"): pass
    note("our note")
    time.sleep(float(sys.argv[2]))
    tell("SFT", 100, 100, loss=1.0)
    if len(sys.argv) > 3: raise ZeroDivisionError("surprise")
print("our result")
"""


def run_work(log: Path, *more: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WORK, str(log), "0", *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_what_is_not_ours_is_put_aside(tmp_path):
    done = run_work(tmp_path / "log")
    assert done.stdout == "our result\n"
    *before, ours, last = done.stderr.splitlines()
    assert ours == "our note" and len(before) == 1 and all(LINE.fullmatch(line) for line in (*before, last))
    assert all(map(LINE.fullmatch, (tmp_path / "log").read_text().splitlines()[1:-1]))


def test_an_error_nobody_expected_brings_it_back(tmp_path):
    done = run_work(tmp_path / "log", "fail")
    assert done.returncode == 1 and "foreign write" in done.stderr and "ZeroDivisionError" in done.stderr


def test_debugging_shows_it_as_it_comes(tmp_path):
    done = run_work(tmp_path / "log", env={**os.environ, "EDGEPATCH_DEBUG": "1"})
    assert "foreign print" in done.stdout and "foreign child" in done.stderr and "our note" in done.stderr


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", WORK.replace('    note("our note")\n', ""), str(tmp_path / "log"), "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, text=True, timeout=120)
    os.close(writer)
    assert done.stdout == "our result\n" and "finished" in (tmp_path / "log").read_text()


def on_a_terminal(command: list[str], columns: int = 100) -> str:
    """What a command draws on a terminal, and prints there."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not data:
                break
            drawn += data
        process.wait(timeout=60)
    os.close(ours)
    return drawn.decode()


def test_a_terminal_gets_a_bar_with_times_and_figures(tmp_path):
    drawn = on_a_terminal([sys.executable, "-c", WORK, str(tmp_path / "log"), "3.2"])
    assert "foreign" not in drawn and "our note" in drawn and drawn.rstrip().endswith("our result")
    assert re.search(r"SFT +━+[╸╺]?━* +50/100 +0:00:0\d .*loss 1\.25", drawn), drawn
    assert "100/100" in drawn and not re.search(STAMP, drawn)
    assert len((tmp_path / "log").read_text().splitlines()) == 4


def test_a_conversion_draws_its_own_bars_alone(tiny_folder, tmp_path):
    command = ["convert", "base", str(tiny_folder), str(tmp_path / "tiny.gguf"), "--type", "Q8_0"]
    drawn = on_a_terminal([sys.executable, "-m", "edgepatch.cli", *command])
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", drawn).splitlines() if line.strip()]
    ours = re.compile(r"(convert|quantize) [━╸╺ ]*\d+/\d+ +\d:\d\d:\d\d.*|.*tiny\.gguf: Q8_0, [\d.]+ MB|tiny.gguf: .*")
    strange = [line for line in lines if not ours.fullmatch(line) and str(tmp_path)[:20] not in line]
    assert not strange and {"convert", "quantize"} <= {line.split()[0] for line in lines}
