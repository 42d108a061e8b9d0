"""``python -m edgepatch.compilation``: llama-cpp-python for this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgepatch.compilation import COMMAND, DISTRIBUTION, install, installed_version, pinned_version, wheel
from edgepatch.errors import EdgepatchError


def main() -> int:
    """Installs it for this machine."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Compile llama-cpp-python for this machine and install it."
    )
    parser.add_argument("--constraint", type=Path, help="a constraints file of pip that names the version")
    parser.add_argument("--wheel", action="store_true", help="install nothing; print where the wheel is")
    arguments = parser.parse_args()
    try:
        version = pinned_version(arguments.constraint) if arguments.constraint else None
        if arguments.wheel:
            print(wheel(version or installed_version()))
            return 0
        changed = install(version)
    except EdgepatchError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    print(f"{DISTRIBUTION} {installed_version()}: {'installed' if changed else 'kept'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
