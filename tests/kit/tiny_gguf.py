"""Tiny random GGUF models written tensor by tensor, of kinds that no converter of ours makes: sliding windows, recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN = 272, 256, 4, 2, 64, 256
CONTEXT = 128
WINDOW = 8


def write_llama(
    path: Path, add_tokenizer: Callable[[gguf.GGUFWriter], None] | None = None, context: int = CONTEXT
) -> None:
    """Two layers of plain attention, with another tokenizer where one is given."""
    writer = _begin(path, "llama", 2, [KV_HEADS] * 2, add_tokenizer, context)
    for layer in range(2):
        _attention(writer, layer, query_norms=False)
        _feed_forward(writer, layer)
    _end(writer)


def write_gemma3(path: Path, window: int = WINDOW, context: int = CONTEXT) -> None:
    """Three layers, two of them with a sliding window of 8: llama.cpp keeps two caches."""
    writer = _begin(path, "gemma3", 3, [KV_HEADS] * 3, context=context)
    writer.add_sliding_window(window)
    writer.add_sliding_window_pattern(3)
    for layer in range(3):
        _attention(writer, layer, query_norms=True)
        _feed_forward(writer, layer)
        _norm(writer, f"blk.{layer}.post_attention_norm", WIDTH)
        _norm(writer, f"blk.{layer}.post_ffw_norm", WIDTH)
    _end(writer)


def write_lfm2(path: Path) -> None:
    """A layer of attention between two short convolutions: a hybrid memory that cannot be cut back."""
    writer = _begin(path, "lfm2", 3, [0, KV_HEADS, 0])
    writer.add_shortconv_l_cache(3)
    for layer in range(3):
        if layer == 1:
            _attention(writer, layer, query_norms=True)
        else:
            _norm(writer, f"blk.{layer}.attn_norm", WIDTH)
            _weight(writer, f"blk.{layer}.shortconv.conv", (WIDTH, 3))
            _weight(writer, f"blk.{layer}.shortconv.in_proj", (3 * WIDTH, WIDTH))
            _weight(writer, f"blk.{layer}.shortconv.out_proj", (WIDTH, WIDTH))
        _feed_forward(writer, layer)
    _end(writer, "token_embd_norm")


_rng = np.random.default_rng(0)


def _begin(
    path: Path,
    architecture: str,
    layers: int,
    kv_heads: list[int],
    add_tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    context: int = CONTEXT,
) -> gguf.GGUFWriter:
    global _rng
    _rng = np.random.default_rng(len(architecture))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads if 0 in kv_heads else KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    (add_tokenizer or add_byte_level)(writer)
    _weight(writer, "token_embd", (VOCAB, WIDTH), 1.0 if architecture != "gemma3" else 0.1)
    return writer


def add_byte_level(writer: gguf.GGUFWriter, pre: str = "gpt-2", marks: tuple[str, ...] = ()) -> None:
    """Every byte, one merge, and special tokens; the first of them are read in any text where ``marks`` names them."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [*map(chr, letters), *(chr(256 + n) for n in range(68)), "th"]
    specials = [*marks, *(f"<s{i}>" for i in range(VOCAB - len(tokens) - len(marks)))]
    kinds = [gguf.TokenType.USER_DEFINED] * len(marks) + [gguf.TokenType.CONTROL] * (len(specials) - len(marks))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + specials)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + kinds)
    writer.add_token_merges(["t h"])
    _add_ends(writer)


def add_sentencepiece(writer: gguf.GGUFWriter, num_bytes: int = 256) -> None:
    """A few letters, and so many of the 256 bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(num_bytes)), "\u2581", *"abcdefgh"]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.BYTE] * num_bytes, *[gguf.TokenType.NORMAL] * 9]
    specials = [f"<s{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + specials)
    writer.add_token_types(kinds + [gguf.TokenType.CONTROL] * len(specials))
    writer.add_token_scores([0.0] * VOCAB)
    _add_ends(writer)


def _add_ends(writer: gguf.GGUFWriter) -> None:
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_add_bos_token(False)


def _end(writer: gguf.GGUFWriter, norm: str = "output_norm") -> None:
    _norm(writer, norm, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _attention(writer: gguf.GGUFWriter, layer: int, query_norms: bool) -> None:
    _norm(writer, f"blk.{layer}.attn_norm", WIDTH)
    for name, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
        _weight(writer, f"blk.{layer}.attn_{name}", (rows, WIDTH))
    output = HEADS * HEAD_DIM
    _weight(writer, f"blk.{layer}.attn_output", (WIDTH, output))
    if query_norms:
        _norm(writer, f"blk.{layer}.attn_q_norm", HEAD_DIM)
        _norm(writer, f"blk.{layer}.attn_k_norm", HEAD_DIM)


def _feed_forward(writer: gguf.GGUFWriter, layer: int) -> None:
    _norm(writer, f"blk.{layer}.ffn_norm", WIDTH)
    _weight(writer, f"blk.{layer}.ffn_gate", (FFN, WIDTH))
    _weight(writer, f"blk.{layer}.ffn_up", (FFN, WIDTH))
    _weight(writer, f"blk.{layer}.ffn_down", (WIDTH, FFN))


def _norm(writer: gguf.GGUFWriter, name: str, width: int) -> None:
    writer.add_tensor(f"{name}.weight", (1 + 0.1 * _rng.standard_normal(width)).astype(np.float32))


def _weight(writer: gguf.GGUFWriter, name: str, shape: tuple[int, int], scale: float = 0.15) -> None:
    writer.add_tensor(f"{name}.weight", (scale * _rng.standard_normal(shape)).astype(np.float32))
