"""The tar file of a bundle: POSIX.1-2001 with regular files only, in one form.

A reader does not interpret what it finds: it computes the header that each member must have and compares the bytes. So links,
devices, sparse files, other names, owners and modes are refused alike, without a line of code for each.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from edgepatch.errors import PatchFormatError

BLOCK = 512
TRAILER = bytes(2 * BLOCK)
CHUNK = 1 << 20
MODE = 0o644

_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.CONTTYPE: "a contiguous file",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGNAME: "a GNU long name",
    tarfile.GNUTYPE_LONGLINK: "a GNU long link",
    tarfile.XHDTYPE: "an extended header",
    tarfile.XGLTYPE: "a global extended header",
    tarfile.SOLARIS_XHDTYPE: "an extended header",
}


def header(path: str, size: int) -> bytes:
    """The one header that a member of this name and size has: a block, and two more for the name of a wheel that exceeds 100 signs."""
    info = tarfile.TarInfo(path)
    info.size, info.mode, info.mtime, info.uid, info.gid = size, MODE, 0, 0, 0
    return info.tobuf(tarfile.PAX_FORMAT, "ascii", "strict")


def padded(size: int) -> int:
    """Bytes that content of this size takes up."""
    return -(-size // BLOCK) * BLOCK


def write_member(target: BinaryIO, path: str, size: int, chunks: Iterator[bytes]) -> None:
    """Appends a member.

    Raises:
        PatchFormatError: the content has another size than was told: a file changed while it was read.
    """
    target.write(header(path, size))
    written = 0
    for chunk in chunks:
        written += target.write(chunk)
    if written != size:
        raise PatchFormatError(f"{path}: expected {size} bytes, found {written}: the file changed while it was read")
    target.write(bytes(padded(size) - size))


def read_block(file: BinaryIO, offset: int) -> bytes:
    """The block at an offset; short at the end of the file."""
    file.seek(offset)
    return file.read(BLOCK)


def printable(block: bytes) -> str:
    """What a header that should not be there says it is."""
    if len(block) < BLOCK:
        return "the end of the file"
    if not any(block):
        return "the end of the archive"
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "backslashreplace")
    except tarfile.HeaderError:
        return "no header of a tar file"
    kind = _KINDS.get(info.type, "a file" if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else "something unknown")
    return f"{kind} {info.name!r:.120} of {info.size} bytes"


def require_header(file: BinaryIO, offset: int, path: str, size: int) -> int:
    """Where the content starts, behind the header at an offset, which must be that of this member.

    Raises:
        PatchFormatError: it is another one; says what it is.
    """
    expected = header(path, size)
    file.seek(offset)
    block = file.read(len(expected))
    if block != expected:
        raise PatchFormatError(
            f"expected the file {path!r} of {size} bytes at {offset}, found {printable(block[:BLOCK])}, or other attributes"
        )
    return offset + len(expected)


def read_content(file: BinaryIO, start: int, size: int) -> bytes:
    """Content that starts at an offset.

    Raises:
        PatchFormatError: the file ends before, or the padding is not empty.
    """
    parts: list[bytes] = []
    copy_content(file, start, size, parts.append)
    return b"".join(parts)


def copy_content(file: BinaryIO, start: int, size: int, take: Callable[[bytes], object]) -> str:
    """Hands over the content that starts at an offset in pieces, and returns its SHA-256.

    Raises:
        PatchFormatError: the file ends before, or the padding is not empty.
    """
    file.seek(start)
    digest, rest = hashlib.sha256(), size
    while rest:
        chunk = file.read(min(CHUNK, rest))
        if not chunk:
            raise PatchFormatError(f"expected {rest} more bytes, found the end of the file: truncated")
        digest.update(chunk)
        take(chunk)
        rest -= len(chunk)
    padding = file.read(padded(size) - size)
    if len(padding) != padded(size) - size or any(padding):
        raise PatchFormatError(
            f"expected zeros behind the content at {start}, found other bytes or the end of the file"
        )
    return digest.hexdigest()
