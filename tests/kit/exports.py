"""Reads what ``edgepatch export`` writes for llama-server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an export says of itself."""
    return dict(json.loads((folder / "manifest.json").read_text("utf-8")))
