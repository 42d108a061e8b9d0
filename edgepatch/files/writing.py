"""Files and folders that appear complete or not at all, whatever ends the writing: an error, a full disk, Ctrl-C."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgepatch.errors import EdgepatchError, InputError

HINT = "free space or name another folder"
FULL_BYTES = 1 << 20
"""Less is free on a disk on which a large file has just failed for want of space."""


def require_space(target: Path, num_bytes: int) -> None:
    """Checks before anything is written that a target will fit.

    Args:
        target: a file or folder that need not exist.
        num_bytes: what it and all that is written beside it take.

    Raises:
        InputError: there is less space.
    """
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"cannot write {target}: it needs {num_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free on {folder}",
            HINT,
        )


def reason_of(target: Path, complaint: str) -> str:
    """Why a library could not write a file: what it says, but where the disk is full, which some leave out, that.

    Args:
        target: the file, or what there is of it.
        complaint: the library's words.
    """
    is_full = shutil.disk_usage(target.absolute().parent).free < FULL_BYTES
    return os.strerror(errno.ENOSPC) if is_full else complaint


def hint_behind(complaints: str, otherwise: str) -> str:
    """What to do about a program that failed: where the disk was full that, else what its caller knows.

    Args:
        complaints: what it wrote to standard error.
        otherwise: the caller's hint.
    """
    return HINT if os.strerror(errno.ENOSPC) in complaints else otherwise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that it has the old or the new content, never a part.

    Raises:
        InputError: the folder cannot be written or the disk is full; the old file stays.
    """
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target`` that takes its place when the block succeeds, and is removed otherwise.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        os.close(handle)
        mode = _mode_of(target)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _mode_of(target: Path) -> int:
    """The rights of the file that is replaced; of a new one those that the user's mask leaves."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        pass
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        new = Path(folder) / "new"
        new.touch(0o666)  # the mask itself can only be read by changing it, for every thread
        return new.stat().st_mode & 0o777


def require_new_file(target: Path, force: bool = False) -> None:
    """Checks, before any work, that a file can be written, and that it takes nobody's place.

    Args:
        target: the file.
        force: whether it may take the place of a file.

    Raises:
        InputError: a file or folder is there, or nothing can be written there.
    """
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder", hint="name a file in it")
    if not force and (target.exists() or target.is_symlink()):
        raise InputError(f"{target} exists", hint="name another file, or replace it with --force")
    require_writable(target.absolute().parent, target)


def require_writable(folder: Path, target: Path | None = None) -> None:
    """Checks, before any work, that files can be written into a folder, which need not be there yet.

    Args:
        folder: the folder.
        target: what is to be written there, for the error; the folder by default.

    Raises:
        InputError: a file is there, or nothing can be written there.
    """
    home = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not home.is_dir():
        raise InputError(f"{folder}: expected a folder, found the file {home}", hint="name a new folder")
    try:
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise unwritable(target or folder, error) from error


def unwritable(target: Path, error: OSError) -> InputError:
    """The error for a target that the system does not let us write."""
    reason: object = error.strerror or error
    if re.fullmatch(r"\d+ requested and \d+ written", str(error)):  # NumPy keeps the system's reason to itself
        reason = os.strerror(errno.ENOSPC)
    if isinstance(error, shutil.Error):  # of a folder that was copied: (from, to, reason) of each file
        reason = re.sub(r"^\[Errno \d+\] ([^:]+).*", r"\1", str(error.args[0][0][2]))
    return InputError(f"cannot write {target}: {reason}", HINT)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as ``target``, removed at the end.

    Raises:
        InputError: it cannot be written, or what the block writes cannot.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise unwritable(target, error) from error


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place at the end, or vanishes on any error; an old one stays till then.

    Raises:
        InputError: as ``folder_beside``.
    """
    with folder_beside(target) as beside:
        unfinished, old = beside / "new", beside / "old"
        unfinished.mkdir()
        try:
            yield unfinished
        except EdgepatchError as error:  # what was written there is gone when the user reads where
            error.args = (str(error).replace(str(unfinished), str(target)), *error.args[1:])
            raise
        try:
            if target.exists():
                target.rename(old)
            unfinished.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise


@dataclass(frozen=True)
class FolderKind:
    """Folders that may take each other's place, by the user's word.

    Attributes:
        title: with its article ("an ONNX model folder").
        marker: the file in each of them.
    """

    title: str
    marker: str


def require_new_folder(target: Path, kind: FolderKind | None = None, force: bool = False) -> None:
    """Checks, before any work, that a folder can be written, and that it takes nobody's place.

    Args:
        target: the folder; an empty one may be there.
        kind: of the folder; ``None`` where no other one may be replaced.
        force: whether it may take the place of a folder of its kind.

    Raises:
        InputError: something else is there, or nothing can be written there.
    """
    try:
        is_there = target.is_symlink() or (target.exists() and not target.is_dir()) or any(_entries(target))
    except OSError as error:
        raise unwritable(target, error) from error
    if is_there and kind is None:
        raise InputError(f"cannot write {target}: it exists and is not an empty folder", hint="name a new folder")
    if is_there and kind and (target.is_symlink() or not (target / kind.marker).is_file()):
        raise InputError(f"{target} exists and is not {kind.title}", hint="name a new folder")
    if is_there and not force:
        raise InputError(f"{target} exists", hint="name a new folder, or replace it with --force")
    require_writable(target.absolute().parent, target)


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A new folder that appears at the end as ``target``, where nothing or an empty folder may be, or vanishes on any error.

    Raises:
        InputError: something is there, or as ``folder_beside``.
    """
    require_new_folder(target)
    with replacing_folder(target) as unfinished:
        yield unfinished
