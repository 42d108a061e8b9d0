"""``python -m edgepatch.bench.parity``."""

from edgepatch.bench.parity.run import main

raise SystemExit(main())
