"""The facts of a model, in the same words for GGUF files, Transformers folders and ONNX folders."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgepatch.decoding.defaults import SamplingDefaults
from edgepatch.store.records import base_id
from edgepatch.tensors import ModelSpec

MAX_TEXT = 200
TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class TensorType:
    """The tensors of a model that are stored in one type.

    Attributes:
        name: of the type ("Q4_1", "BF16", "int4").
        num_tensors: how many there are.
        num_bytes: they take, all together.
    """

    name: str
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True)
class Origin:
    """Who a model says it is; "" where it does not say.

    Attributes:
        name: what its makers call it.
        author: person or organization.
        license: as told, mostly an SPDX expression.
        base: what it was made of.
        url: where it comes from.
    """

    name: str = ""
    author: str = ""
    license: str = ""
    base: str = ""
    url: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens.

    Attributes:
        size: rows of the embedding matrix, V; ``None`` where the model does not say.
        kind: "gpt2", "llama", "BPE", ...; "" where it does not say.
        pre_tokenizer: llama.cpp's name of the way to split a text first, or the steps of ``tokenizer.json``.
        end_tokens: id -> text of the tokens that end a reply.
    """

    size: int | None
    kind: str = ""
    pre_tokenizer: str = ""
    end_tokens: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    Attributes:
        digest: SHA-256 of the one that is used, as patches name it.
        names: of further templates in the same model.
        mentions_tools: whether it can show tools to the model.
        tools_digest: of the one that is for conversations with tools alone, or "".
    """

    digest: str
    names: tuple[str, ...]
    mentions_tools: bool
    tools_digest: str = ""

    @classmethod
    def of(cls, text: str, others: Mapping[str, str]) -> ChatTemplate | None:
        """Of the template in use and of further ones by name; ``None`` where there is none."""
        if not text and not others:
            return None
        mentions_tools = any(TOOLS.search(template) for template in (text, *others.values()))
        return cls(_digest(text), tuple(others), mentions_tools, _digest(others.get("tool_use", "")))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if text else ""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; ``None`` where it does not say.

    Attributes:
        num_layers: L.
        hidden_size: D.
        num_heads: of the queries.
        num_kv_heads: K.
        head_dim: H.
        feed_forward: width of the inner layer.
        context_length: positions that it was trained for.
        rope_theta: base of the rotary embedding.
        rope_scaling: what departs from plain rotation.
        has_tied_head: whether the embedding matrix is the output matrix as well.
    """

    num_layers: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    feed_forward: int | None = None
    context_length: int | None = None
    rope_theta: float | None = None
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    has_tied_head: bool | None = None


@dataclass(frozen=True)
class CacheFacts:
    """What a position costs in the memory of keys and values.

    Attributes:
        values_per_position: numbers kept for one position, of all layers.
        bytes_per_value: type of the cache -> bytes of a number; the first is the default.
        default_positions: that a runtime makes room for when nobody says.
    """

    values_per_position: int
    bytes_per_value: Mapping[str, float]
    default_positions: int

    def num_bytes(self, kind: str, positions: int) -> int:
        """Of a cache of this type."""
        return round(self.values_per_position * self.bytes_per_value[kind] * positions)


@dataclass(frozen=True)
class ModelFacts:
    """A model.

    Attributes:
        path: file or folder.
        kind: "GGUF file", "Transformers folder" or "ONNX folder".
        runtime: that takes it: "llamacpp", "torch" or "onnx".
        origin: who it says it is.
        architecture: by GGUF's name where that is known.
        num_parameters: of all tensors; ``None`` where they cannot be counted.
        files: name -> bytes on disk, of what belongs to the model.
        quantization: by name.
        tensor_types: the most bytes first.
        shape: its sizes.
        vocabulary: its tokens.
        chat_template: ``None`` for none.
        spec: what patches name it by; ``None`` where there is none.
        no_spec: why there is none.
        cache: memory of keys and values; ``None`` where the layers keep something else.
        weight_bytes: in memory, once loaded.
        sampling: how replies are drawn where nobody says.
        also: what else lies in the same folder, which this runtime leaves alone.
        more: what else the file says, for people who want all of it.
    """

    path: Path
    kind: str
    runtime: str
    origin: Origin
    architecture: str
    num_parameters: int | None
    files: Mapping[str, int]
    quantization: str
    tensor_types: tuple[TensorType, ...]
    shape: Shape
    vocabulary: Vocabulary
    chat_template: ChatTemplate | None
    spec: ModelSpec | None
    no_spec: str
    cache: CacheFacts | None
    weight_bytes: int
    sampling: SamplingDefaults
    also: tuple[str, ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return sum(self.files.values())

    @property
    def base(self) -> str:
        """The name of the base model in the store, or ""."""
        return base_id(self.spec) if self.spec else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = {"path": str(self.path), "num_bytes": self.num_bytes, "base": self.base}
        return {**asdict(self), **told, "sampling": self.sampling.as_dict()}


def tensor_types(tensors: Iterable[tuple[str, int]]) -> tuple[TensorType, ...]:
    """The tensors by their types, the most bytes first.

    Args:
        tensors: type and bytes of each.
    """
    sizes: dict[str, list[int]] = defaultdict(list)
    for kind, num_bytes in tensors:
        sizes[kind].append(num_bytes)
    types = [TensorType(kind, len(each), sum(each)) for kind, each in sizes.items()]
    return tuple(sorted(types, key=lambda kind: (-kind.num_bytes, kind.name)))


def printable(value: object) -> str:
    """A text for people of a value that a file holds: one line of bounded length, of characters that can be printed."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(entry)[:MAX_TEXT] for entry in value[:8])
    whole = str(value)[: 4 * MAX_TEXT].encode("utf-8", "replace").decode("utf-8")  # half a pair has no bytes
    text = " ".join(whole.split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
