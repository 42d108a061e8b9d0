"""The facts of an ONNX folder, from its graph's file and its JSON files; neither onnxruntime nor the weights are needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepatch.converters.hf import specs
from edgepatch.converters.hf.specs import FolderHeader
from edgepatch.converters.onnx.files import ITEM_BITS, GraphFile, Tensor, open_folder
from edgepatch.converters.onnx.identity import read_identity
from edgepatch.decoding import defaults
from edgepatch.errors import InputError
from edgepatch.inspection.facts import ModelFacts, Shape, TensorType, printable, tensor_types
from edgepatch.inspection.folder_facts import (
    cache_facts,
    folder_files,
    other_models,
    read_origin,
    read_template,
    read_vocabulary,
)
from edgepatch.runtimes.onnx.runtime import DEFAULT_POSITIONS, GENAI_CONFIG
from edgepatch.tensors import ModelSpec

ELEMENT_NAMES: Mapping[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
    17: "float8",
    18: "float8",
    19: "float8",
    20: "float8",
    21: "uint4",
    22: "int4",
}
"""Number of an element type in ``onnx.proto`` -> its name."""

FLOATS = frozenset({1, 10, 11, 16})
WHOLE = frozenset({2, 3, 21, 22})
"""Types in which weights are kept when they are rounded to whole numbers."""

TABLES = ("cos_cache", "sin_cache", "inv_freq")
"""Endings of tensors that are computed from the config, and no parameters."""

CACHE_TYPES = {1: {"f32": 4.0}, 10: {"f16": 2.0}}


def read_onnx_folder(folder: Path) -> ModelFacts:
    """The facts of an ONNX folder.

    Raises:
        InputError: its graph is missing, damaged, or wants files that are missing, too short or outside of the folder.
    """
    graph = open_folder(folder)
    config, genai = (specs.read_json(folder / name) for name in ("config.json", GENAI_CONFIG))
    header = FolderHeader(folder, config)
    spec, quantization, no_spec = _identity(folder, graph)
    types = tensor_types((_type(graph, tensor), tensor.num_bytes) for tensor in graph.tensors if _is_stored(tensor))
    shape = _shape(header, genai.get("model"), spec)
    positions = min(shape.context_length, DEFAULT_POSITIONS) if shape.context_length else None
    return ModelFacts(
        path=folder,
        kind="ONNX folder",
        runtime="onnx",
        origin=read_origin(folder, config),
        architecture=spec.model_type if spec else _architecture(header, genai),
        num_parameters=sum(_num_parameters(graph, tensor) for tensor in graph.tensors),
        files=_files(folder, graph.path),
        quantization=quantization or _commonest(types),
        tensor_types=types,
        shape=shape,
        vocabulary=read_vocabulary(header),
        chat_template=read_template(folder, header.tokenizer_config),
        spec=spec,
        no_spec=no_spec,
        cache=cache_facts(spec, _cache_types(graph), positions),
        weight_bytes=sum(kind.num_bytes for kind in types),
        sampling=defaults.of_folder(folder),
        also=other_models(folder, "onnx"),
        more=_more(graph),
    )


def _identity(folder: Path, graph: GraphFile) -> tuple[ModelSpec | None, str, str]:
    """(spec, quantization, why there is none)."""
    try:
        return *read_identity(folder, graph, graph.metadata), ""
    except InputError as error:
        return None, "", f"{error}" + (f"; {error.hint}" if error.hint else "")


def _is_stored(tensor: Tensor) -> bool:
    """Whether a tensor is part of the weights, and no constant of the graph's arithmetic."""
    return bool(tensor.shape) and (tensor.data_type in FLOATS or tensor.data_type in WHOLE)


def _type(graph: GraphFile, tensor: Tensor) -> str:
    if tensor.name in graph.packed:
        return f"int{graph.packed[tensor.name]}"
    if tensor.name in graph.scales:
        return "scales"
    return ELEMENT_NAMES.get(tensor.data_type, f"type {tensor.data_type}")


def _num_parameters(graph: GraphFile, tensor: Tensor) -> int:
    """How many weights a tensor holds; none where it only serves others."""
    if tensor.name in graph.scales or tensor.name.endswith(TABLES):
        return 0
    num_bits = tensor.num_bytes * 8
    if tensor.name in graph.packed:
        return num_bits // max(graph.packed[tensor.name], 1)
    is_weight = _is_stored(tensor) and (tensor.data_type in FLOATS or len(tensor.shape) > 1)
    return num_bits // ITEM_BITS[tensor.data_type] if is_weight else 0


def _commonest(types: tuple[TensorType, ...]) -> str:
    return types[0].name if types else "unknown"


def _architecture(header: FolderHeader, genai: Mapping[str, Any]) -> str:
    model = genai.get("model")
    kind = header.config.get("model_type") or (model.get("type") if isinstance(model, dict) else "")
    return printable(kind or "unknown")


def _shape(header: FolderHeader, genai: Any, spec: ModelSpec | None) -> Shape:
    """Sizes of the stamped spec; the rest from the folder's JSON files."""
    model = genai if isinstance(genai, dict) else {}
    decoder = model.get("decoder")
    sources = [model, decoder if isinstance(decoder, dict) else {}, header.config]

    def number(*names: str) -> int | None:
        values = [source.get(name) for name in names for source in sources]
        return next((value for value in values if type(value) is int and value > 0), None)

    tied = header.config.get("tie_word_embeddings")
    return Shape(
        num_layers=spec.num_hidden_layers if spec else number("num_hidden_layers"),
        hidden_size=spec.hidden_size if spec else number("hidden_size"),
        num_heads=number("num_attention_heads"),
        num_kv_heads=spec.num_key_value_heads if spec else number("num_key_value_heads"),
        head_dim=spec.head_dim if spec else number("head_size", "head_dim"),
        feed_forward=number("intermediate_size"),
        context_length=number("context_length", "max_position_embeddings"),
        rope_theta=spec.rope_theta if spec else None,
        rope_scaling=spec.rope_scaling if spec else {},
        has_tied_head=tied if isinstance(tied, bool) else None,
    )


def _cache_types(graph: GraphFile) -> Mapping[str, float]:
    """The one type of cache that the graph takes."""
    kinds = {kind for name, kind in graph.inputs.items() if "past_key_values" in name and kind in CACHE_TYPES}
    return CACHE_TYPES[kinds.pop()] if len(kinds) == 1 else CACHE_TYPES[1]


def _files(folder: Path, graph_file: Path) -> dict[str, int]:
    files = folder_files(folder)
    if graph_file.parent != folder:
        inner = folder_files(graph_file.parent)
        files |= {f"{graph_file.parent.name}/{name}": size for name, size in inner.items()}
    return files


def _more(graph: GraphFile) -> dict[str, str]:
    operators = ", ".join(f"{count} {name}" for name, count in graph.operators.most_common(8))
    said = {"graph": graph.path.name, "producer": printable(graph.producer), "operators": printable(operators)}
    return {**said, **{printable(key): printable(value) for key, value in graph.metadata.items()}}
