"""``python -m edgepatch.cli``."""

from edgepatch.cli import main

main()
