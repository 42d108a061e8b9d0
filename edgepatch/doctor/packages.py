"""The optional packages: what each extra installs, and which versions are here."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from edgepatch.errors import InputError, install_command


def extras() -> dict[str, set[str]]:
    """Extra -> the distributions that it installs, from the metadata of the installed edgepatch.

    Raises:
        InputError: edgepatch runs from a checkout that is not installed.
    """
    try:
        lines = importlib.metadata.requires("edgepatch") or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError("edgepatch is not installed, only on the path", hint="pip install -e .") from None
    direct: dict[str, set[str]] = {}
    for line in lines:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        requirement = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", line)
        if extra and requirement:
            name, nested = requirement.groups()
            parts = {f"[{part}]" for part in nested.split(",")} if name == "edgepatch" else {name}
            direct.setdefault(extra.group(1), set()).update(parts)
    return {name: _expanded(name, direct) for name in direct}


def _expanded(extra: str, direct: dict[str, set[str]]) -> set[str]:
    distributions: set[str] = set()
    for name in direct.get(extra, set()):
        distributions |= _expanded(name[1:-1], direct) if name.startswith("[") else {name}
    return distributions


def version_of(distribution: str) -> str | None:
    """Of an installed distribution; ``None`` where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> list[dict[str, Any]]:
    """Every optional package: version or ``None``, and the extras that install it, the narrowest first."""
    by_extra = sorted(extras().items(), key=lambda item: (len(item[1]), item[0]))
    names = sorted(set().union(*(members for _, members in by_extra)))
    rows = []
    for name in names:
        homes = [extra for extra, members in by_extra if name in members]
        rows.append(
            {
                "name": name,
                "version": version_of(name),
                "extras": homes,
                "install": install_command(homes[0]),
            }
        )
    return rows
