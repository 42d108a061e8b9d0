"""The real model of the tests that need one: SmolLM2-135M-Instruct in Q4_1, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgepatch.errors import InputError
from edgepatch.known_models import find


def smollm2_file() -> Path:
    """The GGUF file that ``EDGEPATCH_SMOLLM2`` names, or that of ``make smollm2``; the calling test is skipped where there is none."""
    named = os.environ.get("EDGEPATCH_SMOLLM2")
    if named:
        return Path(named)
    try:
        return find("smollm2")
    except InputError as error:
        pytest.skip(f"{error}; {error.hint}")
