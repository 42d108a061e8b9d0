"""The llama.cpp runtime: a GGUF model of any quantization, its KV cache seeded with the patch."""

from __future__ import annotations

import codecs
import ctypes
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import gguf, rope
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError
from edgepatch.patches import Patch
from edgepatch.runtimes.base import Message, Runtime, as_float32, check_patch
from edgepatch.tensors import KVSeed
from edgepatch.tokenizers import render_chat_template

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
"""Types of the KV cache by ggml's number."""

SEED_TYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}
"""Types into which a stored seed can be written; llama.cpp rotates the values of a quantized cache before it stores them."""

DEFAULT_CONTEXT = 4096
CHUNK = 512
"""Most tokens that one call evaluates."""


class LlamaCppRuntime(Runtime):
    """A GGUF file in llama.cpp, seeded with the patch.

    Args:
        path: the GGUF file.
        patch: ``None`` for the bare model.
        context_length: positions, the patch's included; by default the model's own length, at most 4096.
        kv_type: type of the KV cache, one of ``KV_TYPES``; quantized types need flash attention.
        flash_attention: llama.cpp's fused attention; it computes in float16 whatever the cache's type.
        num_threads: all cores when ``None``.
        num_gpu_layers: layers to keep on a GPU, where llama.cpp was built for one.

    Raises:
        InputError: the file is missing, damaged or not of a proven architecture, or an option cannot be used.
        MismatchError: the patch was made for another model.
        InactivePatchError: llama.cpp did not take the seed.
        MissingExtraError: llama-cpp-python or gguf is not installed.
    """

    name = "llamacpp"

    def __init__(
        self,
        path: Path,
        patch: Patch | None = None,
        *,
        context_length: int | None = None,
        kv_type: str = "f16",
        flash_attention: bool = True,
        num_threads: int | None = None,
        num_gpu_layers: int = 0,
    ) -> None:
        super().__init__()
        self._lib = gguf.load_library()
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        header = gguf.read_header(path)
        self.spec = gguf.spec_of(header)
        check_patch(patch, self.spec)
        self.patch = patch
        self.quantization = gguf.quantization(header)
        self._architecture = header.architecture
        self._num_virtual_tokens = patch.num_virtual_tokens if patch else 0
        self._kv_type, self._flash_attention = kv_type, flash_attention
        self.seed_route = self._choose_route()
        positions = self._positions(context_length, int(header.setting("context_length")))
        try:
            self._load(path, positions, num_threads or os.cpu_count() or 1, num_gpu_layers)
            self.context_length = min(positions, self._lib.llama_n_ctx(self._context)) - self._num_virtual_tokens
            self._read_vocabulary(path, header)
            self._seed = self._make_seed()
            self._restore()
        except BaseException:
            self.close()
            raise

    # Loading.

    def _choose_route(self) -> str:
        """How the seed gets into the cache: "stored" in the patch, "decoded" from the soft prompt by this very model, or ""."""
        if self._kv_type not in KV_TYPES:
            raise InputError(f"KV type: expected one of {sorted(KV_TYPES)}, found {self._kv_type!r}")
        if self._kv_type.startswith("q") and not self._flash_attention:
            raise InputError(f"KV type {self._kv_type} needs flash attention", hint="turn it on or use f16")
        if self.patch is None:
            return ""
        rope.rotates_neighbours(self._architecture)
        if self.patch.kv_seed is not None and self._kv_type in SEED_TYPES:
            return "stored"
        if self.patch.soft_prompt is None:
            raise InputError(f"KV type {self._kv_type}: the patch has a KV seed alone, which needs f16 or f32", hint="use f16")
        return "decoded"

    def _positions(self, asked: int | None, trained: int) -> int:
        positions = min(trained, DEFAULT_CONTEXT) if asked is None else asked
        if not self._num_virtual_tokens < positions <= trained:
            least, hint = self._num_virtual_tokens + 1, f"the patch takes {self._num_virtual_tokens} of them"
            raise InputError(f"context length: expected {least} to {trained}, found {positions}", hint)
        return positions

    def _load(self, path: Path, positions: int, num_threads: int, num_gpu_layers: int) -> None:
        lib = self._lib
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = num_gpu_layers
        self._model = lib.llama_model_load_from_file(bytes(path), settings)
        if not self._model:
            raise InputError(f"llama.cpp cannot load {path}: {gguf.library_errors()}", hint="download or convert it again")
        self._resources.callback(lib.llama_model_free, self._model)
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = positions, 1, True
        options.n_batch = options.n_ubatch = CHUNK
        options.n_threads = options.n_threads_batch = num_threads
        options.type_k = options.type_v = KV_TYPES[self._kv_type]
        enabled, disabled = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.flash_attn_type = enabled if self._flash_attention else disabled
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise InputError(f"llama.cpp cannot use {path}: {gguf.library_errors()}", hint="try a shorter context or f16")
        self._resources.callback(lib.llama_free, self._context)
        self._memory = lib.llama_get_memory(self._context)
        self._chunk = int(lib.llama_n_batch(self._context))
        self._batch = self._resources.enter_context(_Batch(lib, self._chunk))

    def _read_vocabulary(self, path: Path, header: gguf.GGUFHeader) -> None:
        lib = self._lib
        self._vocab = lib.llama_model_get_vocab(self._model)
        ids = range(lib.llama_vocab_n_tokens(self._vocab))
        if len(ids) != self.spec.vocab_size:
            raise InputError(f"{path}: expected {self.spec.vocab_size} tokens, found {len(ids)}", hint="download it again")
        self.end_token_ids = frozenset(i for i in ids if lib.llama_vocab_is_eog(self._vocab, i))
        self._template = str(header.metadata.get("tokenizer.chat_template", ""))
        bos, eos = lib.llama_vocab_bos(self._vocab), lib.llama_vocab_eos(self._vocab)
        self._bos, self._eos = (lib.llama_vocab_get_text(self._vocab, i).decode() if i in ids else "" for i in (bos, eos))

    # The seed.

    def _make_seed(self) -> ctypes.Array[ctypes.c_uint8] | None:
        """llama.cpp's own state of the P seeded positions, or ``None`` for the bare model."""
        if self.patch is None:
            return None
        if self.seed_route == "decoded":
            assert self.patch.soft_prompt is not None  # _choose_route
            self._decode_embeddings(self.patch.soft_prompt.embeddings)
            return self._state()
        assert self.patch.kv_seed is not None  # _choose_route
        self._forward([0] * self._num_virtual_tokens, every=False)  # any tokens: only the shape of their state is wanted
        state = self._state()
        self._overwrite(state, self.patch.kv_seed)
        return state

    def _state(self) -> ctypes.Array[ctypes.c_uint8]:
        size = self._lib.llama_state_seq_get_size(self._context, 0)
        state: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        if self._lib.llama_state_seq_get_data(self._context, state, size, 0) != size:
            raise InactivePatchError(f"llama.cpp gave no state of its cache: {gguf.library_errors()}")
        return state

    def _overwrite(self, state: ctypes.Array[ctypes.c_uint8], seed: KVSeed) -> None:
        """Puts the seed's keys and values into a state; every other byte must already be the expected one."""
        view = memoryview(state).cast("B")
        parts = list(self._cache_parts(seed))
        position = len(view) - sum(len(part) for _, part in parts)  # in front of it stands a header that is left alone
        if position < 0:
            raise InactivePatchError(f"llama.cpp's state: expected {len(view) - position} bytes or more, found {len(view)}")
        for name, part in parts:
            target = view[position : position + len(part)]
            if name == "data":
                target[:] = part
            elif target != part:
                found = f"expected {part.hex()}, found {target.hex()}"
                raise InactivePatchError(f"llama.cpp's state: {name}: {found}", hint="use a tested llama-cpp-python")
            position += len(part)

    def _cache_parts(self, seed: KVSeed) -> Iterator[tuple[str, bytes]]:
        """The cache of one sequence as llama.cpp writes it: named fields, and "data" for keys and values."""
        num_heads, num_cells, head_dim = seed.keys[0].shape
        dtype, kind = SEED_TYPES[self._kv_type], KV_TYPES[self._kv_type]
        row = num_heads * head_dim
        row_field = struct.pack("<iQ", kind, row * dtype.itemsize)
        transposed = not self._flash_attention
        yield "number of streams and cells", struct.pack("<II", 1, num_cells)
        for position in range(num_cells):
            yield f"cell {position}", struct.pack("<iIi", position, 1, 0)  # position, number of sequences, sequence
        yield "value order and number of layers", struct.pack("<II", transposed, len(seed.keys))
        for layer, key in enumerate(seed.keys):
            yield f"key type of layer {layer}", row_field
            yield "data", _cast(rope.to_llamacpp(key, self._architecture).transpose(1, 0, 2), dtype)  # (P, K, H)
        for layer, value in enumerate(seed.values):
            column_field = struct.pack("<iII", kind, dtype.itemsize, row)
            yield f"value type of layer {layer}", column_field if transposed else row_field
            yield "data", _cast(value.transpose((0, 2, 1) if transposed else (1, 0, 2)), dtype)  # (K, H, P) or (P, K, H)

    def _restore(self) -> None:
        """Starts the cache afresh with nothing but the seed in it, and proves that it is there."""
        lib = self._lib
        lib.llama_memory_clear(self._memory, False)
        if self._seed is None:
            return
        size = len(self._seed)
        taken = lib.llama_state_seq_set_data(self._context, self._seed, size, 0)
        if taken != size or not self._holds(self._num_virtual_tokens) or bytes(self._state()) != bytes(self._seed):
            raise InactivePatchError(f"llama.cpp took {taken} of {size} bytes of the seed: {gguf.library_errors()}")

    def _holds(self, num_positions: int) -> bool:
        """Whether the cache holds exactly the positions 0 to ``num_positions - 1``."""
        first = self._lib.llama_memory_seq_pos_min(self._memory, 0)
        last = self._lib.llama_memory_seq_pos_max(self._memory, 0)
        return (first, last) == ((0, num_positions - 1) if num_positions else (-1, -1))

    # Evaluation.

    def _rewind(self, length: int) -> int:
        keep = self._num_virtual_tokens + length
        if keep and self._lib.llama_memory_seq_rm(self._memory, 0, keep, -1) and self._holds(keep):
            return length
        self._restore()
        return 0

    def _forward(self, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        logits = []  # in chunks: llama.cpp ends the process on more than n_batch tokens
        for start in range(0, len(tokens), self._chunk):
            chunk = tokens[start : start + self._chunk]
            is_last = start + self._chunk >= len(tokens)
            wanted = [every] * (len(chunk) - 1) + [every or is_last]
            self._batch.fill(self._next_positions(len(chunk)), wanted, tokens=chunk)
            logits.append(self._run(self._batch))
        return np.concatenate(logits)

    def _decode_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        """Evaluates (P, D) embeddings behind all that the cache holds, in chunks."""
        with _Batch(self._lib, self._chunk, embeddings.shape[1]) as batch:
            for start in range(0, len(embeddings), self._chunk):
                chunk = embeddings[start : start + self._chunk]
                batch.fill(self._next_positions(len(chunk)), [False] * len(chunk), embeddings=chunk)
                self._run(batch)

    def _next_positions(self, count: int) -> range:
        first = self._lib.llama_memory_seq_pos_max(self._memory, 0) + 1
        return range(first, first + count)

    def _run(self, batch: _Batch) -> NDArray[np.float32]:
        """Evaluates a batch; (N, V) float32 logits of its N tokens that want them."""
        status = self._lib.llama_decode(self._context, batch.struct)
        if status != 0:
            count = batch.struct.n_tokens
            raise EdgepatchError(f"llama.cpp cannot evaluate {count} tokens (code {status}): {gguf.library_errors()}")
        if not batch.num_outputs:
            return np.empty((0, self.spec.vocab_size), np.float32)
        pointer = self._lib.llama_get_logits(self._context)
        return as_float32(np.ctypeslib.as_array(pointer, (batch.num_outputs, self.spec.vocab_size)))

    # Text.

    def encode(self, text: str) -> list[int]:
        return self._tokenize(text, special_around=True, special_within=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if not self._template:
            raise InputError("the model has no chat template", hint="pass plain text or token ids instead of messages")
        text = render_chat_template(self._template, messages, self._bos, self._eos)
        return self._tokenize(text, special_around=False, special_within=True)

    def _tokenize(self, text: str, special_around: bool, special_within: bool) -> list[int]:
        """Token ids.

        Args:
            text: any text.
            special_around: put BOS and EOS around it where the model wants them.
            special_within: read special tokens spelled out in the text as such.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode: {error}", hint="remove unpaired surrogates") from None
        size = len(data) + 2
        tokens = (self._lib.llama_token * size)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), tokens, size, special_around, special_within)
        if count < 0:
            raise EdgepatchError(f"llama.cpp cannot tokenize a text of {len(data)} bytes (code {count})")
        return list(tokens[:count])

    def _piece(self, token: int) -> bytes:
        """The bytes of a token; none for a special token."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _new_decoder(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self._piece(token))

    def close(self) -> None:
        """Frees the model; may be called more than once."""
        self._resources.close()
        self._lib = _Closed()


class _Closed:
    """Stands in for llama.cpp once the model is freed: its functions would read freed memory."""

    def __getattr__(self, name: str) -> Any:
        raise EdgepatchError("the model is closed", hint="load it again")


class _Batch:
    """llama.cpp's batch of at most ``size`` tokens, or of embeddings of ``width`` values."""

    def __init__(self, lib: Any, size: int, width: int = 0) -> None:
        self.struct = lib.llama_batch_init(size, width, 1)
        self.num_outputs = 0
        self._free = lib.llama_batch_free
        _fill(self.struct.n_seq_id, [1] * size)
        for i in range(size):
            self.struct.seq_id[i][0] = 0

    def fill(
        self,
        positions: Sequence[int],
        wanted: Sequence[bool],
        tokens: Sequence[int] = (),
        embeddings: NDArray[np.float32] | None = None,
    ) -> None:
        """Sets the tokens or embeddings to evaluate, their positions, and which of them want logits."""
        self.struct.n_tokens, self.num_outputs = len(positions), sum(wanted)
        _fill(self.struct.pos, positions)
        _fill(self.struct.logits, wanted)
        if embeddings is None:
            _fill(self.struct.token, tokens)
        else:
            _fill(self.struct.embd, embeddings.ravel())

    def __enter__(self) -> _Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._free(self.struct)


def _fill(target: Any, values: Sequence[int] | NDArray[np.float32]) -> None:
    """Copies values into a C array that is at least as long."""
    np.ctypeslib.as_array(target, (len(values),))[:] = values


def _cast(tensor: NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    """The tensor's bytes in the cache's type.

    Raises:
        InputError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if not np.isfinite(cast).all():
        raise InputError("the KV seed has values beyond float16", hint="load the model with kv_type f32")
    return cast.tobytes()
