"""A base model in another format or quantization: one function a format, whatever the model is now."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from edgepatch.converters import dequantization
from edgepatch.converters.gguf import header as gguf_header
from edgepatch.converters.gguf import writer
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.converters.origins import is_quantized
from edgepatch.errors import InputError
from edgepatch.files.writing import folder_beside
from edgepatch.progress import Progress, silent

UNQUANTIZED = ("F32", "F16")
ONNX_BYTES = {"fp32": 4.0, "fp16": 6.0, "int8": 1.3, "int4": 0.9}
"""What a weight takes on the disk while a graph is made: fp16 is narrowed from fp32."""


def to_gguf(source: Path, target: Path, kind: str, progress: Progress = silent) -> None:
    """Writes a GGUF file of a Transformers folder, or of a GGUF file of any quantization.

    Raises:
        InputError: llama.cpp has no such type, or the model cannot be converted.
        MissingExtraError: a package of the extras "convert" and "gguf" is missing.
    """
    writer.require_makeable(kind)
    if source.is_file():
        if is_quantized(gguf_header.read_header(source)):
            dequantization.requantize(source, target, kind, progress)
        else:
            writer.quantize(source, target, kind, progress=progress)
    elif kind in UNQUANTIZED:
        writer.convert_folder(source, target, kind, progress)
    else:
        with folder_beside(target) as folder:
            writer.convert_folder(source, folder / "F16.gguf", "F16", progress)
            writer.quantize(folder / "F16.gguf", target, kind, progress=progress)


def to_onnx(
    source: Path,
    target: Path,
    kind: str,
    exporter: str = "builder",
    optimum_env: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Writes an ONNX folder of a Transformers folder, or of a GGUF file of any quantization; arguments as for ``onnx.export``.

    Raises:
        InputError: the model cannot be exported.
        MissingExtraError: a package of the extra "convert" is missing.
    """
    onnx.require_choices(kind, exporter)
    with dequantization.dequantized(source, target, ONNX_BYTES.get(kind, 0), progress) as folder:
        onnx.export(
            folder,
            target,
            cast("onnx.Precision", kind),
            cast("onnx.Exporter", exporter),
            optimum_env,
            progress=progress,
        )


def to_transformers(source: Path, target: Path, kind: str, force: bool = False, progress: Progress = silent) -> None:
    """Writes a Transformers folder of a GGUF file; arguments as for ``dequantize``.

    Raises:
        InputError: the source is a folder, or cannot be dequantized.
        MissingExtraError: a package of the extras "convert" and "gguf" is missing.
    """
    if source.is_dir():
        raise InputError(f"--to transformers: expected a GGUF file, found the folder {source}", hint="use it as it is")
    dequantization.dequantize(source, target, kind, force, progress)
