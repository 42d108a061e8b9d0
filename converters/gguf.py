"""GGUF base models: Transformers folders to GGUF, quantization through llama.cpp, and what model a GGUF file holds.

Files are read by a small strict parser of their own header: llama.cpp ends the process on some damaged files, and the gguf
package's reader can run out of memory on a damaged length.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import struct
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import hf, rope
from edgepatch.errors import EdgepatchError, InputError, MissingExtraError
from edgepatch.tensors import ModelSpec, tokenizer_digest, weight_fingerprint
from edgepatch.tokenizers import FolderTokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` in Transformers -> ``general.architecture`` in GGUF."""

MODEL_TYPE_KEY = "edgepatch.model_type"
"""Tells a Mistral from a Llama, which GGUF does not; llama.cpp copies unknown keys when it quantizes."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of GGUF

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
    ("byte level", False): "gpt-2",
}
"""(split pattern, ``ignore_merges``) -> llama.cpp's name of the same pre-tokenizer."""


# Reading.


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a GGUF file.

    Attributes:
        shape: dimensions in numpy's order.
        ggml_type: number of its type.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensor table of a GGUF file.

    Attributes:
        path: the file.
        metadata: key -> string, number, list of strings, or numpy array of numbers.
        tensors: name -> where it lies; all lie within the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata["general.architecture"])

    def setting(self, name: str, default: float | None = None) -> float:
        """The architecture's own number ``name`` ("block_count"), which must be positive.

        Raises:
            InputError: the file has no such number and there is no default, or it differs between layers.
        """
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise InputError(f"{self.path}: {key}: expected a positive number, found {value}", hint="get the model again")
        return value

    def vector(self, name: str) -> NDArray[np.float32]:
        """A one-dimensional float tensor, as float32.

        Raises:
            InputError: the tensor is quantized.
        """
        info = self.tensors[name]
        if info.ggml_type not in (0, 1):
            raise InputError(f"{self.path}: {name}: expected F32 or F16, found type {info.ggml_type}")
        dtype = np.dtype("<f4" if info.ggml_type == 0 else "<f2")
        return np.fromfile(self.path, dtype, prod(info.shape), offset=info.offset).astype(np.float32)


class _Cursor:
    """Reads a GGUF header value by value; every read is checked against the end of the file."""

    SCALARS = "BbHhIif?sAQqd"  # by GGUF value type; "s" string, "A" array

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} bytes expected at {self.position}, the file ends at {len(self.data)}")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        code = self._code()
        if code != "A":
            return self.string() if code == "s" else self.number(code)
        code, count = self._code(), self.number("Q")
        if code == "s":
            return [self.string() for _ in range(count)]
        if code == "A":
            raise ValueError("an array of arrays")
        dtype = np.dtype("<" + code)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _code(self) -> str:
        kind = self.number("I")
        if kind >= len(self.SCALARS):
            raise ValueError(f"unknown value type {kind}")
        return self.SCALARS[kind]


def _block_sizes() -> dict[int, tuple[int, int]]:
    """ggml type -> (values per block, bytes per block)."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _read_tensors(cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.number("I")
        if name in tensors or not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r} appears twice or has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        tensors[name] = TensorInfo(shape, cursor.number("I"), cursor.number("Q"))
    return tensors


def _place_tensors(cursor: _Cursor, tensors: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """Turns offsets within the data into offsets in the file, and checks that every tensor lies inside."""
    if alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment}")
    start = -(-cursor.position // alignment) * alignment
    sizes = _block_sizes()
    placed = {}
    for name, info in tensors.items():
        values, size = sizes.get(info.ggml_type, (1, 0))  # a type newer than the gguf package: only its start is checked
        end = start + info.offset + prod(info.shape) // values * size
        if info.shape[-1] % values or info.offset % alignment or min(info.shape) < 1 or end > len(cursor.data):
            raise ValueError(f"tensor {name} of shape {info.shape} does not lie in the file")
        placed[name] = TensorInfo(info.shape, info.ggml_type, start + info.offset)
    return placed


def _parse_header(path: Path, data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(data)
    magic, version = cursor.take(4), cursor.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"not a little-endian GGUF file of version 2 or 3: it starts with {magic!r}, version {version}")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the key {key} appears twice")
        metadata[key] = cursor.value()
    tensors = _read_tensors(cursor, num_tensors)
    if not isinstance(metadata.get("general.architecture"), str) or "token_embd.weight" not in tensors:
        raise ValueError("it holds no language model")
    if metadata.get("split.count", 0) > 1:
        raise ValueError("it is one part of a split model; merge the parts first")
    return GGUFHeader(path, metadata, _place_tensors(cursor, tensors, metadata.get("general.alignment", 32)))


def read_header(path: Path) -> GGUFHeader:
    """Metadata and tensor table of a GGUF file, every length checked against the file's.

    Raises:
        InputError: the file is missing, truncated, damaged, or no GGUF model.
        MissingExtraError: the gguf package is not installed.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse_header(path, data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="name a GGUF file") from error
    except (ValueError, TypeError) as error:
        hint = "download or convert the model again"
        raise InputError(f"{path} is damaged, truncated or no GGUF model: {error}", hint) from None


def quantization_types() -> dict[str, int]:
    """Name ("F32", "F16", "Q4_K_M") -> llama.cpp's number, for every type that the installed llama.cpp offers.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    llama_cpp = load_library()
    pattern = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
    matches = [m for m in map(pattern.fullmatch, dir(llama_cpp)) if m]
    return {m[1]: int(getattr(llama_cpp, m[0])) for m in matches}


def quantization(header: GGUFHeader) -> str:
    """The file's quantization by name ("F32", "Q4_K_M").

    Raises:
        InputError: the file does not say, or names a type that the installed llama.cpp does not know.
    """
    number = header.metadata.get("general.file_type")
    name = next((n for n, value in quantization_types().items() if value == number), None)
    if name is None:
        raise InputError(f"{header.path}: general.file_type: expected a type that llama.cpp knows, found {number!r}")
    return name


def _vocabulary(header: GGUFHeader) -> list[str]:
    """Tokens in order of their ids, without those that fill the embedding matrix up."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    types = header.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(tokens, list) or len(tokens) != len(types):
        raise InputError(f"{header.path} holds no tokenizer", hint="download or convert the model again")
    pairs = enumerate(zip(tokens, types, strict=True))
    return [token for i, (token, kind) in pairs if kind != UNUSED or token != f"[PAD{i}]"]


def _rope_parameters(header: GGUFHeader, head_dim: int) -> tuple[float, dict[str, Any]]:
    theta = float(str(np.float32(header.setting("rope.freq_base", 10000.0))))  # the shortest decimal, as in config.json
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        return theta, rope.llama3_scaling(theta, head_dim, header.vector("rope_freqs.weight"))
    if kind == "none":
        return theta, {}
    if kind != "linear":
        raise InputError(f"{header.path}: rope scaling: expected none, linear or Llama 3.1's, found {kind}")
    return theta, {"rope_type": "linear", "factor": float(header.setting("rope.scaling.factor"))}


def _check_shapes(header: GGUFHeader, spec: ModelSpec, num_heads: int) -> None:
    """Refuses settings that contradict the tensors: llama.cpp ends the process on some of them."""
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if len(blocks) != spec.num_hidden_layers:
        raise InputError(f"{header.path}: expected {spec.num_hidden_layers} layers, found {len(blocks)}", "get the model again")
    expected = {
        "token_embd.weight": (spec.vocab_size, spec.hidden_size),
        "blk.0.attn_q.weight": (num_heads * spec.head_dim, spec.hidden_size),
        "blk.0.attn_k.weight": (spec.num_key_value_heads * spec.head_dim, spec.hidden_size),
    }
    for name, shape in expected.items():
        if name in header.tensors and header.tensors[name].shape != shape:
            found = header.tensors[name].shape
            raise InputError(f"{header.path}: {name}: expected {shape}, found {found}", "get the model again")


def spec_of(header: GGUFHeader) -> ModelSpec:
    """The model in a GGUF file; equal to ``hf.read_spec`` of the folder it was made from, whatever its quantization.

    Raises:
        InputError: a value is missing or of a kind that cannot be compared.
    """
    hidden_size, heads = int(header.setting("embedding_length")), int(header.setting("attention.head_count"))
    head_dim = int(header.setting("attention.key_length", hidden_size // heads))
    theta, scaling = _rope_parameters(header, head_dim)
    norms = [name for name in header.tensors if name.endswith("norm.weight")]
    spec = ModelSpec(
        model_type=str(header.metadata.get(MODEL_TYPE_KEY, header.architecture)),
        hidden_size=hidden_size,
        num_hidden_layers=int(header.setting("block_count")),
        num_key_value_heads=int(header.setting("attention.head_count_kv", heads)),
        head_dim=head_dim,
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        rope_theta=theta,
        rope_scaling=scaling,
        tokenizer_digest=tokenizer_digest(_vocabulary(header)),
        weight_fingerprint=weight_fingerprint({name: header.vector(name) for name in norms}),
    )
    _check_shapes(header, spec, heads)
    return spec


def read_spec(path: Path) -> ModelSpec:
    """The model in a GGUF file; equal to ``hf.read_spec`` of the folder it was made from, whatever its quantization.

    Raises:
        InputError: the file is missing, truncated, damaged, or no GGUF model.
        MissingExtraError: the gguf package is not installed.
    """
    return spec_of(read_header(path))


# Writing.


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target`` that takes its place when the block succeeds, and is removed otherwise."""
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {target}: {reason}", hint="free space or name another folder") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _refuse(folder: Path, what: str) -> InputError:
    return InputError(f"{folder}: {what}", hint="convert it with llama.cpp's convert_hf_to_gguf.py and use that file")


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuses what the conversion below would get wrong without a word."""
    if config.get("model_type") not in ARCHITECTURES:
        raise _refuse(folder, f"model_type: expected one of {sorted(ARCHITECTURES)}, found {config.get('model_type')!r}")
    if config.get("hidden_act", "silu") != "silu":
        raise _refuse(folder, f"hidden_act: expected silu, found {config['hidden_act']}")
    sliding = "sliding_attention" in (config.get("layer_types") or [])
    if sliding or (config["model_type"] == "mistral" and config.get("sliding_window")):
        raise _refuse(folder, "sliding-window attention cannot be converted here")
    scaling = hf.rope_parameters(config)[1]
    if scaling.get("rope_type", scaling.get("type", "linear")) not in ("linear", "llama3"):
        raise _refuse(folder, f"rope scaling: expected none, linear or llama3, found {scaling}")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1:
        raise _refuse(folder, "partial_rotary_factor: expected 1")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="name a complete model folder") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", hint="download the model again") from None


def _pre_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the tokenizer's way to split a text before merging."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or [pre]
    unusual = [k for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(k)]
    if model.get("type") != "BPE" or unusual or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _refuse(folder, f"tokenizer: expected byte-level BPE, found {model.get('type')} {pre.get('type')} {unusual}")
    if len(steps) == 1 and steps[0].get("use_regex", True):
        pattern = "byte level"
    elif len(steps) == 2 and steps[0].get("type") == "Split" and not steps[1].get("use_regex", True):
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        pattern = steps[0]["pattern"].get("Regex", "") if isolated else ""
    else:
        pattern = ""
    name = PRE_TOKENIZERS.get((pattern, bool(model.get("ignore_merges"))))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if name is None or normalizer not in (None, "NFC" if name == "qwen2" else None):
        raise _refuse(folder, f"tokenizer: unknown pre-tokenizer {json.dumps(pre)} or normalizer {normalizer}")
    return name


def _token_table(folder: Path, tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, filled up to V."""
    tokens = {int(i): token for token, i in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for added in tokenizer.get("added_tokens", []):
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise _refuse(folder, f"tokenizer: token {added['content']!r} strips its surroundings")
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(tokens) >= vocab_size:
        raise InputError(f"{folder}: expected at most {vocab_size} tokens, found id {max(tokens)} in the tokenizer")
    ids = range(vocab_size)
    return [tokens.get(i, f"[PAD{i}]") for i in ids], [types.get(i, UNUSED) for i in ids]


def _ends_added(folder: Path, special: dict[str, int | None]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS in front of a text and EOS behind it, by its behaviour."""
    tokenizer = FolderTokenizer(folder)
    bare, full = tokenizer.encode("a", bos=False), tokenizer.encode("a")
    for bos in (False, True):
        for eos in (False, True):
            if full == [special["bos"]] * bos + bare + [special["eos"]] * eos:
                return bos, eos
    raise _refuse(folder, f"tokenizer: expected BOS or EOS around a text, found the ids {full} for 'a'")


def _add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    tokenizer, config = _read_json(folder / "tokenizer.json"), _read_json(folder / "tokenizer_config.json")
    tokens, types = _token_table(folder, tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(folder, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    special: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token")
        text = value["content"] if isinstance(value, dict) else value
        special[name] = tokens.index(text) if text in tokens else None
        if special[name] is not None:
            getattr(writer, f"add_{name}_token_id")(special[name])
    if "<|im_end|>" in tokens:
        writer.add_eot_token_id(tokens.index("<|im_end|>"))
    bos, eos = _ends_added(folder, special)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _add_settings(writer: Any, config: dict[str, Any], spec: ModelSpec, type_name: str, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(0 if type_name == "F32" else 1)
    writer.add_string(MODEL_TYPE_KEY, spec.model_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(spec.vocab_size)
    if spec.rope_scaling.get("rope_type", spec.rope_scaling.get("type")) == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(spec.rope_scaling["factor"]))


class _Weights:
    """The tensors of a Transformers folder under their GGUF names, converted one at a time.

    Raises:
        InputError: a tensor has no name in GGUF, or one is missing.
    """

    def __init__(self, folder: Path, config: dict[str, Any], spec: ModelSpec, type_name: str) -> None:
        import gguf
        from safetensors import safe_open

        self.folder, self.config, self.spec = folder, config, spec
        self.architecture = ARCHITECTURES[spec.model_type]
        self.matrix_dtype = np.dtype(np.float32 if type_name == "F32" else np.float16)
        kind = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(kind, spec.num_hidden_layers)
        tied = bool(config.get("tie_word_embeddings"))
        self.sources: dict[str, tuple[Any, str]] = {}
        self._shards = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        for shard in self._shards:
            for source in list(shard.keys()):  # type: ignore[no-untyped-call]
                if source.endswith("rotary_emb.inv_freq") or (tied and source == "lm_head.weight"):
                    continue
                target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise _refuse(folder, f"tensor {source} has no name in GGUF")
                self.sources[target] = (shard, source)
        if not tied and "output.weight" not in self.sources:
            raise InputError(f"{folder}: lm_head.weight is missing", hint="download the model again")

    def shapes(self) -> Iterator[tuple[str, list[int], np.dtype[Any]]]:
        """(name, shape, dtype) in the order of ``arrays``; vectors stay float32, as llama.cpp wants them."""
        for target, (shard, source) in self.sources.items():
            shape = list(shard.get_slice(source).get_shape())
            yield target, shape, np.dtype(np.float32) if len(shape) == 1 else self.matrix_dtype

    def arrays(self) -> Iterator[NDArray[Any]]:
        """Tensors in llama.cpp's layout and in the dtype that ``shapes`` told."""
        for target, (shard, source) in self.sources.items():
            array = shard.get_tensor(source).float().numpy()
            heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.spec.num_key_value_heads}
            role = target.rsplit(".", 2)[-2]
            if role in heads:
                array = rope.projection_to_llamacpp(array, heads[role], self.architecture)
            with np.errstate(over="ignore"):
                array = array.astype(np.float32 if array.ndim == 1 else self.matrix_dtype)
            if not np.isfinite(array).all():
                hint = "convert it to F32" if self.matrix_dtype == np.float16 else "the model is damaged"
                raise InputError(f"{self.folder}: {source} has values that are not finite in {array.dtype}", hint)
            yield np.ascontiguousarray(array)


def _write_model(path: Path, folder: Path, config: dict[str, Any], spec: ModelSpec, type_name: str) -> None:
    import gguf

    weights = _Weights(folder, config, spec, type_name)
    writer = gguf.GGUFWriter(path, weights.architecture)
    try:
        _add_settings(writer, config, spec, type_name, folder.resolve().name)
        _add_tokenizer(writer, folder, spec.vocab_size)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        divisors = None
        if spec.rope_scaling.get("rope_type") == "llama3":
            divisors = rope.llama3_divisors(spec.rope_theta, spec.head_dim, spec.rope_scaling)
            writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
        for name, shape, dtype in weights.shapes():
            writer.add_tensor_info(name, shape, dtype, prod(shape) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for array in weights.arrays():
            writer.write_tensor_data(array)
    finally:
        writer.close()


def convert_folder(folder: Path, target: Path, type_name: str = "F16") -> ModelSpec:
    """Converts a Transformers folder (llama, mistral, qwen2, qwen3) to GGUF.

    Args:
        folder: model and tokenizer.
        target: the GGUF file; it appears complete or not at all.
        type_name: "F32" or "F16"; norms stay float32.

    Returns:
        The model, read back from the new file.

    Raises:
        InputError: the folder is incomplete or of a kind that cannot be converted here, or the file cannot be written.
        MissingExtraError: gguf, torch or safetensors is not installed.
    """
    if type_name not in ("F32", "F16"):
        raise InputError(f"type: expected F32 or F16, found {type_name!r}", hint="quantize the F16 file for other types")
    _block_sizes()
    config = hf.read_config(folder)
    _check_config(folder, config)
    spec = hf.read_spec(folder)
    try:
        with _replacing(target) as temporary:
            _write_model(temporary, folder, config, spec, type_name)
            _require_same(spec, read_spec(temporary))
    except KeyError as error:
        raise InputError(f"{folder}: config.json or tokenizer.json has no {error}", hint="download the model again") from None
    return spec


def _require_same(want: ModelSpec, have: ModelSpec) -> None:
    """No file takes its place that patches for its base would refuse."""
    expected, found = want.as_dict(), have.as_dict()
    wrong = {name: (expected[name], found[name]) for name in expected if expected[name] != found[name]}
    if wrong:
        raise InputError(f"this model does not survive the conversion: {wrong}", hint="it cannot be patched in GGUF")


def quantize(source: Path, target: Path, type_name: str, num_threads: int | None = None) -> ModelSpec:
    """Quantizes an F32 or F16 GGUF file with llama.cpp.

    Args:
        source: GGUF file in full or half precision.
        target: the quantized file; it appears complete or not at all.
        type_name: one of ``quantization_types()``: "Q8_0", "Q4_K_M", "Q4_0", ...
        num_threads: all cores when ``None``.

    Returns:
        The model, read back from the new file.

    Raises:
        InputError: the type is unknown, the source is damaged or already quantized, or the file cannot be written.
        MissingExtraError: llama-cpp-python or gguf is not installed.
    """
    import ctypes

    llama_cpp, types = load_library(), quantization_types()
    if type_name not in types:
        raise InputError(f"quantization type: expected one of {sorted(types)}, found {type_name!r}")
    spec = read_spec(source)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = types[type_name]
    parameters.nthread = num_threads or 0
    with _replacing(target) as temporary:
        _log.clear()
        status = llama_cpp.llama_model_quantize(bytes(source), bytes(temporary), ctypes.byref(parameters))
        if status != 0:
            hint = "it needs an F32 or F16 source and room for the target; some types need an importance matrix"
            raise InputError(f"llama.cpp cannot quantize {source} to {type_name}: {library_errors()}", hint)
        _require_same(spec, read_spec(temporary))
    return spec


# llama.cpp.

_log: deque[str] = deque(maxlen=3)


def load_library() -> Any:
    """The ``llama_cpp`` module, its log kept in memory instead of printed.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        EdgepatchError: it is installed but its library cannot be loaded.
    """
    return _load_library()[0]


@cache
def _load_library() -> tuple[Any, Any]:
    """(module, log callback): llama.cpp keeps a pointer to the callback, so it must never be freed."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingExtraError("llama-cpp-python", "gguf") from None
    except (OSError, RuntimeError) as error:
        raise EdgepatchError(f"llama.cpp cannot be loaded: {error}", hint="install llama-cpp-python again") from error

    def keep(level: int, text: bytes, _: Any) -> None:
        if level in (3, 4):  # warnings and errors
            _log.append(text.decode("utf-8", "replace").strip())

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, None)
    llama_cpp.llama_backend_init()
    return llama_cpp, callback


def library_errors() -> str:
    """llama.cpp's last warnings and errors, for a message."""
    return "; ".join(_log) or "no reason given"
