"""The real model of the tests that need one: SmolLM2-135M-Instruct in Q4_1, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def smollm2_file() -> Path:
    """The GGUF file; the calling test is skipped where there is none."""
    named = os.environ.get("EDGEPATCH_SMOLLM2", "")
    if not named or not Path(named).is_file():
        pytest.skip("no SmolLM2: EDGEPATCH_SMOLLM2 names no file")
    return Path(named)
