"""Other people's output: progress bars, warnings and notices of libraries and of the programs that they start."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO

from edgepatch.errors import EdgepatchError

DEBUG_VARIABLE = "EDGEPATCH_DEBUG"
BARS_OFF = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
"""Read when huggingface_hub and tqdm are imported: Transformers draws bars over the replies otherwise."""

TAIL_BYTES = 4000


def turn_bars_off() -> None:
    """For verbs that print while a model works; a user's own settings stay."""
    for name, value in BARS_OFF.items():
        os.environ.setdefault(name, value)


@contextmanager
def libraries_silent() -> Iterator[TextIO]:
    """Puts aside what is written to stdout and stderr, by Python, C or a child, but for the stream that this yields: our stderr.

    An error that nobody expected brings the last of it back, and with EDGEPATCH_DEBUG set all is shown as it comes.
    """
    try:
        own = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    except OSError:  # the process was started without a stderr
        yield _open_null("w")
        return
    with _closing(own), _open_aside() as aside:
        if os.environ.get(DEBUG_VARIABLE):
            yield own
            return
        try:
            with _redirected(1, aside), _redirected(2, aside):
                yield own if _is_stream_of(2, sys.stderr) else sys.stderr
        except (EdgepatchError, OSError):
            raise
        except Exception:
            _tell_last(aside, own)
            raise


@contextmanager
def _closing(stream: TextIO) -> Iterator[None]:
    """Closes it at the end; what nobody reads any more is not worth an error."""
    try:
        yield
    finally:
        with suppress(OSError):
            stream.close()


def _open_null(mode: str) -> Any:
    return open(os.devnull, mode, encoding=None if "b" in mode else "utf-8")


def _open_aside() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError:
        null: IO[bytes] = _open_null("r+b")
        return null


def _is_stream_of(descriptor: int, stream: TextIO | None) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return stream is not None and stream.fileno() == descriptor
    return False


@contextmanager
def _redirected(descriptor: int, target: IO[bytes]) -> Iterator[None]:
    """The descriptor writes into another file; what Python holds back of either side stays on its side."""
    stream = sys.stdout if descriptor == 1 else sys.stderr
    _flush(stream)
    try:
        before = os.dup(descriptor)
    except OSError:
        yield
        return
    try:
        os.dup2(target.fileno(), descriptor)
        yield
    finally:
        _flush(stream)
        os.dup2(before, descriptor)
        os.close(before)


def _flush(stream: TextIO | None) -> None:
    with suppress(OSError, ValueError, AttributeError):
        if stream is not None:
            stream.flush()


def _tell_last(aside: IO[bytes], own: TextIO) -> None:
    with suppress(OSError, ValueError):
        size = aside.seek(0, os.SEEK_END)
        aside.seek(max(0, size - TAIL_BYTES))
        own.write(aside.read().decode("utf-8", "replace"))
