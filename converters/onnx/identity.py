"""Which model an ONNX graph is: metadata of the graph itself, so that a device needs onnxruntime alone to check a patch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepatch.converters.onnx.files import GraphFile
from edgepatch.errors import InputError, PatchFormatError
from edgepatch.files.writing import write_atomically
from edgepatch.tensors import ModelSpec

SPEC_KEY = "edgepatch.model_spec"
QUANTIZATION_KEY = "edgepatch.quantization"
QUANTIZING = {"DequantizeLinear", "DynamicQuantizeLinear", "GatherBlockQuantized", "MatMulInteger", "QLinearMatMul"}
"""Operators of graphs that hold whole numbers for weights, beside ``MatMulNBits``."""

BAKED_KEY = "edgepatch.baked_patch"
QUANTIZATIONS: dict[str, str] = {"fp32": "F32", "fp16": "F16", "int8": "int8", "int4": "int4"}
"""Precision of an export -> what ``Runtime.quantization`` says."""


def read_identity(folder: Path, file: GraphFile, metadata: Mapping[str, str]) -> tuple[ModelSpec, str]:
    """(spec, quantization) from a graph's metadata.

    Raises:
        InputError: the graph does not say which model it is, or holds a patch of its own.
    """
    hint = f"say which model it is: edgepatch convert stamp {folder} --base HF_FOLDER"
    if BAKED_KEY in metadata:
        raise InputError(
            f"{file.path} has the patch {metadata[BAKED_KEY]} baked into its graph, for onnxruntime-genai",
            hint="load the folder that it was made of",
        )
    if SPEC_KEY not in metadata or metadata.get(QUANTIZATION_KEY) not in QUANTIZATIONS.values():
        raise InputError(f"{file.path} was not converted by edgepatch: its metadata names no base model", hint=hint)
    try:
        return ModelSpec.from_dict(json.loads(metadata[SPEC_KEY])), _quantization(file, metadata[QUANTIZATION_KEY])
    except (ValueError, RecursionError, PatchFormatError) as error:
        raise InputError(f"{file.path}: its metadata is damaged: {error}", hint=hint) from None


def _quantization(file: GraphFile, named: str) -> str:
    """The type of the weights: nobody signs its name, which decides how far a patch's effect may deviate, so the graph must show it."""
    if not named.startswith("int"):
        return named
    if file.bits:
        return f"int{min(file.bits)}"
    return named if QUANTIZING & file.operators.keys() else QUANTIZATIONS["fp32"]


def identity(spec: ModelSpec, quantization: str) -> dict[str, str]:
    """The metadata that ``read_identity`` reads."""
    described = json.dumps(spec.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return {SPEC_KEY: described, QUANTIZATION_KEY: quantization}


def stamp(model_file: Path, properties: Mapping[str, str]) -> None:
    """Adds to a graph's metadata; its other entries stay, and weights kept in their own file are not touched.

    Raises:
        InputError: the file cannot be written; the old one stays.
    """
    import onnx

    model: Any = onnx.load(str(model_file), load_external_data=False)
    kept = {entry.key: entry.value for entry in model.metadata_props} | dict(properties)
    onnx.helper.set_model_props(model, kept)
    write_atomically(model_file, model.SerializeToString(deterministic=True))
