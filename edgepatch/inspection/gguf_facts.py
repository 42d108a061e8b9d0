"""The facts of a GGUF model, from its header; of the weights only the norm vectors are read, for the fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.converters.gguf import specs
from edgepatch.converters.gguf.header import BLOCK_SIZES, GGUFHeader, read_header
from edgepatch.converters.gguf.types import type_name
from edgepatch.decoding import defaults
from edgepatch.errors import InputError
from edgepatch.inspection.facts import (
    CacheFacts,
    ChatTemplate,
    ModelFacts,
    Origin,
    Shape,
    Vocabulary,
    printable,
    tensor_types,
)
from edgepatch.runtimes.llamacpp.context import KV_TYPES
from edgepatch.runtimes.llamacpp.runtime import DEFAULT_CONTEXT
from edgepatch.tensors import ModelSpec

ENDS = ("eos", "eot", "eom")
"""``tokenizer.ggml.*_token_id`` of what ends a reply."""

TEMPLATE = "tokenizer.chat_template"
SHOWN_ENTRIES = 4


def read_gguf(path: Path) -> ModelFacts:
    """The facts of a GGUF model.

    Raises:
        InputError: the file is missing, truncated, damaged, contradicts itself, or holds no language model.
    """
    header = read_header(path)
    spec, no_spec = _spec(header)
    shape = _shape(header, spec)
    return ModelFacts(
        path=path,
        kind="GGUF file",
        runtime="llamacpp",
        origin=origin_of(header.metadata),
        architecture=printable(header.architecture),
        num_parameters=sum(prod(info.shape) for info in header.tensors.values()),
        files={path.name: path.stat().st_size},
        quantization=specs.quantization(header),
        tensor_types=tensor_types((type_name(info.ggml_type), info.num_bytes) for info in header.tensors.values()),
        shape=shape,
        vocabulary=_vocabulary(header),
        chat_template=_template(header.metadata),
        spec=spec,
        no_spec=no_spec,
        cache=_cache(header, shape) if spec else None,
        weight_bytes=sum(info.num_bytes for info in header.tensors.values()),
        sampling=defaults.of_gguf(header.metadata),
        more={key: _entry(value) for key, value in header.metadata.items()},
    )


def _spec(header: GGUFHeader) -> tuple[ModelSpec | None, str]:
    """(spec, why there is none): a model without attention has none, which is no damage."""
    if header.find("attention.head_count") is None:
        return None, f"a {header.architecture} keeps no keys and values, so no patch fits it"
    return specs.spec_of(header), ""


def origin_of(metadata: Mapping[str, Any]) -> Origin:
    """Who a GGUF file says it is."""

    def first(*keys: str) -> str:
        return next((printable(metadata[f"general.{key}"]) for key in keys if metadata.get(f"general.{key}")), "")

    return Origin(
        name=first("name", "basename"),
        author=first("author", "organization"),
        license=first("license", "license.name"),
        base=first("base_model.0.name"),
        url=first("url", "repo_url", "source.url", "source.huggingface.repository"),
    )


def _number(header: GGUFHeader, name: str) -> int | None:
    value = header.find(name)
    if isinstance(value, np.ndarray):
        return int(value.max()) if value.size and value.dtype.kind in "iu" else None
    return value if type(value) is int else None


def _shape(header: GGUFHeader, spec: ModelSpec | None) -> Shape:
    head_dim = spec.head_dim if spec else _number(header, "attention.key_length")
    return Shape(
        num_layers=spec.num_hidden_layers if spec else _number(header, "block_count"),
        hidden_size=_number(header, "embedding_length"),
        num_heads=_number(header, "attention.head_count"),
        num_kv_heads=spec.num_key_value_heads if spec else None,
        head_dim=head_dim,
        feed_forward=_number(header, "feed_forward_length"),
        context_length=_number(header, "context_length"),
        rope_theta=spec.rope_theta if spec else None,
        rope_scaling=spec.rope_scaling if spec else {},
        has_tied_head="output.weight" not in header.tensors,
    )


def _vocabulary(header: GGUFHeader) -> Vocabulary:
    metadata = header.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    ends = {}
    for name in ENDS:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(token) is int and isinstance(tokens, list) and 0 <= token < len(tokens):
            ends[token] = printable(tokens[token])
    return Vocabulary(
        size=header.tensors["token_embd.weight"].shape[0],
        kind=printable(metadata.get("tokenizer.ggml.model", "")),
        pre_tokenizer=printable(metadata.get("tokenizer.ggml.pre", "")),
        end_tokens=ends,
    )


def _template(metadata: Mapping[str, Any]) -> ChatTemplate | None:
    others = {
        printable(key.removeprefix(f"{TEMPLATE}.")): str(value)
        for key, value in metadata.items()
        if key.startswith(f"{TEMPLATE}.")
    }
    return ChatTemplate.of(str(metadata.get(TEMPLATE, "")), others)


def _cache(header: GGUFHeader, shape: Shape) -> CacheFacts | None:
    """Of all layers that keep keys and values; those with a sliding window keep less than is counted here."""
    if header.find("attention.kv_lora_rank") is not None or not shape.num_layers:
        return None  # DeepSeek's latent attention keeps neither keys nor values
    try:
        heads = header.per_layer("attention.head_count_kv", shape.num_layers, shape.num_heads)
        width = int(header.setting("attention.value_length", shape.head_dim)) + (shape.head_dim or 0)
        positions = min(int(header.setting("context_length")), DEFAULT_CONTEXT)
    except InputError:
        return None
    order = sorted(KV_TYPES, key=lambda kind: kind != "f16")
    types = {kind: BLOCK_SIZES[KV_TYPES[kind]][1] / BLOCK_SIZES[KV_TYPES[kind]][0] for kind in order}
    return CacheFacts(sum(heads) * width, types, positions)


def _entry(value: Any) -> str:
    """A value of the metadata for people: lists are shortened to their beginning."""
    if isinstance(value, (list, np.ndarray)):
        listed = ", ".join(printable(entry) for entry in value[:SHOWN_ENTRIES])
        return f"{len(value)} entries: {listed}, ..." if len(value) > SHOWN_ENTRIES else listed
    return printable(value)
