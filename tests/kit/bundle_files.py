"""Bundles without wheels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgepatch.bundles import creation
from kit.stores import KEYS, make_root, write

SIGNERS = ("vendor", "site")


def make_bundle(
    folder: Path, *, keys: tuple[str, ...] = (), root: bool = False, name: str = "site.tar", **fields: Any
) -> Path:
    """A bundle without wheels."""
    root_file = folder / "root.json"
    root_file.write_bytes(make_root().to_bytes())
    report = folder / "report.html"
    report.write_text("<p>figures</p>")
    sources = creation.Sources(
        write(folder, **fields),
        root_file if root else None,
        report,
        None,
        "org/model",
        tuple(KEYS[key] for key in keys),
    )
    creation.create(sources, folder / name)
    return folder / name
