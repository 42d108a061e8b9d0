"""What llama.cpp computes here with weights of each type: a tiny model of random blocks, against numpy.

The blocks are random bits with a fixed step, so no quantizer takes part: ``gguf`` says what they mean, numpy computes what the model
must answer, and llama.cpp's kernels are held against that.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.gguf.blocks import BLOCK_TYPES, PLAIN, random_blocks
from edgepatch.converters.gguf.library import library_errors, load_library
from edgepatch.errors import EdgepatchError

BOUND = 0.1
"""Largest sound deviation. Kernels for quantized weights round activations to 8 bits, which costs up to 0.02."""

WIDTH, HEADS, VOCAB = (
    256,
    4,
    256,
)  # multiples of 256: no type falls back to another one, and no kernel for tiles stands aside
PROMPT = 64
DEVIATION = 0.05  # of the weights
ROPE_THETA, EPSILON = 10000.0, 1e-6
MATRICES = (
    "token_embd",
    *(f"blk.0.{n}" for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
)
NORMS = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")


def facts() -> dict[str, Any]:
    """What the library says of itself."""
    lib = load_library()
    return {
        "system_info": lib.llama_print_system_info().decode().strip(" |"),
        "gpu_offload": bool(lib.llama_supports_gpu_offload()),
        "session_version": lib.LLAMA_SESSION_VERSION,
        "state_version": lib.LLAMA_STATE_SEQ_VERSION,
    }


def types() -> list[str]:
    """Weight types in the order of their numbers: those that the installed gguf package knows too."""
    import gguf

    return [kind.name for kind in gguf.GGMLQuantizationType if kind.name in (*PLAIN, *BLOCK_TYPES)]


def deviation(type_name: str, extra_buffers: bool) -> float:
    """How far the logits behind a prompt of 64 tokens and behind one more token are from the right ones.

    Args:
        type_name: one of ``types()``.
        extra_buffers: whether llama.cpp may arrange the weights anew, for kernels that need that.

    Returns:
        The larger root mean square of the error, over that of the right logits; infinite where one is not finite.

    Raises:
        EdgepatchError: llama.cpp does not load the model or does not evaluate it.
    """
    rng = np.random.default_rng(0)
    blocks = {name: _matrix(type_name, rng) for name in MATRICES}
    norms = {name: (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32) for name in NORMS}
    tokens = [int(token) for token in rng.integers(0, VOCAB, PROMPT + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{type_name}.gguf")
        _write(path, type_name, blocks, norms)
        computed = _evaluate(path, tokens, extra_buffers)
    expected = _expected({name: _dequantized(type_name, block) for name, block in blocks.items()} | norms, tokens)
    if not np.isfinite(computed).all():
        return float("inf")
    return float((np.linalg.norm(computed - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


# The model.


def _matrix(type_name: str, rng: np.random.Generator) -> NDArray[Any]:
    """A random matrix (256, 256) of a type, as bytes (256, bytes of a row) where the type is none of numpy's."""
    import gguf

    values = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]
    return random_blocks(rng, WIDTH * WIDTH // values, type_name, DEVIATION).reshape(WIDTH, -1)


def _dequantized(type_name: str, blocks: NDArray[Any]) -> NDArray[np.float64]:
    import gguf

    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[type_name]).astype(np.float64)


def _write(path: Path, type_name: str, blocks: dict[str, NDArray[Any]], norms: dict[str, NDArray[np.float32]]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2 * PROMPT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for name, values in norms.items():
        writer.add_tensor(f"{name}.weight", values)
    for name, matrix in blocks.items():
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# What llama.cpp makes of it.


def _evaluate(path: Path, tokens: list[int], extra_buffers: bool) -> NDArray[np.float64]:
    """Logits (2, V) behind the prompt and behind the token after it."""
    with opened_context(path, extra_buffers, 2 * PROMPT, 1) as (lib, context):
        rows = []
        for piece in (tokens[:PROMPT], tokens[PROMPT:]):
            ids = (lib.llama_token * len(piece))(*piece)
            if lib.llama_decode(context, lib.llama_batch_get_one(ids, len(piece))):
                raise EdgepatchError(f"llama.cpp does not evaluate it: {library_errors()}")
            rows.append(np.ctypeslib.as_array(lib.llama_get_logits(context), (VOCAB,)).astype(np.float64))
        return np.stack(rows)


@contextmanager
def opened_context(
    path: Path, extra_buffers: bool, length: int, num_threads: int
) -> Iterator[tuple[Any, ctypes.c_void_p]]:
    """A model on the CPU with a context of one sequence: (library, handle).

    Args:
        path: GGUF file.
        extra_buffers: whether llama.cpp may arrange the weights anew, for kernels that need that.
        length: positions, and most tokens of a batch.
        num_threads: of an evaluation.

    Raises:
        EdgepatchError: llama.cpp does not take it.
    """
    lib = load_library()
    with ExitStack() as resources:
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers, settings.use_extra_bufts = 0, extra_buffers
        model = lib.llama_model_load_from_file(bytes(path), settings)
        if not model:
            raise EdgepatchError(f"llama.cpp does not load it: {library_errors()}")
        resources.callback(lib.llama_model_free, model)
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.n_threads = options.n_threads_batch = num_threads
        context = lib.llama_init_from_model(model, options)
        if not context:
            raise EdgepatchError(f"llama.cpp makes no context for it: {library_errors()}")
        resources.callback(lib.llama_free, context)
        yield lib, context


# What it must answer.


def _expected(weights: dict[str, NDArray[Any]], tokens: list[int]) -> NDArray[np.float64]:
    """Logits (2, V) of the model in numpy, of the last two tokens."""
    hidden = weights["token_embd"][tokens]
    normed = _normed(hidden, weights["blk.0.attn_norm"])
    query, key, value = (_heads(normed @ weights[f"blk.0.attn_{name}"].T) for name in "qkv")
    scores = _rotated(query) @ _rotated(key).transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
    scores[:, ~np.tri(len(tokens), dtype=bool)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    attended = (shares / shares.sum(-1, keepdims=True)) @ value
    hidden = hidden + attended.transpose(1, 0, 2).reshape(len(tokens), WIDTH) @ weights["blk.0.attn_output"].T
    normed = _normed(hidden, weights["blk.0.ffn_norm"])
    gate = normed @ weights["blk.0.ffn_gate"].T
    raised = gate / (1 + np.exp(-gate)) * (normed @ weights["blk.0.ffn_up"].T)
    hidden = hidden + raised @ weights["blk.0.ffn_down"].T
    logits: NDArray[np.float64] = _normed(hidden[-2:], weights["output_norm"]) @ weights["token_embd"].T
    return logits


def _normed(hidden: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    normed: NDArray[Any] = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + EPSILON) * weight
    return normed


def _heads(rows: NDArray[Any]) -> NDArray[Any]:
    """(T, H) -> (heads, T, H / heads)."""
    heads: NDArray[Any] = rows.reshape(len(rows), HEADS, WIDTH // HEADS).transpose(1, 0, 2)
    return heads


def _rotated(heads: NDArray[Any]) -> NDArray[Any]:
    """Rotary positions on neighbouring pairs, as llama.cpp keeps the Llama family."""
    angles = np.arange(heads.shape[1])[:, None] * ROPE_THETA ** (-np.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
    turned = (heads[..., ::2] + 1j * heads[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(heads.shape)
