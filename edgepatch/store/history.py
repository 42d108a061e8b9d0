"""The history: one line of JSON a change, each with the SHA-256 of the line before. Nothing in it is ever rewritten."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from edgepatch.errors import UntrustedError
from edgepatch.files.canonical import canonical_json, parse_canonical
from edgepatch.store.records import NO_LINE, HistoryMark

MAX_HISTORY_BYTES = 64 * 1024 * 1024


def next_line(mark: HistoryMark, time: str, action: str, details: Mapping[str, Any]) -> tuple[bytes, HistoryMark]:
    """The line of a change, and the mark behind it.

    Args:
        mark: where the history ends now.
        time: of the change.
        action: name of the verb.
        details: what changed, and why, without the entries that are empty.
    """
    fields = {name: value for name, value in details.items() if value not in ("", None)}
    line = canonical_json({"number": mark.lines + 1, "time": time, "action": action, "previous": mark.head, **fields})
    return line + b"\n", HistoryMark(mark.size + len(line) + 1, mark.lines + 1, hashlib.sha256(line).hexdigest())


def parse_history(data: bytes, mark: HistoryMark) -> list[dict[str, Any]]:
    """The lines up to a mark, each checked against the one before.

    Args:
        data: of the file. Lines behind the mark are of a change that was never finished.
        mark: where the history ends.

    Raises:
        UntrustedError: a line was changed, taken out, put in or cut off.
    """
    if len(data) < mark.size:
        raise UntrustedError("length of the history", f"{mark.size} bytes or more", len(data), hint="somebody cut it")
    lines = data[: mark.size].split(b"\n")
    if lines.pop() or len(lines) != mark.lines:
        raise UntrustedError("number of lines in the history", mark.lines, len(lines), hint="somebody changed it")
    entries, head = [], NO_LINE
    for number, line in enumerate(lines, 1):
        entry = parse_canonical(line, f"line {number} of the history")
        if not isinstance(entry, dict) or (entry.get("number"), entry.get("previous")) != (number, head):
            raise UntrustedError(
                f"line {number} of the history",
                f"number {number} after line {head[:12]}",
                "another one",
                hint="somebody changed this line or the one before",
            )
        entries.append(entry)
        head = hashlib.sha256(line).hexdigest()
    if head != mark.head:
        raise UntrustedError("last line of the history", mark.head[:12], head[:12], hint="somebody changed it")
    return entries
