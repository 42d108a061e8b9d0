"""Which patches ship for SmolLM2, and what each is for."""

from __future__ import annotations

import re
from pathlib import Path

from edgepatch.bench.checkout import ROOT
from edgepatch.errors import InputError

PATCHES = ROOT / "patches"
DOMAIN_OF = {"detox": "toxicity", "fairness": "gender", "harm": "harm"}
"""Name of a patch behind "smollm2-" -> the domain that it was made for."""


def newest_patches(folder: Path = PATCHES) -> dict[str, Path]:
    """Short name -> newest file of every shipped patch.

    Raises:
        InputError: none is there, because this is no checkout.
    """
    files = {name: sorted(folder.glob(f"smollm2-{name}-*.safetensors"), key=_numbers) for name in DOMAIN_OF}
    newest = {name: versions[-1] for name, versions in files.items() if versions}
    if not newest:
        hint = "run this from a source checkout; `edgepatch bench safety` measures any patch"
        raise InputError(f"no patch of SmolLM2 in {folder}", hint=hint)
    return newest


def _numbers(path: Path) -> list[int]:
    """Of the version in the name, so that 0.10.0 comes behind 0.9.0."""
    return [int(number) for number in re.findall(r"\d+", path.stem)]
