"""What a run of the latency bench measures."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from edgepatch.bench.latency.sessions import FULL, Sizes

SHAPES_FOLDER = Path("out/shapes")
DEFAULT_QUANTIZATION = "Q4_0"

PARTS = ("arms", "costs", "serving", "memory", "starts")
"""Of a run, by kind of measure; ``Settings.parts`` chooses."""


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
