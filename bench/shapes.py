"""GGUF models of real sizes with random weights: speed does not depend on what the weights say.

Written block by block, so that a model never has to fit in memory, and without a download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError

CHUNK_BLOCKS = 1 << 16


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

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name in GGUF -> shape in numpy's order."""
        width, heads, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab_size, width), "output_norm.weight": (width,)}
        for i in range(self.num_layers):
            layer = {
                "attn_norm": (width,), "attn_q": (heads, width), "attn_k": (kv, width), "attn_v": (kv, width),
                "attn_output": (width, heads), "ffn_norm": (width,), "ffn_gate": (self.feed_forward, width),
                "ffn_up": (self.feed_forward, width), "ffn_down": (width, self.feed_forward),
            }  # fmt: skip
            found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        return found


SHAPES = {
    "tiny": Shape(256, 2, 4, 2, 64, 512, 512, 512),
    "smollm-135m": Shape(576, 30, 9, 3, 64, 1536, 49152),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 64, 4864, 151936),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),
    "llama-3.2-3b": Shape(3072, 28, 24, 8, 128, 8192, 128256),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256),
}


def write_gguf(path: Path, shape: Shape, kind: str = "Q4_0", rng_seed: int = 0) -> None:
    """Writes a random llama-like model; matrices in ``kind``, norms in float32.

    Args:
        path: the file.
        shape: one of ``SHAPES``, or another.
        kind: a ggml type whose blocks can be filled at random: F16, Q8_0 or Q4_0.
        rng_seed: of the weights.

    Raises:
        InputError: the kind is another, or a row is no multiple of its block.
    """
    import gguf

    if kind not in ("F16", "Q8_0", "Q4_0"):
        raise InputError(f"type: expected F16, Q8_0 or Q4_0, found {kind}", hint="quantize an F16 file for other types")
    matrix_type = gguf.GGMLQuantizationType[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, shape, kind)
    rng, blocks = np.random.default_rng(rng_seed), gguf.GGML_QUANT_SIZES[matrix_type]
    tensors = shape.tensors()
    for name, dimensions in tensors.items():
        if len(dimensions) == 1:
            writer.add_tensor_info(name, dimensions, np.dtype(np.float32), prod(dimensions) * 4)
            continue
        if dimensions[-1] % blocks[0]:
            raise InputError(f"{name}: rows of {dimensions[-1]} are no multiple of {kind}'s blocks of {blocks[0]}")
        row_bytes = dimensions[-1] // blocks[0] * blocks[1]
        stored = (*dimensions[:-1], row_bytes) if kind != "F16" else dimensions
        dtype = np.dtype(np.uint8) if kind != "F16" else np.dtype(np.float16)
        writer.add_tensor_info(name, stored, dtype, prod(dimensions[:-1]) * row_bytes, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for dimensions in tensors.values():
        _write_tensor(writer, rng, dimensions, kind, blocks)
    writer.close()


def _describe(writer: Any, shape: Shape, kind: str) -> None:
    import gguf

    writer.add_name("random weights")
    writer.add_file_type({"F16": 1, "Q8_0": 7, "Q4_0": 2}[kind])
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
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256)), *(chr(256 + n) for n in range(68))]
    words = [f"w{n}" for n in range(shape.vocab_size - len(letters) - 3)]
    special = ["<|begin|>", "<|end|>", "th"]
    kinds = [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(letters + words + special)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(letters) + len(words)) + kinds)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(shape.vocab_size - 3)
    writer.add_eos_token_id(shape.vocab_size - 2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def _write_tensor(writer: Any, rng: np.random.Generator, dimensions: tuple[int, ...], kind: str, blocks: tuple[int, int]) -> None:
    """Appends a tensor's bytes and the padding behind them, in portions."""
    output = writer.fout[0]
    writer.write_padding(output, output.tell())
    for part in _parts(rng, dimensions, kind, blocks):
        part.tofile(output)
    writer.write_padding(output, output.tell())


def _parts(
    rng: np.random.Generator, dimensions: tuple[int, ...], kind: str, blocks: tuple[int, int]
) -> Iterator[NDArray[Any]]:
    if len(dimensions) == 1:
        yield (1 + 0.05 * rng.standard_normal(dimensions)).astype(np.float32)
        return
    scale = 0.7 / np.sqrt(dimensions[-1])  # keeps activations at the same size from layer to layer
    count = prod(dimensions) // blocks[0]
    for start in range(0, count, CHUNK_BLOCKS):
        yield _blocks(rng, min(CHUNK_BLOCKS, count - start), kind, blocks, scale)


def _blocks(rng: np.random.Generator, count: int, kind: str, blocks: tuple[int, int], scale: float) -> NDArray[Any]:
    if kind == "F16":
        return (scale * rng.standard_normal(count * blocks[0])).astype(np.float16)
    # A block is a float16 step and whole numbers: uniform ones of -8..7 or -128..127 have this standard deviation.
    deviation = 4.6 if kind == "Q4_0" else 74.0
    data = rng.integers(0, 256, (count, blocks[1]), dtype=np.uint8)
    data[:, :2] = np.full(count, scale / deviation, dtype="<f2").view(np.uint8).reshape(count, 2)
    return data
