"""A LoRA adapter for onnxruntime-genai: the same graph with the factors as inputs, and a file of random ones.

The library takes adapters only for graphs that have inputs for them, which its own builder does not write: it makes the factors
weights. Olive's form is written here: two matrices beside every linear layer, empty where no adapter is active.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

LINEAR = ("qkv_proj.MatMul", "o_proj.MatMul", "gate_proj.MatMul", "up_proj.MatMul", "down_proj.MatMul")
PACKED = 3
"""Adapters of queries, keys and values, which the graph computes in one matrix: their factors lie side by side."""

FLOAT = 1


def write_lora_graph(folder: Path, target: Path) -> dict[str, tuple[int, int]]:
    """The folder of a model that takes adapters.

    Args:
        folder: of ``shapes.onnx.write_onnx``, or of the builder's for a Llama.
        target: becomes the folder.

    Returns:
        Name of a linear layer -> inputs and outputs.
    """
    import onnx
    from onnx import helper

    target.mkdir()
    for file in folder.iterdir():
        if file.name != "model.onnx":
            shutil.copyfile(file, target / file.name)  # links are refused where models are loaded
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    layers: dict[str, tuple[int, int]] = {}
    nodes: list[Any] = []
    for node in model.graph.node:
        nodes.append(node)
        name = next((weight.split(".weight")[0] for weight in node.input if ".weight_Q" in weight), "")
        if node.op_type != "MatMulNBits" or not name.endswith(LINEAR):
            continue
        options = {option.name: option.i for option in node.attribute}
        layers[name] = (options["K"], options["N"])
        output, node.output[0] = node.output[0], f"{node.output[0]}.base"
        for factor, shape in zip("AB", ((options["K"], "rank"), ("rank", options["N"])), strict=True):
            model.graph.input.append(helper.make_tensor_value_info(f"{name}.lora_{factor}", FLOAT, shape))
            empty = [size if isinstance(size, int) else 0 for size in shape]
            model.graph.initializer.append(helper.make_tensor(f"{name}.lora_{factor}", FLOAT, empty, []))
        nodes += [
            helper.make_node("MatMul", [node.input[0], f"{name}.lora_A"], [f"{name}.low"]),
            helper.make_node("MatMul", [f"{name}.low", f"{name}.lora_B"], [f"{name}.change"]),
            helper.make_node("Add", [node.output[0], f"{name}.change"], [output]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (target / "model.onnx").write_bytes(model.SerializeToString())
    return layers


def write_random_adapter(layers: dict[str, tuple[int, int]], rank: int, path: Path, rng_seed: int = 0) -> None:
    """Random factors in the library's own file format.

    Args:
        layers: of ``write_lora_graph``.
        rank: r.
        path: the file.
        rng_seed: of the factors.
    """
    from onnxruntime import AdapterFormat, OrtValue

    rng = np.random.default_rng(rng_seed)
    tensors: dict[str, Any] = {}
    for name, (inputs, outputs) in layers.items():
        width = rank * PACKED if "qkv" in name else rank
        down = rng.standard_normal((inputs, width), dtype=np.float32) / np.float32(np.sqrt(inputs))
        up = 0.02 * rng.standard_normal((width, outputs), dtype=np.float32) / np.float32(np.sqrt(width))
        tensors |= {
            f"{name}.lora_A": OrtValue.ortvalue_from_numpy(down),
            f"{name}.lora_B": OrtValue.ortvalue_from_numpy(up),
        }
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(tensors)
    adapter.export_adapter(str(path))
