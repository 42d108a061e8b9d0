"""The store's file system: every step that changes something is one call of ``os``, durable before the next one begins."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgepatch.errors import EdgepatchError, UntrustedError

TEMPORARY = ".tmp-"
LOCK = "lock"
POLL_S = 0.05


def read_file(path: Path, limit: int, what: str) -> bytes:
    """A whole file of the store, through one handle; its kind and size are known before anything is read.

    Args:
        path: the file.
        limit: bytes that it may have.
        what: names it in errors.

    Raises:
        OSError: it cannot be read.
        UntrustedError: it is a link, no regular file, or too large.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UntrustedError(what, "a file", f"a link at {path}", hint="nothing in a store is a link") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UntrustedError(what, "a regular file", f"something else at {path}")
        if status.st_size > limit:
            raise UntrustedError(f"size of the {what} {path}", f"at most {limit} bytes", status.st_size)
        return _read_all(handle, status.st_size)
    finally:
        _close(handle)


def _close(handle: int) -> None:
    """What had to be durable was made so before; an error of the disk that comes this late has nothing left to say."""
    with suppress(OSError):
        os.close(handle)


def _read_all(handle: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.read(handle, size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def make_root(path: Path) -> None:
    """Makes the folder of a store, which may be reached by a link.

    Raises:
        OSError: it cannot be made.
    """
    if not path.is_dir():
        os.makedirs(path, 0o755, exist_ok=True)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder that is not there yet.

    Raises:
        OSError: it cannot be made.
        UntrustedError: a link or something else is there in its place.
    """
    with suppress(FileExistsError):
        os.mkdir(path, 0o755)
        sync_folder(path.parent)
    require_folder(path)


def require_folder(path: Path) -> None:
    """Raises unless a folder of the store is a folder, and no link to one.

    Raises:
        OSError: nothing is there.
        UntrustedError: something else is.
    """
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise UntrustedError(
            "folder of the store", "a folder", f"something else at {path}", hint="nothing in a store is a link"
        )


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        _close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Puts a file in place: the old one or the whole new one is there at any moment. ``sync_folder`` makes that last.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with suppress(FileNotFoundError):
        os.unlink(temporary)  # of a process that died, and whose number came again
    try:
        _write_all(temporary, os.O_CREAT | os.O_EXCL, data, 0)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def write_behind(path: Path, length: int, data: bytes) -> None:
    """Puts bytes behind the first ``length`` ones of a file, in place of what may stand there.

    Raises:
        OSError: they cannot be written; the first ``length`` bytes are untouched.
        UntrustedError: the file is shorter.
    """
    _write_all(path, os.O_CREAT, data, length)


def _write_all(path: Path, flags: int, data: bytes, offset: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size < offset:
            raise UntrustedError(f"length of {path.name}", f"{offset} bytes or more", size, hint="somebody cut it")
        if size > offset:
            os.ftruncate(handle, offset)
        os.lseek(handle, offset, os.SEEK_SET)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        _close(handle)


def discard(path: Path) -> None:
    """Removes a file that nothing refers to any more; one that cannot be removed does no harm."""
    with suppress(OSError):
        os.unlink(path)


@contextmanager
def locked(folder: Path, timeout_s: float) -> Iterator[None]:
    """The store for this process alone. The system frees the lock of a process that dies.

    Raises:
        OSError: the lock file cannot be made.
        EdgepatchError: another process kept it for longer than ``timeout_s``.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + timeout_s
        while not _try_lock(handle):
            if time.monotonic() >= deadline:
                raise EdgepatchError(
                    f"store {folder}: expected it to be free within {timeout_s:g} s, found it in use by another process",
                    hint="wait for the other command to end, and try again",
                )
            time.sleep(POLL_S)
        yield
    finally:
        _close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
