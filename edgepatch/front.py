"""The front door: what needs no library is answered before one is imported."""

from __future__ import annotations

import sys

import edgepatch


def main() -> None:
    """The entry point of the command."""
    if sys.argv[1:] == ["--version"]:
        print(f"edgepatch {edgepatch.__version__}")
        return
    from edgepatch.cli import main as run

    run()
