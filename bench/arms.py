"""What a user would take in place of a patch: the same model with a LoRA adapter or a control vector, in every runtime.

llama.cpp and ONNX Runtime apply the adapter beside the quantized weights, in float32; PyTorch has it merged.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.columns import TORCH, Column
from edgepatch.converters.hf import folders
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.converters.peft.adapters import CONFIG_FILE, TENSOR_FILE
from edgepatch.converters.peft.lora import merge_lora, write_lora
from edgepatch.errors import InputError
from edgepatch.files.canonical import canonical_json
from edgepatch.files.writing import write_atomically
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session
from edgepatch.tensors import ModelSpec


def load_lora(column: Column, model: Path, adapter: Path, kept: Path, **options: Any) -> Session:
    """A column's model with a LoRA adapter.

    Args:
        column: which runtime and quantization.
        model: the column's file, beside those of all other columns (``columns.convert_model``).
        adapter: PEFT folder.
        kept: folder that keeps converted adapters, for the next call.
        **options: of the runtime.

    Raises:
        InputError: the adapter cannot be read or converted or was trained for another base, or a file cannot be written.
        MissingExtraError: a package is missing.
    """
    base = TORCH.path(model.parent)
    converted = kept / _identity(adapter, base)
    if column.runtime == "llamacpp":
        path = converted / "lora.gguf"
        if not path.is_file():
            write_lora(adapter, base, path)
        return load_llamacpp(model, path, **options)
    path = column.path(converted)
    if column.runtime == "torch":
        if not path.is_dir():
            merge_lora(base, adapter, path)
        return load_runtime(path, None, **options)
    if not path.is_dir():
        onnx.export(base, path, cast("onnx.Precision", column.precision), adapter=adapter)
    return load_runtime(path, None, **options)


def _identity(adapter: Path, base: Path) -> str:
    """Names an adapter's files and the model that they are for."""
    digest = hashlib.sha256(canonical_json(folders.read_spec(base).as_dict()))
    try:
        for name in (CONFIG_FILE, TENSOR_FILE):
            digest.update((adapter / name).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the adapter {adapter}: {error.strerror}", hint="train it again") from error
    return digest.hexdigest()[:16]


# llama.cpp.


def load_llamacpp(base: Path, lora: Path | None = None, control_vector: Path | None = None, **options: Any) -> Session:
    """A GGUF file with an adapter, a control vector, both or neither, and no patch.

    Args:
        base: the GGUF file, of any quantization.
        lora: GGUF file of ``converters.lora.write_lora``; applied unmerged, beside the weights.
        control_vector: GGUF file of ``write_control_vector``.
        **options: of ``LlamaCppRuntime``.

    Raises:
        InputError: a file cannot be read, or does not fit the model.
        MissingExtraError: llama-cpp-python or gguf is not installed.
    """
    runtime = LlamaCppRuntime(base, None, **options)
    try:
        loras = [] if lora is None else [runtime.model.load_lora(lora)]
        directions = None if control_vector is None else read_control_vector(control_vector, runtime.spec)
        if loras or directions is not None:
            runtime.context.set_adapters(loras, directions)
    except BaseException:
        runtime.close()
        raise
    return Session(runtime, None)


DIRECTION = "direction."
"""Name of a layer's vector in the file, before the layer's number; the first layer has none."""


def random_directions(spec: ModelSpec, norm: float, rng_seed: int = 0) -> NDArray[np.float32]:
    """(L, D) directions of a given length: as a control vector they cost what trained ones cost."""
    directions = np.random.default_rng(rng_seed).standard_normal((spec.num_hidden_layers, spec.hidden_size))
    directions *= norm / np.linalg.norm(directions, axis=1, keepdims=True)
    return directions.astype(np.float32)


def write_control_vector(spec: ModelSpec, directions: NDArray[np.float32], target: Path) -> None:
    """Writes directions, one a layer, in llama.cpp's form of a control vector.

    Args:
        spec: the model.
        directions: (L, D) float32, added to what each layer gives; that of the first layer has no place in the form.
        target: the GGUF file; it appears complete or not at all.
    """
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "vector.gguf", "controlvector")
        try:
            writer.add_string("controlvector.model_hint", spec.model_type)
            writer.add_uint32("controlvector.layer_count", spec.num_hidden_layers - 1)
            for layer in range(1, spec.num_hidden_layers):
                writer.add_tensor(f"{DIRECTION}{layer}", directions[layer])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        write_atomically(target, (Path(folder) / "vector.gguf").read_bytes())


def read_control_vector(path: Path, spec: ModelSpec) -> NDArray[np.float32]:
    """(L - 1, D) of the layers from the second on."""
    import gguf

    vectors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in gguf.GGUFReader(path).tensors}
    names = [f"{DIRECTION}{layer}" for layer in range(1, spec.num_hidden_layers)]
    if sorted(vectors) != sorted(names) or any(vector.shape != (spec.hidden_size,) for vector in vectors.values()):
        raise InputError(
            f"{path}: expected {len(names)} directions of {spec.hidden_size} values, found {len(vectors)}",
            hint="make it for this model",
        )
    return np.stack([vectors[name] for name in names])
