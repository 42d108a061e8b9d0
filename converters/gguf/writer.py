"""GGUF files from Transformers folders, and their quantization through llama.cpp.

The dense Llama family is converted here, with the gguf package's own names of tensors; llama.cpp's convert_hf_to_gguf.py, which
comes with its sources, converts everything else, and its files are as good.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import rope
from edgepatch.converters.first_contact import Contact, Failure, Report, try_apart
from edgepatch.converters.gguf.library import (
    NEEDS_MATRIX,
    PACKAGE,
    library_errors,
    load_library,
    quantization_types,
    quantizing,
)
from edgepatch.converters.gguf.specs import read_spec
from edgepatch.converters.gguf.tokenizers import add_tokenizer, refuse, require_same_tokenizer
from edgepatch.converters.hf import folders
from edgepatch.converters.origins import Origin
from edgepatch.decoding import defaults
from edgepatch.errors import InputError, MissingExtraError, UnfitModelError
from edgepatch.files import writing
from edgepatch.progress import Progress, silent
from edgepatch.tensors import ModelSpec

CONVERTED = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` in Transformers that are converted here."""

TENSOR_STAGE = re.compile(r"quantizing tensor (\d+) of (\d+)")
QUANTIZATION_DEADLINE_S, QUANTIZED_BYTES_PER_S = 600.0, 1e5
"""Of the slowest types on the slowest devices."""


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuses what the conversion below would get wrong without a word."""
    if config.get("model_type") not in CONVERTED:
        raise refuse(folder, f"model_type: expected one of {', '.join(CONVERTED)}, found {config.get('model_type')!r}")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(folder, f"hidden_act: expected silu, found {config['hidden_act']}")
    sliding = "sliding_attention" in (config.get("layer_types") or [])
    if sliding or (config["model_type"] == "mistral" and config.get("sliding_window")):
        raise refuse(folder, "sliding-window attention cannot be converted here")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "linear", "llama3"):
        raise refuse(folder, f"rope scaling: expected none, linear or llama3, found {scaling}")


def _check_rope(folder: Path, spec: ModelSpec) -> None:
    unknown = set(spec.rope_scaling) - {"rope_type", "factor", *rope.LLAMA3}
    if unknown:
        raise refuse(folder, f"rotary embedding: expected none of {sorted(unknown)}")


def _add_settings(writer: Any, folder: Path, config: dict[str, Any], spec: ModelSpec, type_name: str) -> None:
    origin = Origin.of_config(config)
    writer.add_type("model")
    writer.add_name(origin.name if origin and origin.name else folder.resolve().name)
    for key, value in origin.metadata().items() if origin else ():
        writer.add_string(key, value)
    for key, value in defaults.of_folder(folder).gguf_metadata.items():
        (writer.add_int32 if key.endswith("top_k") else writer.add_float32)(key, value)
    writer.add_file_type(0 if type_name == "F32" else 1)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(spec.vocab_size)
    if spec.rope_scaling.get("rope_type") == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(spec.rope_scaling["factor"]))


class _Weights:
    """The tensors of a Transformers folder under their GGUF names, converted one at a time.

    Raises:
        InputError: a tensor has no name in GGUF, or one is missing.
    """

    def __init__(self, folder: Path, config: dict[str, Any], spec: ModelSpec, type_name: str) -> None:
        import gguf
        from safetensors import safe_open

        self.folder, self.config, self.spec = folder, config, spec
        self.architecture = spec.model_type
        self.matrix_dtype = np.dtype(np.float32 if type_name == "F32" else np.float16)
        kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(kind, spec.num_hidden_layers)
        tied = bool(config.get("tie_word_embeddings"))
        self.sources: dict[str, tuple[Any, str]] = {}
        self._shards = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        for shard in self._shards:
            for source in list(shard.keys()):  # type: ignore[no-untyped-call]
                if source.endswith("rotary_emb.inv_freq") or (tied and source == "lm_head.weight"):
                    continue
                target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise refuse(folder, f"tensor {source} has no name in GGUF")
                self.sources[target] = (shard, source)
        if not tied and "output.weight" not in self.sources:
            raise InputError(f"{folder}: lm_head.weight is missing", hint="download the model again")

    def shapes(self) -> Iterator[tuple[str, list[int], np.dtype[Any]]]:
        """(name, shape, dtype) in the order of ``arrays``; vectors stay float32, as llama.cpp wants them."""
        for target, (shard, source) in self.sources.items():
            shape = list(shard.get_slice(source).get_shape())
            yield target, shape, np.dtype(np.float32) if len(shape) == 1 else self.matrix_dtype

    def arrays(self) -> Iterator[NDArray[Any]]:
        """Tensors in llama.cpp's layout and in the dtype that ``shapes`` told."""
        for target, (shard, source) in self.sources.items():
            array = shard.get_tensor(source).float().numpy()
            heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.spec.num_key_value_heads}
            role = target.rsplit(".", 2)[-2]
            if role in heads:
                array = rope.projection_to_llamacpp(array, heads[role], self.architecture)
            with np.errstate(over="ignore"):
                array = array.astype(np.float32 if array.ndim == 1 else self.matrix_dtype)
            if not np.isfinite(array).all():
                hint = "convert it to F32" if self.matrix_dtype == np.float16 else "the model is damaged"
                raise InputError(f"{self.folder}: {source} has values that are not finite in {array.dtype}", hint)
            yield np.ascontiguousarray(array)


def _write_model(
    path: Path, folder: Path, config: dict[str, Any], spec: ModelSpec, type_name: str, progress: Progress
) -> None:
    import gguf

    weights = _Weights(folder, config, spec, type_name)
    writer = gguf.GGUFWriter(path, weights.architecture)
    try:
        _add_settings(writer, folder, config, spec, type_name)
        add_tokenizer(writer, folder, spec.vocab_size)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        divisors = None
        if spec.rope_scaling.get("rope_type") == "llama3":
            divisors = rope.llama3_divisors(spec.rope_theta, spec.head_dim, spec.rope_scaling)
            writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
        for name, shape, dtype in weights.shapes():
            writer.add_tensor_info(name, shape, dtype, prod(shape) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for done, array in enumerate(weights.arrays()):
            progress("convert", done, len(weights.sources))
            writer.write_tensor_data(array)
        progress("convert", len(weights.sources), len(weights.sources))
    finally:
        writer.close()


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf")


def convert_folder(folder: Path, target: Path, type_name: str = "F16", progress: Progress = silent) -> ModelSpec:
    """Converts a Transformers folder (llama, mistral, qwen2, qwen3) to GGUF.

    Args:
        folder: model and tokenizer.
        target: the GGUF file; it appears complete or not at all.
        type_name: "F32" or "F16"; norms stay float32.
        progress: told of every tensor.

    Returns:
        The model, read back from the new file.

    Raises:
        InputError: the folder is incomplete or of a kind that cannot be converted here, or the file cannot be written.
        MissingExtraError: gguf, torch or safetensors is not installed.
    """
    if type_name not in ("F32", "F16"):
        raise InputError(
            f"type: expected F32 or F16, found {type_name!r}", hint="quantize the F16 file for other types"
        )
    _require_gguf()
    config = folders.read_config(folder)
    _check_config(folder, config)
    spec = folders.read_spec(folder)
    _check_rope(folder, spec)
    try:
        with writing.replacing_file(target) as temporary:
            _write_model(temporary, folder, config, spec, type_name, progress)
            _require_same(spec, read_spec(temporary))
            require_same_tokenizer(folder, temporary)
    except KeyError as error:
        raise InputError(
            f"{folder}: config.json or tokenizer.json has no {error}", hint="download the model again"
        ) from None
    return spec


def _require_same(want: ModelSpec, have: ModelSpec) -> None:
    """No file takes its place that patches for its base would refuse."""
    expected, actual = want.as_dict(), have.as_dict()
    wrong = {name: (expected[name], actual[name]) for name in expected if expected[name] != actual[name]}
    if wrong:
        raise InputError(f"this model does not survive the conversion: {wrong}", hint="it cannot be patched in GGUF")


def _matrix_error(type_name: str) -> InputError:
    hint = "use llama.cpp's llama-quantize --imatrix and take its file, or take another type, such as Q4_K_M"
    return InputError(f"{type_name} needs an importance matrix, which edgepatch does not make", hint)


def require_makeable(type_name: str) -> None:
    """Raises for a type that llama.cpp does not make of weights alone, before they are dequantized or copied.

    Raises:
        InputError: it is unknown, or needs an importance matrix.
        MissingExtraError: llama-cpp-python is not installed.
    """
    types = quantization_types()
    if type_name not in types:
        raise InputError(f"--type: llama.cpp has no type {type_name}", hint=f"take one of {', '.join(sorted(types))}")
    if NEEDS_MATRIX.fullmatch(type_name):
        raise _matrix_error(type_name)


def _quantization_error(source: Path, type_name: str, target: Path) -> InputError:
    complaint = library_errors()
    reason = writing.reason_of(target, complaint)
    if reason != complaint:
        return InputError(f"cannot write {type_name} of {source}: {reason}", writing.HINT)
    if "imatrix" in reason:
        return _matrix_error(type_name)
    if "invalid output file type" in reason:
        return InputError(
            f"llama.cpp runs models of type {type_name} but cannot quantize to it", hint="take another type"
        )
    hint = "it needs an F32 or F16 source"
    return InputError(f"llama.cpp cannot quantize {source} to {type_name}: {reason}", hint)


def quantize(
    source: Path, target: Path, type_name: str, num_threads: int | None = None, progress: Progress = silent
) -> ModelSpec:
    """Quantizes an F32 or F16 GGUF file with llama.cpp.

    Args:
        source: GGUF file in full or half precision.
        target: the quantized file; it appears complete or not at all.
        type_name: one of ``quantization_types()``: "Q8_0", "Q4_K_M", "Q4_0", ...
        num_threads: all cores when ``None``.
        progress: told of every tensor.

    Returns:
        The model, read back from the new file.

    Raises:
        InputError: the type is unknown or needs an importance matrix, the source is damaged or already quantized, or the file
            cannot be written.
        MissingExtraError: llama-cpp-python or gguf is not installed.
    """
    types = quantization_types()
    if type_name not in types:
        raise InputError(f"quantization type: expected one of {', '.join(sorted(types))}, found {type_name!r}")
    spec = read_spec(source)
    with writing.replacing_file(target) as temporary:
        settings = {"target": str(temporary), "type": type_name, "num_threads": num_threads or 0}
        contact = Contact(PACKAGE, f"{__name__}:quantize_here", (source,), settings)
        # The library reads a file that may never have been loaded: the child that would try it can do the work itself.
        deadline_s = QUANTIZATION_DEADLINE_S + source.stat().st_size / QUANTIZED_BYTES_PER_S
        outcome = try_apart(contact, {}, deadline_s, _heard(progress))
        if isinstance(outcome, Failure):
            raise UnfitModelError(
                f"{source} cannot be quantized: llama.cpp {outcome.words}", hint="get the model again"
            )
        _require_same(spec, read_spec(temporary))
    return spec


def _heard(progress: Progress) -> Callable[[str], None]:
    """Progress from what the child says that it does."""

    def hear(words: str) -> None:
        if tensor := TENSOR_STAGE.fullmatch(words):
            progress("quantize", int(tensor[1]), int(tensor[2]))

    return hear


def quantize_here(paths: Sequence[Path], settings: dict[str, Any], report: Report) -> dict[str, Any]:
    """In a child: quantizes a file.

    Raises:
        InputError: the type needs an importance matrix, or the library refuses the source or cannot write.
    """
    llama_cpp = load_library()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = quantization_types()[settings["type"]]
    parameters.nthread = settings["num_threads"]
    target = os.fsencode(settings["target"])

    def tell(_: str, done: int, total: int, /, **__: float) -> None:
        report(f"quantizing tensor {done} of {total}")

    with quantizing(tell):
        status = llama_cpp.llama_model_quantize(bytes(paths[0]), target, ctypes.byref(parameters))
        if status != 0:
            raise _quantization_error(paths[0], settings["type"], Path(settings["target"]))
    return {}
