"""Where the peer's tests come from: the source distribution of llama-cpp-python, which holds llama.cpp's own; nothing is copied."""

from __future__ import annotations

import tarfile
from pathlib import Path

from edgepatch.errors import InputError

NEEDED = ("vendor/llama.cpp/models/", "vendor/llama.cpp/tools/server/tests/")
MAX_BYTES = 2**30


def unpack(source: Path, folder: Path) -> Path:
    """The root of llama.cpp's sources: a folder as it is, or unpacked from an archive, once.

    Args:
        source: the folder, or llama-cpp-python's ``.tar.gz``.
        folder: where an archive is unpacked.

    Raises:
        InputError: it is neither, or holds no tests of llama.cpp.
    """
    if source.is_file() and not folder.is_dir():
        _extract(source, folder)
    root = folder if source.is_file() else source
    models = next((path for path in sorted(root.rglob("models/templates")) if path.is_dir()), None)
    if models is None:
        raise InputError(
            f"{source}: expected llama.cpp's sources with models/templates, found none",
            hint="pip download --no-deps --no-binary :all: llama-cpp-python, and name the archive",
        )
    return models.parents[1]


def _extract(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and any(part in m.name for part in NEEDED)]
            if sum(member.size for member in members) > MAX_BYTES:
                raise InputError(f"{archive}: expected at most {MAX_BYTES} bytes of tests, found more")
            tar.extractall(folder, members, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot unpack {archive}: {error}", hint="name llama-cpp-python's source archive") from None
