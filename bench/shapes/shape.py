"""The shapes of models of real sizes, and what every form of one shares: norms, vocabulary, deviation of the weights."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

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
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, width),
            "output_norm.weight": (width,),
        }
        if not self.is_tied:
            shapes["output.weight"] = (self.vocab_size, width)
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
            shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes

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
