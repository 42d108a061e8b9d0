"""Models of real sizes with random weights, as GGUF files: speed does not depend on what the weights say.

Written block by block, so that a model never has to fit in memory, and without a download. ``shapes_onnx`` writes the same models as
ONNX folders, ``shape_memory`` says what they take.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.blocks import CHUNK_BLOCKS, FILE_TYPES, tensor_types
from edgepatch.converters.gguf.blocks import random_blocks
from edgepatch.errors import InputError
from edgepatch.tensors import ModelSpec, tokenizer_digest, weight_fingerprint

EPSILON = 1e-5
SPECIAL = ("<|begin|>", "<|end|>")
MERGE = ("t", "h")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@dataclass(frozen=True)
class Shape:
    """A llama-like model's dimensions.

    Attributes:
        hidden_size: D.
        num_layers: L.
        num_heads: query heads.
        num_key_value_heads: K.
        head_dim: H.
        feed_forward: width of the MLP.
        vocab_size: V.
        context_length: positions.
        rope_theta: base of the rotary embedding.
        is_tied: whether the logits come from the matrix of token embeddings.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    feed_forward: int
    vocab_size: int
    context_length: int = 8192
    rope_theta: float = 500000.0
    is_tied: bool = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name in GGUF -> shape in numpy's order."""
        width, heads, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, width),
            "output_norm.weight": (width,),
        }
        if not self.is_tied:
            found["output.weight"] = (self.vocab_size, width)
        for i in range(self.num_layers):
            layer = {
                "attn_norm": (width,),
                "attn_q": (heads, width),
                "attn_k": (kv, width),
                "attn_v": (kv, width),
                "attn_output": (width, heads),
                "ffn_norm": (width,),
                "ffn_gate": (self.feed_forward, width),
                "ffn_up": (self.feed_forward, width),
                "ffn_down": (width, self.feed_forward),
            }
            found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        return found

    @property
    def num_parameters(self) -> int:
        """Of all tensors."""
        return sum(map(prod, self.tensors().values()))

    def norms(self, rng_seed: int = 0) -> dict[str, NDArray[np.float32]]:
        """Name in GGUF -> (D,) of each norm vector; the same in every form of the model."""
        return {name: norm(name, shape, rng_seed) for name, shape in self.tensors().items() if len(shape) == 1}

    def vocabulary(self) -> list[str]:
        """V tokens: the letters of a byte-level BPE, words, BOS, EOS, and the product of the one merge."""
        letters = [
            *map(chr, range(33, 127)),
            *map(chr, range(161, 173)),
            *map(chr, range(174, 256)),
            *(chr(256 + n) for n in range(68)),
        ]
        words = [f"w{n}" for n in range(self.vocab_size - len(letters) - 3)]
        return letters + words + [*SPECIAL, "".join(MERGE)]

    def spec(self, rng_seed: int = 0) -> ModelSpec:
        """What model this is, in every form."""
        sizes = (
            self.hidden_size,
            self.num_layers,
            self.num_key_value_heads,
            self.head_dim,
            self.vocab_size,
            self.rope_theta,
        )
        return ModelSpec("llama", *sizes, tokenizer_digest(self.vocabulary()), weight_fingerprint(self.norms(rng_seed)))


SHAPES = {
    "tiny": Shape(256, 2, 4, 2, 64, 512, 512, 512),
    "smollm-135m": Shape(576, 30, 9, 3, 64, 1536, 49152),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 64, 4864, 151936),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),
    "llama-3.2-3b": Shape(3072, 28, 24, 8, 128, 8192, 128256),
    "llama-2-7b": Shape(4096, 32, 32, 32, 128, 11008, 32000, 4096, 10000.0, is_tied=False),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, is_tied=False),
}


def norm(name: str, shape: tuple[int, ...], rng_seed: int) -> NDArray[np.float32]:
    """A random norm vector that its name alone decides."""
    rng = np.random.default_rng([rng_seed, zlib.crc32(name.encode())])
    return (1 + 0.05 * rng.standard_normal(shape)).astype(np.float32)


def weight_deviation(columns: int) -> float:
    """Standard deviation of a matrix's weights that keeps activations at the same size from layer to layer."""
    return float(0.7 / np.sqrt(columns))


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
