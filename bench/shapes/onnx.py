"""The models of ``shapes`` as ONNX folders: the graph that onnxruntime-genai's builder makes of a Llama, with random weights.

``MatMulNBits`` in blocks of 32 with the builder's choice of bits by layer, ``GroupQueryAttention`` on a shared buffer. Weights are
streamed to the file beside the graph, so that none is ever whole in memory. ``OnnxRuntime`` and onnxruntime-genai both load it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.shapes.shape import CHAT_TEMPLATE, EPSILON, MERGE, SPECIAL, Shape, weight_deviation
from edgepatch.converters.onnx.identity import identity
from edgepatch.errors import InputError

KINDS = ("int8", "int4")
BLOCK = 32
DEVIATIONS = {4: 4.61, 8: 73.9}
"""Bits -> standard deviation of uniform whole numbers of so many."""

CHUNK_BYTES = 1 << 22
DOMAIN = "com.microsoft"
OPSETS = (("", 22), (DOMAIN, 1))
IR_VERSION = 10
FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7


def write_onnx(folder: Path, shape: Shape, kind: str = "int4", rng_seed: int = 0) -> None:
    """Writes a random llama-like model.

    Args:
        folder: becomes the model's; an unfinished one has another name.
        shape: one of ``SHAPES``, or another.
        kind: "int8": every matrix symmetric, embeddings in float32. "int4": k-quant's form with zero points, sensitive layers and
            logits in 8 bits, embeddings read from the matrix of the logits.
        rng_seed: of the weights.

    Raises:
        InputError: the kind is another.
    """
    if kind not in KINDS:
        raise InputError(f"type: expected one of {', '.join(KINDS)}, found {kind}")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    with (unfinished / "model.onnx.data").open("wb") as data:
        graph = _Graph(shape, kind, rng_seed, data)
        model = graph.model()
    (unfinished / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    _write_settings(unfinished, shape)
    _write_tokenizer(unfinished, shape)
    unfinished.rename(folder)


class _Graph:
    """A graph on its way, its weights written as they are named."""

    def __init__(self, shape: Shape, kind: str, rng_seed: int, data: Any) -> None:
        from onnx import helper

        self._helper, self._shape, self._kind, self._data = helper, shape, kind, data
        self._rng, self._norms = np.random.default_rng(rng_seed), shape.norms(rng_seed)
        self._seed = rng_seed
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def model(self) -> Any:
        """The whole model; its weights are in the file by then."""
        helper, shape = self._helper, self._shape
        self._lengths()
        hidden = self._embeddings() if self._kind == "int8" or not shape.is_tied else ""
        bits = 8
        head = self._matrix("lm_head.MatMul", shape.vocab_size, shape.hidden_size, bits)
        hidden = hidden or self._shared_embeddings(head)
        hidden = self._layers(hidden)
        self._node(
            "MatMulNBits",
            [hidden, *head],
            ["logits"],
            DOMAIN,
            **_matmul(shape.vocab_size, shape.hidden_size, bits),
        )
        graph = helper.make_graph(self._nodes, "main_graph", self._inputs(), self._outputs(), self._weights)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        helper.set_model_props(model, identity(shape.spec(self._seed), self._kind))
        return model

    # Parts of the graph.

    def _lengths(self) -> None:
        """What attention must know of the mask: its longest row, and the last position of each."""
        self._constant("one", [1])
        self._weights.append(self._helper.make_tensor("axis", INT64, [], [1]))
        self._node("Shape", ["attention_mask"], ["mask_shape"])
        self._node("Gather", ["mask_shape", "axis"], ["total_long"], axis=0)
        self._node("Cast", ["total_long"], ["total"], to=INT32)
        self._node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=0)
        self._node("Sub", ["lengths", "one"], ["last_long"])
        self._node("Cast", ["last_long"], ["last"], to=INT32)
        positions = np.arange(self._shape.context_length)[:, None]
        frequencies = self._shape.rope_theta ** (-np.arange(0, self._shape.head_dim, 2) / self._shape.head_dim)
        angles = positions * frequencies[None]  # (M, H / 2)
        self._array("cos_cache", np.cos(angles).astype(np.float32))
        self._array("sin_cache", np.sin(angles).astype(np.float32))

    def _embeddings(self) -> str:
        shape, name = self._shape, "model.embed_tokens.weight"
        rows = max(1, CHUNK_BYTES // (4 * shape.hidden_size))
        deviation = weight_deviation(shape.hidden_size)

        def parts() -> Iterator[NDArray[Any]]:
            for start in range(0, shape.vocab_size, rows):
                count = min(rows, shape.vocab_size - start)
                yield (deviation * self._rng.standard_normal((count, shape.hidden_size), dtype=np.float32)).astype(
                    np.float32
                )

        self._stream(name, (shape.vocab_size, shape.hidden_size), FLOAT, parts())
        self._node("Gather", [name, "input_ids"], ["embedded"])
        return "embedded"

    def _shared_embeddings(self, head: Sequence[str]) -> str:
        self._constant("embedding_shape", [self._shape.vocab_size, self._shape.hidden_size])
        self._node("Reshape", [head[0], "embedding_shape"], ["embedding_rows"])
        options: dict[str, Any] = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        self._node("GatherBlockQuantized", ["embedding_rows", "input_ids", *head[1:]], ["embedded"], DOMAIN, **options)
        return "embedded"

    def _layers(self, hidden: str) -> str:
        """The normalized output of the last layer."""
        normed, residual = f"{_layer_name(0)}.input_layernorm", hidden
        self._array(f"{normed}.weight", self._norms["blk.0.attn_norm.weight"])
        options: dict[str, Any] = {"epsilon": EPSILON, "axis": -1, "stash_type": 1}
        self._node("SimplifiedLayerNormalization", [hidden, f"{normed}.weight"], [normed], **options)
        for layer in range(self._shape.num_layers):
            attended = self._attention(layer, normed)
            normed, residual = self._add_norm(
                layer, "post_attention_layernorm", f"blk.{layer}.ffn_norm.weight", residual, attended
            )
            fed = self._feed_forward(layer, normed)
            is_last = layer == self._shape.num_layers - 1
            gguf_name = "output_norm.weight" if is_last else f"blk.{layer + 1}.attn_norm.weight"
            kind = "final_norm_layernorm" if is_last else "input_layernorm"
            normed, residual = self._add_norm(layer + 1, kind, gguf_name, residual, fed)
        return normed

    def _add_norm(self, layer: int, kind: str, gguf_name: str, residual: str, added: str) -> tuple[str, str]:
        name = f"{_layer_name(layer)}.{kind}"
        self._array(f"{name}.weight", self._norms[gguf_name])
        outputs = [name] if kind.startswith("final") else [name, "", "", f"{name}.sum"]
        self._node(
            "SkipSimplifiedLayerNormalization", [residual, added, f"{name}.weight"], outputs, DOMAIN, epsilon=EPSILON
        )
        return name, f"{name}.sum"

    def _attention(self, layer: int, hidden: str) -> str:
        shape, name = self._shape, f"{_layer_name(layer)}.attn"
        rows = (shape.num_heads + 2 * shape.num_key_value_heads) * shape.head_dim
        packed = self._linear(
            f"{name}.qkv_proj.MatMul", hidden, rows, shape.hidden_size, self._bits(layer, is_sensitive=True)
        )
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        options = {
            "num_heads": shape.num_heads,
            "kv_num_heads": shape.num_key_value_heads,
            "scale": shape.head_dim**-0.5,
            "local_window_size": -1,
            "softcap": 0.0,
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        inputs = [packed, "", "", *past, "last", "total", "cos_cache", "sin_cache", "", "", ""]
        self._node("GroupQueryAttention", inputs, [f"{name}.out", *present], DOMAIN, **options)
        return self._linear(
            f"{name}.o_proj.MatMul",
            f"{name}.out",
            shape.hidden_size,
            shape.num_heads * shape.head_dim,
            self._bits(layer),
        )

    def _feed_forward(self, layer: int, hidden: str) -> str:
        shape, name = self._shape, f"{_layer_name(layer)}.mlp"
        gate, up = (
            self._linear(f"{name}.{kind}_proj.MatMul", hidden, shape.feed_forward, shape.hidden_size, self._bits(layer))
            for kind in ("gate", "up")
        )
        self._node("Sigmoid", [gate], [f"{name}.sigmoid"])
        self._node("Mul", [gate, f"{name}.sigmoid"], [f"{name}.silu"])
        self._node("Mul", [f"{name}.silu", up], [f"{name}.product"])
        bits = self._bits(layer, is_sensitive=True)
        return self._linear(f"{name}.down_proj.MatMul", f"{name}.product", shape.hidden_size, shape.feed_forward, bits)

    def _bits(self, layer: int, is_sensitive: bool = False) -> int:
        """Source: ``mixed_layers`` of the builder's ``builders/base.py``."""
        layers = self._shape.num_layers
        is_fine = layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2
        return 8 if self._kind == "int8" or (is_sensitive and is_fine) else 4

    def _linear(self, name: str, hidden: str, rows: int, columns: int, bits: int) -> str:
        weights = self._matrix(name, rows, columns, bits)
        self._node("MatMulNBits", [hidden, *weights], [f"{name}.out"], DOMAIN, **_matmul(rows, columns, bits))
        return f"{name}.out"

    def _node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **options: Any
    ) -> None:
        self._nodes.append(
            self._helper.make_node(operator, inputs, outputs, f"/node{len(self._nodes)}", domain=domain, **options)
        )

    # Weights.

    def _matrix(self, name: str, rows: int, columns: int, bits: int) -> list[str]:
        """The names of a quantized matrix's parts."""
        if columns % BLOCK:
            raise InputError(f"{name}: rows of {columns} are no multiple of {BLOCK}")
        blocks, size = columns // BLOCK, BLOCK * bits // 8
        weight = f"{name}.weight_Q{bits}G{BLOCK}"
        self._stream(weight, (rows, blocks, size), UINT8, self._bytes(rows * blocks * size))
        step = weight_deviation(columns) / DEVIATIONS[bits]
        self._array(f"{name}.weight_scale", np.full((rows, blocks), step, np.float32))
        if self._kind == "int8":
            return [weight, f"{name}.weight_scale"]
        middle, width = (128, blocks) if bits == 8 else (0x88, (blocks + 1) // 2)
        self._array(f"{name}.weight_zp", np.full((rows, width), middle, np.uint8))
        return [weight, f"{name}.weight_scale", f"{name}.weight_zp"]

    def _bytes(self, count: int) -> Iterator[NDArray[Any]]:
        for start in range(0, count, CHUNK_BYTES):
            yield self._rng.integers(0, 256, min(CHUNK_BYTES, count - start), dtype=np.uint8)

    def _array(self, name: str, array: NDArray[Any]) -> None:
        self._stream(name, array.shape, FLOAT if array.dtype == np.float32 else UINT8, iter([array]))

    def _stream(self, name: str, shape: Sequence[int], kind: int, parts: Iterator[NDArray[Any]]) -> None:
        """Appends a tensor's parts to the file of weights, and names them in the graph."""
        offset = self._data.tell()
        for part in parts:
            self._data.write(np.ascontiguousarray(part).tobytes())
        length = self._data.tell() - offset
        assert length == prod(shape) * (4 if kind == FLOAT else 1)
        from onnx import TensorProto

        tensor = TensorProto(name=name, dims=shape, data_type=kind, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._weights.append(tensor)

    def _constant(self, name: str, values: list[int]) -> None:
        self._weights.append(self._helper.make_tensor(name, INT64, [len(values)], values))

    # Inputs and outputs.

    def _inputs(self) -> list[Any]:
        make = self._helper.make_tensor_value_info
        texts = [
            make("input_ids", INT64, ["batch_size", "sequence_length"]),
            make("attention_mask", INT64, ["batch_size", "total_sequence_length"]),
        ]
        return texts + self._caches("past_key_values", "past_sequence_length")

    def _outputs(self) -> list[Any]:
        logits: list[Any] = ["batch_size", "sequence_length", self._shape.vocab_size]
        return [
            self._helper.make_tensor_value_info("logits", FLOAT, logits),
            *self._caches("present", "total_sequence_length"),
        ]

    def _caches(self, name: str, length: str) -> list[Any]:
        make: Callable[..., Any] = self._helper.make_tensor_value_info
        shape = ["batch_size", self._shape.num_key_value_heads, length, "kv_cache_dim"]
        return [
            make(f"{name}.{i}.{kind}", FLOAT, shape) for i in range(self._shape.num_layers) for kind in ("key", "value")
        ]


def _matmul(rows: int, columns: int, bits: int) -> dict[str, int]:
    """Attributes of a product with a quantized matrix."""
    return {"K": columns, "N": rows, "accuracy_level": 4, "bits": bits, "block_size": BLOCK}


def _layer_name(layer: int) -> str:
    return f"model.layers.{layer}"


# The files beside the graph.


def _write_settings(folder: Path, shape: Shape) -> None:
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_key_value_heads,
    }
    ids = {
        "bos_token_id": shape.vocab_size - 3,
        "eos_token_id": [shape.vocab_size - 2],
        "pad_token_id": shape.vocab_size - 2,
    }
    model = {
        **ids,
        "context_length": shape.context_length,
        "decoder": decoder,
        "type": "llama",
        "vocab_size": shape.vocab_size,
    }
    search = {"do_sample": False, "max_length": shape.context_length, "past_present_share_buffer": True, "num_beams": 1}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": search}, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["eos_token_id"]}) + "\n")


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(shape.vocabulary())}, [MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    begin = (SPECIAL[0], shape.vocab_size - 3)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
