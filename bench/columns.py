"""The columns of the evidence matrix: every form of a model that a user could run, and how all of them are made from one folder."""

from __future__ import annotations

import filecmp
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgepatch.bench.demo import LAB_FOLDER
from edgepatch.converters.gguf import writer
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.errors import InputError
from edgepatch.files.writing import new_folder
from edgepatch.progress import Progress, silent, within

GGUF_TYPES = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
ONNX_PRECISIONS = {"fp32": "F32", "int8": "int8", "int4": "int4"}
GRAPH = "onnx-"
"""What folders of graphs begin with."""
QUANTIZED_KV = "q8_0"
MODELS = ("base", "reference")
"""M, whose behaviour a patch changes, and M', which behaves already."""


@dataclass(frozen=True)
class Column:
    """One form of a model.

    Attributes:
        name: in tables.
        runtime: "torch", "llamacpp" or "onnx".
        quantization: as the runtime calls it.
        file: name of the file or folder, among the forms of one model; columns with other settings of the same file share it.
        kv_type: of the cache.
    """

    name: str
    runtime: str
    quantization: str
    file: str
    kv_type: str

    def path(self, forms: Path) -> Path:
        """The column's file or folder.

        Args:
            forms: folder with all forms of one model, as ``convert_model`` makes it.
        """
        return forms / self.file

    @property
    def precision(self) -> str:
        """Quantization of an ONNX graph, as its exporter calls it."""
        return self.file.removeprefix(GRAPH)


TORCH = Column("torch F32", "torch", "F32", "transformers", "f32")


def columns() -> list[Column]:
    """All columns; full precision first."""
    llamacpp = [Column(f"llamacpp {kind}", "llamacpp", kind, f"{kind}.gguf", "f16") for kind in GGUF_TYPES]
    quantized_kv = Column(f"llamacpp F16 kv {QUANTIZED_KV}", "llamacpp", "F16", "F16.gguf", QUANTIZED_KV)
    graphs = [Column(f"onnx {name}", "onnx", kind, f"{GRAPH}{name}", "f32") for name, kind in ONNX_PRECISIONS.items()]
    return [TORCH, *llamacpp, quantized_kv, *graphs]


def convert_columns(bases: Path, lab: Path = LAB_FOLDER, progress: Progress = silent) -> dict[str, dict[str, Path]]:
    """Every form of M and of M', each model in a folder of its own.

    Args:
        bases: gets the folders "base" and "reference".
        lab: holds the Transformers folders of the same names.
        progress: told of every form, and of every tensor of one.

    Returns:
        Model -> column -> path.

    Raises:
        InputError: a model is missing, or cannot be converted.
    """
    return {model: convert_model(lab / model, bases / model, within(progress, model)) for model in MODELS}


def convert_model(folder: Path, forms: Path, progress: Progress = silent) -> dict[str, Path]:
    """Every form of one model; what is there already stays as it is, so that a run that was killed goes on.

    Args:
        folder: Transformers folder of the model.
        forms: gets one file or folder for each form.
        progress: told of every form, and of every tensor of one.

    Returns:
        Column -> path.

    Raises:
        InputError: the model cannot be read or converted, or ``forms`` cannot be written or holds another model.
        MissingExtraError: a package of the extras "convert" and "gguf" is missing.
    """
    _require_same_model(folder, forms)
    found: dict[str, Path] = {}
    for column in columns():
        path = column.path(forms)
        progress("convert", len(found), len(columns()))
        if not path.exists():
            _convert(folder, column, path, within(progress, column.name))
        found[column.name] = path
    progress("convert", len(found), len(columns()))
    return found


def _convert(folder: Path, column: Column, path: Path, progress: Progress) -> None:
    if column.runtime == "torch":
        _copy_folder(folder, path)
    elif column.runtime == "onnx":
        onnx.export(folder, path, cast("onnx.Precision", column.precision), progress=progress)
    elif column.quantization == "F16":
        writer.convert_folder(folder, path, "F16", progress)
    else:
        writer.quantize(path.with_name("F16.gguf"), path, column.quantization, progress=progress)


def _copy_folder(folder: Path, target: Path) -> None:
    with new_folder(target) as unfinished:
        shutil.copytree(folder, unfinished, dirs_exist_ok=True)


def _require_same_model(folder: Path, forms: Path) -> None:
    """Forms of a model that has changed since are of no use, and some of them would be kept."""
    kept = TORCH.path(forms)
    if kept.is_dir() and filecmp.cmpfiles(
        folder, kept, [p.name for p in folder.iterdir() if p.is_file()], shallow=False
    )[1:] != ([], []):
        raise InputError(f"{forms} holds the forms of another model than {folder}", hint=f"delete {forms}")
