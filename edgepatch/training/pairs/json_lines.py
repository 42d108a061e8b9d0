"""JSON Lines files that people bring: every complaint names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.files import strict_json
from edgepatch.files.reading import read_bounded

MAX_BYTES = 2**31


def read_lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """(place, line) of every line that is not blank; a place reads "prompts.jsonl, line 3".

    Lines end at a line feed alone: JSON may hold the other line ends of Unicode as they are.

    Args:
        path: a UTF-8 text file.
        what: what it should hold ("pairs"), for the complaint.

    Raises:
        InputError: the file is missing, no regular file, too large, or not UTF-8 (the line is named).
    """
    data = read_bounded(path, MAX_BYTES, what)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{place}: expected UTF-8, found the byte 0x{line[error.start]:02x} at {error.start}"
            ) from None
        if text.strip():
            yield place, text


def read_rows(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line.

    Raises:
        InputError: as ``read_lines``; a line holds no JSON object, or text that UTF-8 cannot write.
    """
    for place, line in read_lines(path, what):
        try:
            row = strict_json.loads(line.encode())
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"{place}: expected Unicode text, found half of a surrogate pair") from None
        except ValueError as error:
            raise InputError(f"{place}: expected a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(row).__name__}")
        yield place, row
