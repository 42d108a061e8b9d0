"""``python -m edgepatch.bench.evidence``."""

from edgepatch.bench.evidence.run import main

raise SystemExit(main())
