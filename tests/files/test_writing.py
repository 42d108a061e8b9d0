"""Written files have the rights of those that they replace, or those that the user's mask leaves."""

from __future__ import annotations

import os

import pytest

from edgepatch.errors import InputError
from edgepatch.files.writing import replacing_file, write_atomically


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
