"""The three kinds of decoder graphs, recognised by their inputs, and a plain way to run each.

======================  ===================================  =========================  ==============
kind                    made by                              past                       positions
======================  ===================================  =========================  ==============
shared buffer           onnxruntime-genai's builder          written in place           from the mask
growing, "present"      optimum                              given back, longer by T    given, or none
growing, "output.past"  Transformers' ``OnnxExporter``       given back, longer by T    given
======================  ===================================  =========================  ==============
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.onnx.files import GraphFile
from edgepatch.errors import InputError
from edgepatch.tensors import KVSeed, ModelSpec

PAST_NAMES = (  # input, output
    ("past_key_values.{layer}.{kind}", "present.{layer}.{kind}"),
    ("input.past_key_values.layers.{layer}.{kind}s", "output.past_key_values.layers.{layer}.{kind}s"),
)
WINDOW_INPUT = re.compile(r"input\.past_key_values\.layers\.\d+\._sliding_window_tensor")
ELEMENT_TYPES: Mapping[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
KINDS = ("key", "value")
REEXPORT = "convert the model again: edgepatch convert base --to onnx"


@dataclass(frozen=True)
class DecoderGraph:
    """How a decoder graph takes its past.

    Attributes:
        past: 2 L inputs: key and value of layer 0, of layer 1, ...
        present: the outputs that they come back as.
        shared: past and present are one buffer (B, K, M, H) that the graph writes to; else the past (B, K, N, H) comes back
            as (B, K, N + T, H).
        takes_positions: whether ``position_ids`` is an input.
        windows: scalar inputs that want the width of the sliding window.
        cache_type: element type of the past.
        logits_type: element type of the logits.
    """

    past: tuple[str, ...]
    present: tuple[str, ...]
    shared: bool
    takes_positions: bool
    windows: tuple[str, ...]
    cache_type: type[np.floating[Any]]
    logits_type: type[np.floating[Any]]

    @property
    def takes_ragged_rows(self) -> bool:
        """Whether rows of different lengths can be continued as one batch."""
        return self.shared or self.takes_positions


def recognise(session: Any, file: GraphFile, spec: ModelSpec) -> DecoderGraph:
    """How to seed a graph.

    Args:
        session: onnxruntime's, of the graph.
        file: what the graph's file says.
        spec: the model that the graph is.

    Raises:
        InputError: the inputs, outputs, their shapes or element types are of no known kind, or not the model's.
    """
    inputs, outputs = ({x.name: x for x in values} for values in (session.get_inputs(), session.get_outputs()))
    for past_name, present_name in PAST_NAMES:
        past, present = (_names(name, spec.num_hidden_layers) for name in (past_name, present_name))
        others = inputs.keys() - set(past)
        windows = tuple(sorted(name for name in others if WINDOW_INPUT.fullmatch(name)))
        required, optional = {"input_ids", "attention_mask"}, {"position_ids", *windows}
        if (
            inputs.keys() >= set(past) | required
            and others <= required | optional
            and outputs.keys() >= {*present, "logits"}
        ):
            break
    else:
        raise InputError(
            f"{file.path}: a graph of {spec.num_hidden_layers} layers with the inputs {sorted(inputs)} cannot take a seed",
            hint=REEXPORT,
        )
    positions = "position_ids" in inputs
    shared = not positions and file.operators["GroupQueryAttention"] == spec.num_hidden_layers
    if not shared and not positions and file.operators["GroupQueryAttention"]:
        raise InputError(f"{file.path}: not all of its attention layers write to a shared buffer", hint=REEXPORT)
    cache_type = _element_type(file, [inputs[n] for n in past] + [outputs[n] for n in present])
    for name in past:
        _require_shape(file, name, inputs[name].shape, spec)
    return DecoderGraph(past, present, shared, positions, windows, cache_type, _element_type(file, [outputs["logits"]]))


def _names(template: str, layers: int) -> tuple[str, ...]:
    return tuple(template.format(layer=layer, kind=kind) for layer in range(layers) for kind in KINDS)


def _element_type(file: GraphFile, tensors: Sequence[Any]) -> type[np.floating[Any]]:
    types = Counter(tensor.type for tensor in tensors)
    if len(types) != 1 or not types.keys() <= ELEMENT_TYPES.keys():
        raise InputError(
            f"{file.path}: {tensors[0].name} and the like: expected one of {sorted(ELEMENT_TYPES)}, found {sorted(types)}",
            hint=REEXPORT,
        )
    return ELEMENT_TYPES[next(iter(types))]


def _require_shape(file: GraphFile, name: str, shape: Sequence[Any], spec: ModelSpec) -> None:
    """Dimensions that the graph states must be the model's; those that it leaves open are taken from the spec."""
    stated = {axis: int(shape[axis]) for axis in (1, 3) if axis < len(shape) and str(shape[axis]).isdigit()}
    expected = {1: spec.num_key_value_heads, 3: spec.head_dim}
    if len(shape) != 4 or any(stated[axis] != expected[axis] for axis in stated):
        raise InputError(
            f"{file.path}: {name}: expected (B, {expected[1]}, N, {expected[3]}), found {tuple(shape)}", hint=REEXPORT
        )


def quantization(file: GraphFile, graph: DecoderGraph) -> str:
    """How a graph's weights are stored, as ``Runtime.quantization`` says it."""
    if file.bits:
        return "int4" if min(file.bits) <= 4 else "int8"
    if any(file.operators[name] for name in ("MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul")):
        return "int8"
    return "F16" if graph.cache_type is np.float16 else "F32"


def evaluate(
    session: Any, graph: DecoderGraph, spec: ModelSpec, seed: KVSeed | None, tokens: Sequence[int], window: int = 0
) -> NDArray[np.float32]:
    """One forward pass of a batch of one behind a seed, with plain arrays: slow, short, and a check of what is fast.

    Args:
        session: onnxruntime's.
        graph: its kind.
        spec: K and H.
        seed: keys after RoPE at positions 0..P-1; ``None`` for the bare model.
        tokens: T ids, at least one.
        window: width of the sliding window, for graphs that ask for it.

    Returns:
        (T, V) logits.
    """
    before = seed.num_virtual_tokens if seed else 0
    total = before + len(tokens)
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": np.array([tokens], dtype=np.int64),
        "attention_mask": np.ones((1, total), dtype=np.int64),
        **{name: np.array(window, dtype=np.int64) for name in graph.windows},
    }
    if graph.takes_positions:
        feeds["position_ids"] = np.arange(before, total, dtype=np.int64)[None]
    for i, name in enumerate(graph.past):
        cells = np.zeros((1, spec.num_key_value_heads, before, spec.head_dim), dtype=graph.cache_type)
        if seed:
            cells[0] = (seed.values if i % 2 else seed.keys)[i // 2]
        feeds[name] = cells
    return np.asarray(session.run(["logits"], feeds)[0][0], dtype=np.float32)
