"""``python -m edgepatch.bench.trl``."""

from edgepatch.bench.trl.run import main

main()
