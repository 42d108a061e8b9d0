"""What every table at the terminal must keep, whatever its width."""

from __future__ import annotations

import re
from collections.abc import Iterable

WIDTHS = (60, 80, 120)
WHOLE = re.compile(r"\s*(\S+\s+)?(\S*`[^`]*`\S*|\S+)")
"""A word, or a command between backticks, that may be longer than a line; with a name in front of it."""


def require_readable(output: str, width: int, identifiers: Iterable[str] = ()) -> None:
    """Asserts that lines fit or hold one word, that nothing is cut, folded or padded, and that identifiers are whole."""
    assert output.strip(), "no output"
    for line in output.splitlines():
        assert line == line.rstrip(), f"padded: {line!r}"
        assert len(line) <= width or WHOLE.fullmatch(line), f"longer than {width}: {line!r}"
        assert "\N{HORIZONTAL ELLIPSIS}" not in line, f"cut: {line!r}"
    for identifier in identifiers:
        assert identifier in output, f"folded or cut at {width}: {identifier}\n{output}"
