"""What was left out of a file of pairs, in a file of its own beside it: which line or prompt, why, and with which scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgepatch.files.writing import write_atomically


def dropped_path(out: Path) -> Path:
    """``pairs.dropped.jsonl`` of ``pairs.jsonl``."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.dropped.jsonl")


def write_dropped(rows: Iterable[Mapping[str, Any]], out: Path) -> Path:
    """One JSON object a line; empty where nothing was dropped.

    Args:
        rows: pairs or prompts, each with ``reason`` and ``place``.
        out: the file of pairs.

    Raises:
        InputError: the file cannot be written.
    """
    path = dropped_path(out)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
    return path
