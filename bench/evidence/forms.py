"""The forms of a user's model: as it is given, and further quantizations that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgepatch.bench.columns import GRAPH, TORCH, Column
from edgepatch.bench.evidence.cells import digest_of
from edgepatch.converters import base_models
from edgepatch.converters.gguf import library, writer
from edgepatch.converters.hf import folders
from edgepatch.converters.onnx.exporters import require_packages
from edgepatch.errors import InputError
from edgepatch.progress import Progress, silent, within
from edgepatch.runtimes import runtime_name

ONNX_TYPES = ("fp32", "fp16", "int8", "int4")

WHOLE = ("torch F32", "llamacpp F32", "onnx fp32")
"""Forms that hold every weight as it is, those first that compute most exactly."""


def given_column(model: Path, runtime: str, quantization: str) -> Column:
    """The model as it is given."""
    kv_type = "f16" if runtime == "llamacpp" else "f32"
    return Column(f"{runtime} {quantization}", runtime, quantization, str(model.absolute()), kv_type)


def made_columns(model: Path, types: Sequence[str]) -> list[Column]:
    """The columns of further types, none of them made yet; every type that cannot be made is refused here.

    Args:
        model: GGUF file or Transformers folder.
        types: "Q8_0" or another type of llama.cpp, "onnx-int4" or another precision of ONNX, "torch".

    Raises:
        InputError: a type is unknown, or cannot be made of this model.
        MissingExtraError: what makes it is not installed.
    """
    return list(dict.fromkeys(_column(model, kind) for kind in types))


def _column(model: Path, kind: str) -> Column:
    source = runtime_name(model)
    if source == "onnx":
        raise InputError(
            f"--on {kind}: expected a GGUF file or a Transformers folder to make it of, found the ONNX folder {model}",
            hint="name the model that the graph was made of, or leave out --on",
        )
    if kind == "torch":
        return TORCH
    if kind.startswith(GRAPH):
        return _onnx_column(kind)
    name = next((t for t in library.quantization_types() if t.lower() == kind.lower()), "")
    if not name:
        raise InputError(
            f"--on {kind}: no such type",
            hint=f"torch, {', '.join(GRAPH + each for each in ONNX_TYPES)}, Q8_0, Q4_K_M, or another type of llama.cpp",
        )
    if library.NEEDS_MATRIX.fullmatch(name):
        raise InputError(
            f"--on {name}: llama.cpp makes it with an importance matrix alone",
            hint=f"make the file with llama-quantize and measure it: edgepatch bench safety model-{name}.gguf",
        )
    if source == "torch" and (family := folders.read_config(model).get("model_type")) not in writer.CONVERTED:
        raise InputError(
            f"--on {name}: expected a model of {', '.join(writer.CONVERTED)}, found {family!r} in {model}",
            hint="convert it with llama.cpp's own script and measure that file",
        )
    return Column(f"llamacpp {name}", "llamacpp", name, f"{name}.gguf", "f16")


def _onnx_column(kind: str) -> Column:
    precision = kind.removeprefix(GRAPH)
    if precision not in ONNX_TYPES:
        raise InputError(f"--on {kind}: no such precision", hint=f"one of {', '.join(GRAPH + t for t in ONNX_TYPES)}")
    require_packages("builder")
    return Column(f"onnx {precision}", "onnx", precision, kind, "f32")


def reference_of(columns: Sequence[Column]) -> str:
    """Name of the most precise form: one that holds all weights whole, else the model as it is given, which all others are made of."""
    names = [column.name for column in columns]
    return next((name for name in WHOLE if name in names), names[0])


def make_forms(model: Path, columns: Sequence[Column], out: Path, progress: Progress = silent) -> Path:
    """Makes every form that is not there yet.

    Args:
        model: as it is given.
        columns: the first is the model itself.
        out: gets a folder of this very model's forms.

    Returns:
        The folder in which each column has its path.

    Raises:
        InputError: a form cannot be made, or there is no room for it.
    """
    files = out / "forms" / digest_of(model)[:16]
    for done, column in enumerate(columns[1:]):
        progress("make forms", done, len(columns) - 1)
        if not column.path(files).exists():
            files.mkdir(parents=True, exist_ok=True)
            _make(model, column, column.path(files), within(progress, column.name))
    if columns[1:]:
        progress("make forms", len(columns) - 1, len(columns) - 1)
    return files


def _make(model: Path, column: Column, target: Path, progress: Progress) -> None:
    if column.runtime == "onnx":
        base_models.to_onnx(model, target, column.precision, progress=progress)
    elif column.runtime == "torch":
        base_models.to_transformers(model, target, "float32", progress=progress)
    else:
        base_models.to_gguf(model, target, column.quantization, progress)
