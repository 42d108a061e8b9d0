"""The models of ``edgepatch bench devices``, in every form that a client loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgepatch.bench.checkout import ROOT
from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCHES
from edgepatch.files.writing import new_folder

GGUF = ("llama-session", "node-llama-cpp")
GRAPHS = ("transformers.js", "onnxruntime-web")
FOLDER = ("mlx",)
SMOLLM2_PATCH = ROOT / "patches" / "smollm2-detox-0.1.0.safetensors"


@dataclass(frozen=True)
class Form:
    """A model as its clients load it.

    Attributes:
        file: name of the file or folder among the models.
        patch: file of the patch.
        targets: of exports.
        make: (models) -> its path; makes it where it is missing.
    """

    file: str
    patch: Path
    targets: tuple[str, ...]
    make: Callable[[Path], Path]


def forms(smollm2: Path | None) -> list[Form]:
    """The lab model in every form, and SmolLM2 of a GGUF file where one is named."""
    patch, base = LAB_PATCHES[1], LAB_FOLDER / "base"
    lab = [
        *[_gguf(f"lab-{kind}.gguf", patch, kind) for kind in ("Q8_0", "Q4_K_M")],
        *[_graph(f"lab-{kind}", patch, kind, lambda models: base) for kind in ("fp32", "int8", "int4")],
        Form("base", patch, FOLDER, lambda models: base),
    ]
    if smollm2 is None:
        return lab
    file = smollm2

    def folder(models: Path) -> Path:
        return _folder(file, models / "smollm2")

    return [
        *lab,
        Form("smollm2-gguf", SMOLLM2_PATCH, GGUF, lambda models: file),
        *[_graph(f"smollm2-{kind}", SMOLLM2_PATCH, kind, folder) for kind in ("fp32", "int8", "int4")],
        Form(
            "smollm2-mlx", SMOLLM2_PATCH, FOLDER, lambda models: _older_spelling(folder(models), models / "smollm2-mlx")
        ),
    ]


def _folder(file: Path, target: Path) -> Path:
    """The Transformers folder that a GGUF file is made into, once."""
    from edgepatch.converters import base_models

    if not target.exists():
        base_models.to_transformers(file, target, "float32")
    return target


def _older_spelling(folder: Path, target: Path) -> Path:
    """The same folder with ``rope_theta`` as older Transformers wrote it: mlx-lm passes over ``rope_parameters``."""
    if not target.exists():
        with new_folder(target) as unfinished:
            shutil.copytree(folder, unfinished, dirs_exist_ok=True)
            config = json.loads((folder / "config.json").read_text("utf-8"))
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
            (unfinished / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return target


def _gguf(file: str, patch: Path, kind: str) -> Form:
    def make(models: Path) -> Path:
        from edgepatch.converters import base_models

        if not (models / file).exists():
            base_models.to_gguf(LAB_FOLDER / "base", models / file, kind)
        return models / file

    return Form(file, patch, GGUF, make)


def _graph(file: str, patch: Path, kind: str, folder: Callable[[Path], Path]) -> Form:
    def make(models: Path) -> Path:
        from edgepatch.converters import base_models

        if not (models / file).exists():
            base_models.to_onnx(folder(models), models / file, kind)
        return models / file

    return Form(file, patch, GRAPHS, make)
