"""Written files have the rights of those that they replace, or those that the user's mask leaves; nothing takes a place without a word."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from edgepatch.errors import InputError
from edgepatch.files.writing import (
    FolderKind,
    hint_behind,
    reason_of,
    replacing_file,
    replacing_folder,
    require_new_file,
    require_new_folder,
    require_writable,
    write_atomically,
)
from edgepatch.processes.programs import run_program


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("rights", [0o600, 0o640, 0o644, 0o664])
def test_a_replaced_file_keeps_its_rights(tmp_path, rights):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(rights)
    write_atomically(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", rights)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o027])
def test_a_new_file_follows_the_mask(tmp_path, mask):
    old = os.umask(mask)
    try:
        write_atomically(tmp_path / "f", b"new")
    finally:
        os.umask(old)
    assert mode(tmp_path / "f") == 0o666 & ~mask
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_fails_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "f", b"old")
    with pytest.raises(InputError), replacing_file(tmp_path / "f") as temporary:
        temporary.write_bytes(b"new")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no file that is always full")
def test_a_full_disk_is_named_where_numpy_names_no_reason(tmp_path):
    with pytest.raises(InputError, match="No space left on device"), replacing_file(tmp_path / "f"):
        np.zeros(1 << 20, np.uint8).tofile(FULL)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_where_a_library_names_another_reason(tmp_path, monkeypatch):
    assert reason_of(tmp_path / "f", "iostream error") == "iostream error"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
    assert reason_of(tmp_path / "f", "iostream error") == "No space left on device"


def test_a_program_that_found_the_disk_full_needs_space():
    found_full = run_program([sys.executable, "-c", "print('a', file=open('/dev/full', 'w'), flush=True)"])
    if FULL.exists():
        assert "free space" in hint_behind(found_full.complaints, "try another exporter")
    assert hint_behind("ValueError", "try another exporter") == "try another exporter"


def test_an_error_inside_a_new_folder_names_the_folder_that_was_asked_for(tmp_path):
    target = tmp_path / "sent"
    with pytest.raises(InputError) as refused, replacing_folder(target) as unfinished:
        raise InputError(f"cannot write {unfinished / 'seed.bin'}: File too large", hint="free space")
    assert str(refused.value) == f"cannot write {target / 'seed.bin'}: File too large"
    assert refused.value.hint == "free space" and not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "deeper" / "still"):
        with pytest.raises(InputError, match="expected a folder, found the file"):
            require_writable(folder)
    require_writable(tmp_path / "new" / "deeper")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "and nothing is left of the attempt"
    with pytest.raises(InputError, match=r"cannot write /proc/none/x\.bin"):
        require_new_file(Path("/proc/none/x.bin"))
    for target in (file, tmp_path):
        with pytest.raises(InputError, match="not an empty folder"):
            require_new_folder(target)
        with pytest.raises(InputError, match="exists and is not a kept one"):
            require_new_folder(target, FolderKind("a kept one", "marker"), force=True)
    (tmp_path / "marker").write_text("")
    with pytest.raises(InputError, match="exists") as refused:
        require_new_folder(tmp_path, FolderKind("a kept one", "marker"))
    assert "replace it with --force" in refused.value.hint
    require_new_folder(tmp_path, FolderKind("a kept one", "marker"), force=True)


def test_a_folder_that_cannot_be_copied_is_told_by_its_reason(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "large").write_bytes(bytes(10))

    def copy(source, target):
        raise OSError(errno.EFBIG, "File too large", source)

    with pytest.raises(InputError) as refused, replacing_folder(tmp_path / "new") as unfinished:
        shutil.copytree(tmp_path / "old", unfinished, dirs_exist_ok=True, copy_function=copy)
    assert str(refused.value) == f"cannot write {tmp_path / 'new'}: File too large"
