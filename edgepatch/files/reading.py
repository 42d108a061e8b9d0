"""The one reader of files that somebody else made: nothing is read that is no regular file, or larger than it may be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgepatch.errors import EdgepatchError, InputError, UntrustedError

FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def read_bounded(
    path: Path,
    limit: int,
    what: str,
    *,
    private: bool = False,
    hint: str = "check the path",
    oversize: type[EdgepatchError] = InputError,
) -> bytes:
    """Content of a regular file of at most ``limit`` bytes.

    Args:
        path: the file; a pipe or device is refused before it can block.
        limit: no more is ever read, whatever size the file claims.
        what: names the file in errors ("trust root").
        private: refuse a file that its group or others have any right to. The open file is examined, not its name.
        hint: what to do where it cannot be read.
        oversize: the kind of error for a file that is larger.

    Raises:
        InputError: it cannot be read, or is no regular file.
        UntrustedError: ``private`` and others have rights.
        EdgepatchError: it is larger: an ``oversize``.
    """
    try:
        descriptor = os.open(path, FLAGS)
        try:
            _require_plain(os.fstat(descriptor), path, what, private)
            data, size = _read(descriptor, limit)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}", hint) from error
    if size > limit:
        raise _oversize(oversize, path, limit, size, what)
    return data


def read_text(path: Path, limit: int, what: str, *, hint: str = "check the path") -> str:
    """Text of a regular file in UTF-8, without a byte order mark in front; arguments as for ``read_bounded``.

    Raises:
        InputError: it cannot be read, is no regular file, is larger, or is not UTF-8.
    """
    data = read_bounded(path, limit, what, hint=hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"cannot read {what} {path}: expected UTF-8, found the byte 0x{data[error.start]:02x} at {error.start}",
            hint,
        ) from None


def _require_plain(status: os.stat_result, path: Path, what: str, private: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"cannot read {what} {path}: it is no regular file", hint="name the file itself")
    if private and stat.S_IMODE(status.st_mode) & 0o077:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise UntrustedError(f"rights of {path}", "none for group and others (0600)", mode, hint=f"chmod 600 {path}")


def _read(descriptor: int, limit: int) -> tuple[bytes, int]:
    """(content, its size); where it is larger than the limit, the content is not read to its end."""
    size = os.fstat(descriptor).st_size
    if size > limit:
        return b"", size
    with open(descriptor, "rb", closefd=False) as file:
        data = file.read(size + 1)
        if len(data) > size:  # it grows, or is one of the kernel's, which have no size
            data += file.read(limit + 1 - len(data))
    return data, len(data)


def _oversize(kind: type[EdgepatchError], path: Path, limit: int, size: int, what: str) -> EdgepatchError:
    hint = f"this is no {what}"
    if issubclass(kind, UntrustedError):
        return kind(f"size of {path}", f"at most {limit} bytes", size, hint)
    return kind(f"size of {path}: expected at most {limit} bytes, found {size}", hint)
