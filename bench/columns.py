"""The columns of the evidence matrix: every way to run a model that a user has, and how all of them are made from one folder."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.converters.gguf import writer
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.errors import InputError
from edgepatch.files.writing import new_folder
from edgepatch.progress import Progress, silent, within

COMMON_GGUF_TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
"""What most devices run."""

GGUF_TYPES = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
ONNX_PRECISIONS = {"fp32": "F32", "int8": "int8", "int4": "int4"}
GRAPH = "onnx-"
"""What folders of graphs begin with."""
QUANTIZED_KV = "q8_0"
MODELS = ("base", "reference")
"""M, whose behaviour a patch changes, and M', which behaves already."""


@dataclass(frozen=True)
class Column:
    """One way to run a model.

    Attributes:
        name: in tables.
        runtime: "torch", "llamacpp" or "onnx".
        quantization: as the runtime calls it.
        file: name of the file or folder, among those of one model; columns with other settings of the same file share it.
        kv_type: of the cache.
    """

    name: str
    runtime: str
    quantization: str
    file: str
    kv_type: str

    def path(self, files: Path) -> Path:
        """The column's file or folder.

        Args:
            files: folder with the files of one model, as ``convert_model`` makes it.
        """
        return files / self.file

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
    """Every column of M and of M', each model in a folder of its own.

    Args:
        bases: gets the folders "base" and "reference".
        lab: holds the Transformers folders of the same names.
        progress: told of every column, and of every tensor of one.

    Returns:
        Model -> column -> path.

    Raises:
        InputError: a model is missing, or cannot be converted.
    """
    return {model: convert_model(lab / model, bases / model, within(progress, model)) for model in MODELS}


def convert_model(
    folder: Path,
    files: Path,
    progress: Progress = silent,
    chosen: Sequence[Column] = (),
    is_kept: bool = True,
) -> dict[str, Path]:
    """Every column of one model; what is there already stays as it is, so that a run that was killed goes on.

    Args:
        folder: Transformers folder of the model.
        files: gets one file or folder for each column, or for several that share it.
        progress: told of every column, and of every tensor of one.
        chosen: the columns, full precision first; all where none is named.
        is_kept: whether a file that is there stays; else it is converted anew.

    Returns:
        Column -> path.

    Raises:
        InputError: the model cannot be read or converted, or ``files`` cannot be written or holds another model.
        MissingExtraError: a package of the extras "convert" and "gguf" is missing.
    """
    _require_same_model(folder, files)
    paths, chosen = dict[str, Path](), chosen or columns()
    for column in chosen:
        path = column.path(files)
        progress("convert", len(paths), len(chosen))
        if not path.exists() or not (is_kept or column is TORCH):  # the copied folder is the same, or was refused
            _convert(folder, column, path, within(progress, column.name))
        paths[column.name] = path
    progress("convert", len(paths), len(chosen))
    return paths


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


def _require_same_model(folder: Path, files: Path) -> None:
    """Files of a model that has changed since are of no use, and some of them would be kept."""
    kept = TORCH.path(files)
    if kept.is_dir() and filecmp.cmpfiles(
        folder, kept, [p.name for p in folder.iterdir() if p.is_file()], shallow=False
    )[1:] != ([], []):
        raise InputError(f"{files} holds the columns of another model than {folder}", hint=f"delete {files}")
