"""What a run of the latency bench measures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgepatch.bench.latency.sessions import FULL, Sizes
from edgepatch.errors import InputError

SHAPES_FOLDER = Path("out/shapes")
DEFAULT_QUANTIZATION = "Q4_0"

PARTS = ("arms", "costs", "serving", "memory", "starts")
"""Of a run, by kind of measure; ``Settings.parts`` chooses."""


def due_parts(named: Sequence[str], arms: Sequence[str]) -> tuple[str, ...]:
    """The parts that are named; else the arms alone where some of them are chosen, and all where none are.

    Raises:
        InputError: there is no such part.
    """
    unknown = next((part for part in named if part not in PARTS), None)
    if unknown is not None:
        raise InputError(f"--parts: expected some of {', '.join(PARTS)}, found {unknown}")
    return tuple(named) or (("arms",) if arms else PARTS)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        model: a model of yours; ``None`` for a random one of a shape.
        shape: one of ``SHAPES``.
        quantization: of the random model; a type of ``write_gguf`` for llama.cpp, "int8" or "int4" for ONNX.
        patch: file of a patch for the model; else a random one is made for it.
        repeats: that count.
        num_threads: of a forward pass.
        device: "cpu" or "cuda".
        flash_attention: of llama.cpp.
        arms: patterns of names; empty for all.
        sizes: of prompts, depths, texts.
        parts: of ``PARTS``.
        folder: random models are kept here.
    """

    model: Path | None = None
    shape: str = "llama-3.2-1b"
    quantization: str = DEFAULT_QUANTIZATION
    patch: Path | None = None
    repeats: int = 7
    num_threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    device: str = "cpu"
    flash_attention: bool = True
    arms: tuple[str, ...] = ()
    sizes: Sizes = FULL
    parts: tuple[str, ...] = PARTS
    folder: Path = SHAPES_FOLDER
