"""Smaller weights for a float32 graph: float16 throughout, or blocks of 32 with 8 or 4 bits in every matrix product."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError

BLOCK_SIZE = 32
INT8_ACTIVATIONS = 4  # accuracy level of MatMulNBits: nearly three times the speed of full-precision activations
CAST_BACK = "_cast_to_fp32_node"  # how onnxruntime's converter names its own
EXTERNAL_BYTES = 1024  # smaller tensors stay in the graph's own file


def reduce(model_file: Path, precision: str) -> None:
    """Replaces a float32 graph by one of lower precision.

    Args:
        model_file: with its weights, in one file or with others beside it.
        precision: "fp16" (weights, activations, cache and logits), "int8" or "int4" (k-quant, the last product in int8).

    Raises:
        InputError: the graph holds no weights that can be made smaller, or of sizes that 4 bits cannot take.
    """
    if precision == "fp32":
        return
    with _quiet():
        model = (
            _to_float16(model_file) if precision == "fp16" else _to_blocks(model_file, 8 if precision == "int8" else 4)
        )
    _replace(model, model_file)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizers log every node, print a bar and warn of every rounded constant."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _to_float16(model_file: Path) -> Any:
    """Half precision throughout, but for rotary angles: in float16 they are wrong by more with every position."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(model_file))
    reduced = convert_float_to_float16(model, node_block_list=sorted(_angle_nodes(model)))
    _drop_repeated_casts(reduced)
    _join_cast_pairs(reduced)
    return reduced


def _angle_nodes(model: Any) -> set[str]:
    """Names of the nodes that make sines and cosines, and of all that feed them; none where attention rotates by itself."""
    producers = {output: node for node in model.graph.node for output in node.output}
    names: set[str] = set()
    waiting = [node for node in model.graph.node if node.op_type in ("Cos", "Sin")]
    while waiting:
        node = waiting.pop()
        if node.name not in names:
            names.add(node.name)
            waiting += [producers[name] for name in node.input if name in producers]
    return names


def _drop_repeated_casts(model: Any) -> None:
    """The converter writes the same cast twice for a node that takes the same input twice, which no session loads."""
    produced: set[str] = set()
    for node in list(model.graph.node):
        outputs = {name for name in node.output if name}  # an output that is left out has no name
        if produced & outputs:
            model.graph.node.remove(node)
        produced |= outputs


def _join_cast_pairs(model: Any) -> None:
    """Between two kept nodes the converter casts to float16 and back, which rounds the angles all the same."""
    import onnx

    producers = {output: node for node in model.graph.node for output in node.output}

    def casts_to(node: Any) -> int:
        return int(node.attribute[0].i) if node.op_type == "Cast" else 0

    originals = {
        node.output[0]: producers[node.input[0]].input[0]
        for node in model.graph.node
        if node.name.endswith(CAST_BACK)
        and node.input[0] in producers
        and casts_to(producers[node.input[0]]) == onnx.TensorProto.FLOAT16
    }
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = originals.get(name, name)


def _to_blocks(model_file: Path, bits: int) -> Any:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        KQuantWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    model = onnx.load(str(model_file))
    if bits == 4:
        _require_even_blocks(model, model_file)
    if bits == 8:
        method = DefaultWeightOnlyQuantConfig(BLOCK_SIZE, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS, bits=8)
    else:
        method = KQuantWeightOnlyQuantConfig(customized_weight_config={_last_product(model): {"bits": 8}})
    quantizer = MatMulNBitsQuantizer(
        model, bits, BLOCK_SIZE, is_symmetric=bits == 8, accuracy_level=INT8_ACTIVATIONS, algo_config=method
    )
    quantizer.process()
    reduced = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in reduced.graph.node):
        raise InputError(
            f"{model_file}: its graph holds no matrix product to quantize", hint="export it in fp32 or fp16"
        )
    return reduced


def _require_even_blocks(model: Any, model_file: Path) -> None:
    """onnxruntime's k-quant packs the zero points of two blocks into a byte, and fails on an odd one."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        shape = shapes.get(node.input[1], ()) if node.op_type == "MatMul" else ()
        if len(shape) == 2 and -(-shape[0] // BLOCK_SIZE) % 2:
            raise InputError(
                f"{model_file}: {node.name}: expected a multiple of {2 * BLOCK_SIZE} inputs for 4 bits, found {shape[0]}",
                hint="export it in int8 or fp16, or with the builder",
            )


def _last_product(model: Any) -> str:
    """Name of the node that makes the logits, which is the one most sensitive to rounding."""
    return str(next(node.name for node in reversed(model.graph.node) if node.op_type == "MatMul"))


def _replace(model: Any, model_file: Path) -> None:
    import onnx

    for file in model_file.parent.glob(f"{model_file.name}*"):
        file.unlink()
    onnx.save(
        model,
        str(model_file),
        save_as_external_data=True,
        location=f"{model_file.name}.data",
        size_threshold=EXTERNAL_BYTES,
    )
