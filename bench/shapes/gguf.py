"""Models of real sizes with random weights, as GGUF files: speed does not depend on what the weights say.

Written block by block, so that a model never has to fit in memory, and without a download. ``shapes.onnx`` writes the same models as
ONNX folders, ``shapes.memory`` says what they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.shapes.blocks import CHUNK_BLOCKS, FILE_TYPES, tensor_types
from edgepatch.bench.shapes.shape import CHAT_TEMPLATE, EPSILON, MERGE, Shape, norm, weight_deviation
from edgepatch.converters.gguf.blocks import random_blocks
from edgepatch.errors import InputError


def write_gguf(path: Path, shape: Shape, kind: str = "Q4_0", rng_seed: int = 0) -> None:
    """Writes a random llama-like model; matrices in ``kind``, norms in float32.

    Args:
        path: the file; an unfinished one has another name.
        shape: one of ``SHAPES``, or another.
        kind: F16, Q8_0 or Q4_0, or Q4_K_M for the mixture of block types that llama.cpp's quantizer chooses by tensor.
        rng_seed: of the weights.

    Raises:
        InputError: the kind is another, or a row is no multiple of its block.
    """
    import gguf

    if kind not in FILE_TYPES:
        raise InputError(
            f"type: expected one of {', '.join(FILE_TYPES)}, found {kind}", hint="quantize an F16 file for other types"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _describe(writer, shape, kind)
    tensors, types = shape.tensors(), tensor_types(shape, kind)
    for name, dimensions in tensors.items():
        _announce(writer, name, dimensions, types.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(rng_seed)
    for name, dimensions in tensors.items():
        parts = [norm(name, dimensions, rng_seed)] if name not in types else _parts(rng, dimensions, types[name])
        _write_tensor(writer, parts)
    writer.close()
    unfinished.replace(path)


def _announce(writer: Any, name: str, dimensions: tuple[int, ...], kind: str | None) -> None:
    import gguf

    if kind is None:
        writer.add_tensor_info(name, dimensions, np.dtype(np.float32), prod(dimensions) * 4)
        return
    matrix_type = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[matrix_type]
    row_bytes = dimensions[-1] // values * size
    stored = (*dimensions[:-1], row_bytes) if kind != "F16" else dimensions
    dtype = np.dtype(np.uint8) if kind != "F16" else np.dtype(np.float16)
    writer.add_tensor_info(name, stored, dtype, prod(dimensions[:-1]) * row_bytes, raw_dtype=matrix_type)


def _describe(writer: Any, shape: Shape, kind: str) -> None:
    import gguf

    writer.add_name("random weights")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(shape.vocabulary())
    kinds = [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    writer.add_token_types([gguf.TokenType.NORMAL] * (shape.vocab_size - len(kinds)) + kinds)
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_bos_token_id(shape.vocab_size - 3)
    writer.add_eos_token_id(shape.vocab_size - 2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_tensor(writer: Any, parts: Iterator[NDArray[Any]] | list[NDArray[np.float32]]) -> None:
    """Appends a tensor's bytes and the padding behind them, in portions."""
    output = writer.fout[0]
    writer.write_padding(output, output.tell())
    for part in parts:
        part.tofile(output)
    writer.write_padding(output, output.tell())


def _parts(rng: np.random.Generator, dimensions: tuple[int, ...], kind: str) -> Iterator[NDArray[Any]]:
    import gguf

    count = prod(dimensions) // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    for start in range(0, count, CHUNK_BLOCKS):
        yield random_blocks(rng, min(CHUNK_BLOCKS, count - start), kind, weight_deviation(dimensions[-1]))
