"""``edgepatch show`` on damaged files: exit code 3, one line that names the file, never a traceback."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.mutations import mutated_patch
from edgepatch import cli
from edgepatch.patch.file import parse_patch, patch_bytes
from kit import golden_patches

GOOD = patch_bytes(golden_patches.full())
MUTANTS = 30


@pytest.fixture
def show(monkeypatch, capfd):
    """File -> (exit code, stdout, stderr) of `edgepatch show`, in this process."""

    def call(path: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", "show", str(path), *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capfd.readouterr()

    return call


def require_refused(result: tuple[int, str, str], path: Path, code: int = 3) -> None:
    exit_code, out, err = result
    assert (exit_code, out) == (code, ""), err
    assert "error:" in err and str(path) in err.replace("\n", "") and "hint:" in err
    assert "Traceback" not in err and "internal error" not in err and "\x1b" not in err and "\x9b" not in err


def test_a_good_file_is_shown(show, tmp_path):
    (tmp_path / "x").write_bytes(GOOD)
    assert show(tmp_path / "x")[0] == show(tmp_path / "x", "--json")[0] == 0


def test_mutants_are_refused(show, tmp_path):
    path, tried = tmp_path / "x.safetensors", 0
    for seed in range(MUTANTS * 2):
        data = mutated_patch(GOOD, random.Random(seed))
        try:
            parse_patch(data)
        except Exception:
            path.write_bytes(data)
            require_refused(show(path, *["--json"] * (seed % 2)), path)
            tried += 1
    assert tried > MUTANTS


@pytest.mark.parametrize("length", [0, 7, 8, 9, 500, len(GOOD) - 1])
def test_truncated_files_are_refused(show, tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD[:length])
    require_refused(show(path), path)


def test_what_a_file_says_does_not_steer_the_terminal(show, tmp_path):
    """Control characters and half a surrogate pair in places that the error message repeats."""
    start = 8 + int.from_bytes(GOOD[:8], "little")
    for old, new in [
        (b"prompt_embeddings", b"prompt_embed\x1b[31m"[:17]),
        (b'\\"prompt_embeddings\\"', b'\\"prompt\\\\u001b[31m\\"'),
        (b'\\"prompt_embeddings\\"', b'\\"prompt_em\\\\ud800x\\"'),
        (b'\\"golden\\"', b'\\"\\\\u009b\\"'),
        (b'\\"golden\\"', b'\\"\xc2\x9b[m\\"'),
    ]:
        header = GOOD[8:start].replace(old, new, 1)
        assert header != GOOD[8:start]
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + GOOD[start:])
        require_refused(show(path), path)


def test_no_regular_file_is_2(show, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/zero")):
        require_refused(show(path), path, code=2)


def test_10_gb_are_refused_at_once_by_the_program(tmp_path):
    """In a process of its own, with 64 MB more memory than the program needs to start."""
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    code = (
        "import resource, sys, time, edgepatch.patch.file as p\n"
        "from pathlib import Path\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)\n"
        "started = time.perf_counter()\n"
        "try: p.read_patch(sys.argv[1])\n"
        "except p.PatchFormatError: print(time.perf_counter() - started)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert float(done.stdout) < 1, done.stderr
