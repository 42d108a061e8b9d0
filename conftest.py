"""Makes ``edgepatch.converters`` and ``edgepatch.bench`` importable from a checkout that is not installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import edgepatch  # noqa: E402

edgepatch.__path__.append(str(ROOT))
