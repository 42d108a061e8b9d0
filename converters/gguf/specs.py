"""What model a GGUF file holds, in the same words as ``hf.read_spec`` of the folder that it was made from."""

from __future__ import annotations

import re
from math import isfinite, prod
from pathlib import Path

import numpy as np

from edgepatch.converters import rope_parameters
from edgepatch.converters.gguf.header import GGUFHeader, read_header
from edgepatch.converters.gguf.types import FILE_TYPES, type_name
from edgepatch.errors import InputError
from edgepatch.tensors import ModelSpec, tokenizer_digest, weight_fingerprint

UNUSED = 5
"""Type of a token that only fills the embedding matrix up."""

MIXED_BITS = 1.5
"""So many bits a weight more than their name says do mixtures have: 4.9 Q4_K_M, 3.4 Q2_K."""

GOOD_PART = 0.1
GUESSED = 1024
"""Added to ``general.file_type`` where the converter guessed it."""


def quantization(header: GGUFHeader) -> str:
    """The file's quantization by name ("F32", "Q4_K_M"); where the file does not say, or says another than its weights have, their type.

    The name decides how far a patch's effect may deviate, and nobody signs it; so a name for coarser weights than are there is none.
    """
    number = header.metadata.get("general.file_type")
    name = FILE_TYPES.get(number % GUESSED) if isinstance(number, int) else None
    weights = _weights_by_type(header)
    if name is not None and _bits(weights) <= _named_bits(name) + MIXED_BITS:
        return name
    return type_name(_coarsest(weights) if name is not None else max(weights, key=lambda kind: weights[kind][0]))


def _weights_by_type(header: GGUFHeader) -> dict[int, tuple[int, int]]:
    """Type -> (how many weights have it, their bits); of the layers' matrices, where there are any."""
    counts: dict[int, tuple[int, int]] = {}
    matrices = [i for n, i in header.tensors.items() if n.startswith("blk.") and len(i.shape) > 1]
    for info in matrices or list(header.tensors.values()):
        count, bits = counts.get(info.ggml_type, (0, 0))
        counts[info.ggml_type] = (count + prod(info.shape), bits + 8 * info.num_bytes)
    return counts


def _bits(weights: dict[int, tuple[int, int]]) -> float:
    return sum(bits for _, bits in weights.values()) / max(sum(count for count, _ in weights.values()), 1)


def _named_bits(name: str) -> int:
    """Bits of a weight, as a name says them: "Q4_K_M" 4."""
    digits = re.search(r"[0-9]+", name)
    return int(digits[0]) if digits else 32


def _coarsest(weights: dict[int, tuple[int, int]]) -> int:
    """The type of fewest bits among those that a good part of the weights have."""
    total = sum(count for count, _ in weights.values())
    common = {kind: bits / count for kind, (count, bits) in weights.items() if count >= GOOD_PART * total}
    return min(common, key=lambda kind: common[kind])


def vocabulary(header: GGUFHeader) -> list[str]:
    """Tokens in order of their ids, without those that fill the embedding matrix up.

    Raises:
        InputError: the file holds no tokenizer, or a damaged one.
    """
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    types = header.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(tokens, list) or len(tokens) != len(types):
        raise InputError(f"{header.path} holds no tokenizer", hint="download or convert the model again")
    kinds = types.tolist() if isinstance(types, np.ndarray) else types  # numpy's own numbers are slow to go through
    pairs = enumerate(zip(tokens, kinds, strict=True))
    return [token for i, (token, kind) in pairs if kind != UNUSED or token != f"[PAD{i}]"]


def _num_blocks(header: GGUFHeader) -> int:
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    expected = int(header.setting("block_count"))
    if len(blocks) != expected or blocks != {str(i) for i in range(expected)}:
        raise InputError(f"{header.path}: expected {expected} layers, found {len(blocks)}", "get the model again")
    return expected


def _check_shapes(header: GGUFHeader, spec: ModelSpec, heads: list[int], kv_heads: list[int]) -> None:
    """Refuses settings that contradict the tensors: llama.cpp ends the process on some of them."""
    expected = {"token_embd.weight": [(spec.vocab_size, spec.hidden_size)]}
    one_size = header.find("attention.kv_lora_rank") is None and header.find("attention.key_length_swa") is None
    for layer in range(len(kv_heads) if one_size else 0):
        query = heads[layer] * spec.head_dim
        gated = [(query, spec.hidden_size), (2 * query, spec.hidden_size)]  # Qwen3.5 puts a gate beside every query
        expected[f"blk.{layer}.attn_q.weight"] = gated
        expected[f"blk.{layer}.attn_k.weight"] = [(kv_heads[layer] * spec.head_dim, spec.hidden_size)]
    for name, shapes in expected.items():
        shape = header.tensors[name].shape if name in header.tensors else shapes[0]
        if shape not in shapes:
            raise InputError(f"{header.path}: {name}: expected {shapes[0]}, found {shape}", "get the model again")


def spec_of(header: GGUFHeader) -> ModelSpec:
    """The model in a GGUF file; equal to ``hf.read_spec`` of the folder it was made from, whatever its quantization.

    Raises:
        InputError: a value is missing, damaged, or contradicts the tensors.
    """
    try:
        return _read(header)
    except (
        ValueError,
        TypeError,
        ArithmeticError,
        LookupError,
        AttributeError,
    ) as error:  # values that no check foresaw
        raise InputError(f"{header.path} is damaged: {error}", hint="download or convert the model again") from None


def _check_numbers(header: GGUFHeader) -> None:
    """Refuses numbers that no model has: llama.cpp ends the process on some of them."""
    for key, value in header.metadata.items():
        if isinstance(value, float) and not isfinite(value):
            raise InputError(f"{header.path}: {key}: expected a finite number, found {value}", "get the model again")
        if key.endswith("_epsilon") and key.startswith(header.architecture):
            header.setting(key.removeprefix(f"{header.architecture}."))
    pattern, window = header.find("attention.sliding_window_pattern"), header.find("attention.sliding_window")
    if isinstance(pattern, int) and pattern == 1 and window:
        message = f"{header.path}: attention.sliding_window_pattern: expected 2 layers or more with a window of {window}, found 1"
        raise InputError(message, "get the model again")


def _read(header: GGUFHeader) -> ModelSpec:
    _check_numbers(header)
    hidden_size, blocks = int(header.setting("embedding_length")), _num_blocks(header)
    heads = header.per_layer("attention.head_count", blocks)
    kv_heads = header.per_layer("attention.head_count_kv", blocks, max(heads))
    head_dim = int(header.setting("attention.key_length", hidden_size // max(heads)))
    if head_dim < 1:
        raise InputError(
            f"{header.path}: attention.key_length: expected 1 or more, found {head_dim}", "get the model again"
        )
    layers = blocks - int(header.find("nextn_predict_layers") or 0)
    theta, scaling = rope_parameters.of_header(header, head_dim)
    spec = ModelSpec(
        model_type=header.architecture,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_key_value_heads=max(kv_heads),
        head_dim=head_dim,
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        rope_theta=theta,
        rope_scaling=scaling,
        tokenizer_digest=tokenizer_digest(vocabulary(header)),
        weight_fingerprint=weight_fingerprint({n: header.vector(n) for n in _norms(header, layers)}),
    )
    _check_shapes(header, spec, heads, kv_heads)
    return spec


def _norms(header: GGUFHeader, layers: int) -> list[str]:
    """Norm vectors of the language model; draft heads lie in blocks behind its layers.

    Raises:
        InputError: one is not in float32, the only type that llama.cpp can compute with.
    """
    norms = [n for n, info in header.tensors.items() if n.endswith("norm.weight") and len(info.shape) == 1]
    rounded = next((n for n in norms if header.tensors[n].ggml_type != 0), None)
    if rounded:
        actual = header.tensors[rounded].ggml_type
        raise InputError(f"{header.path}: {rounded}: expected float32, found type {actual}", "get the model again")
    return [n for n in norms if not n.startswith("blk.") or int(n.split(".")[1]) < layers]


def read_spec(path: Path) -> ModelSpec:
    """The model in a GGUF file; equal to ``hf.read_spec`` of the folder it was made from, whatever its quantization.

    Raises:
        InputError: the file is missing, truncated, damaged, or no GGUF model.
        MissingExtraError: the gguf package is not installed.
    """
    return spec_of(read_header(path))
