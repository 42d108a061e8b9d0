"""``python -m edgepatch.bench.identity``."""

from edgepatch.bench.identity.run import main

raise SystemExit(main())
