"""llama.cpp's C interface as one object: a loaded model with a context, batches, sequences and their state."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.gguf import library
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError
from edgepatch.files import writing
from edgepatch.tensors import as_float32

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
"""Types of the KV cache by ggml's number."""

LEAST_CELLS = 256
CHUNK = 512
"""Most tokens that one call evaluates."""


@dataclass(frozen=True)
class ContextSettings:
    """How a context is made.

    Attributes:
        num_cells: tokens that all sequences together can hold.
        num_sequences: independent sequences; they share one pool of cells.
        kv_type: one of ``KV_TYPES``.
        flash_attention: fused attention; quantized values need it.
        num_threads: of one forward pass.
    """

    num_cells: int
    num_sequences: int
    kv_type: str
    flash_attention: bool
    num_threads: int


class LlamaModel:
    """A GGUF file's weights in llama.cpp, which ends the process on some files: ``llamacpp.proof`` opens one after a child has.

    Args:
        path: the file, already checked by ``gguf.header.read_header``.
        num_gpu_layers: layers to keep on a GPU.
        use_extra_buffers: let ggml repack weights for this CPU's kernels.
        takes_embeddings: whether contexts may evaluate embeddings.

    Attributes:
        notes: what the proof has to say.

    Raises:
        InputError: llama.cpp cannot load it.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, path: Path, num_gpu_layers: int = 0, use_extra_buffers: bool = True, takes_embeddings: bool = True
    ) -> None:
        self.lib = library.load_library()
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        self.path, self.num_gpu_layers, self.takes_embeddings = path, num_gpu_layers, takes_embeddings
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers, settings.use_extra_bufts = num_gpu_layers, use_extra_buffers
        self.handle = self.lib.llama_model_load_from_file(bytes(path), settings)
        if not self.handle:
            raise InputError(
                f"llama.cpp cannot load {path}: {library.library_errors()}", hint="download or convert it again"
            )
        self._resources.callback(self.lib.llama_model_free, self.handle)
        self.vocab = self.lib.llama_model_get_vocab(self.handle)
        self.window = int(self.lib.llama_model_n_swa(self.handle))
        self.has_recurrent_memory = bool(
            self.lib.llama_model_is_recurrent(self.handle) or self.lib.llama_model_is_hybrid(self.handle)
        )

    def load_lora(self, path: Path) -> Any:
        """A LoRA adapter in GGUF, for ``LlamaContext.set_adapters``; llama.cpp frees it with the model.

        Raises:
            InputError: llama.cpp cannot load it for this model.
        """
        library.forget_errors()
        adapter = self.lib.llama_adapter_lora_init(self.handle, bytes(path))
        if not adapter:
            raise InputError(
                f"llama.cpp cannot load the adapter {path}: {library.library_errors()}",
                hint="convert it again, for this very base",
            )
        return adapter

    def has_position_axes(self) -> bool:
        """M-RoPE wants four positions for each embedding; for tokens the library fills them in itself."""
        lib = self.lib
        kinds = (lib.LLAMA_ROPE_TYPE_MROPE, getattr(lib, "LLAMA_ROPE_TYPE_IMROPE", 40))
        return int(lib.llama_model_rope_type(self.handle)) in kinds

    def has_no_rotary_positions(self) -> bool:
        """Whether positions are something else than turns of the keys: learned, or a bias by distance."""
        return int(self.lib.llama_model_rope_type(self.handle)) == int(self.lib.LLAMA_ROPE_TYPE_NONE)

    def turns_neighbours(self) -> bool:
        """Whether rotary embeddings turn dimension ``2j`` of a cached key together with ``2j + 1``."""
        return int(self.lib.llama_model_rope_type(self.handle)) == int(self.lib.LLAMA_ROPE_TYPE_NORM)

    def close(self) -> None:
        """Frees the weights; contexts must be closed before."""
        self._resources.close()
        self.lib = Closed()


class LlamaContext:
    """Cells for sequences of tokens, and what the model computes from them.

    Args:
        model: stays open as long as the context.
        settings: sizes and types.

    Attributes:
        handle: llama.cpp's pointer.
        num_cells: that it has.

    Raises:
        InputError: llama.cpp cannot make such a context.
    """

    def __init__(self, model: LlamaModel, settings: ContextSettings) -> None:
        self.model, self.settings, self._lib = model, settings, model.lib
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        lib, options = self._lib, model.lib.llama_context_default_params()
        # llama.cpp makes 256 cells at least, but takes a smaller number for its batches and ends the process over them.
        num_cells = max(settings.num_cells, LEAST_CELLS)
        options.n_ctx, options.n_seq_max, options.kv_unified = num_cells, settings.num_sequences, True
        options.n_batch = options.n_ubatch = CHUNK
        options.n_threads = options.n_threads_batch = settings.num_threads
        options.type_k = options.type_v = KV_TYPES[settings.kv_type]
        options.swa_full = True  # cells behind a sliding window stay, so that a prompt can be cut back to them
        enabled, disabled = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.flash_attn_type = enabled if settings.flash_attention else disabled
        self.handle = lib.llama_init_from_model(model.handle, options)
        if not self.handle:
            raise InputError(
                f"llama.cpp cannot use {model.path}: {library.library_errors()}",
                hint="try a shorter context or f16",
            )
        self._resources.callback(lib.llama_free, self.handle)
        self._memory = lib.llama_get_memory(self.handle)
        self._vocab_size = int(lib.llama_vocab_n_tokens(model.vocab))
        self.num_cells = int(lib.llama_n_ctx(self.handle))
        self._chunk = min(int(lib.llama_n_batch(self.handle)), CHUNK)
        self._batch = self._resources.enter_context(_batch(lib, self._chunk))
        self._read_back = bytearray()

    def close(self) -> None:
        """Frees the context; may be called more than once."""
        self._resources.close()
        self._lib = Closed()

    # Sequences.

    def clear(self) -> None:
        """Empties every sequence."""
        self._lib.llama_memory_clear(self._memory, False)

    def forget(self, sequence: int) -> None:
        """Empties a sequence."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def last_position(self, sequence: int) -> int:
        """Of a sequence; -1 when it is empty."""
        return int(self._lib.llama_memory_seq_pos_max(self._memory, sequence))

    def truncate(self, sequence: int, length: int) -> bool:
        """Keeps the first positions of a sequence; whether they, and all that the next token sees of them, are still there."""
        if not length or self.model.has_recurrent_memory:
            return False
        return self.cut(sequence, length) and self.holds(sequence, length)

    def cut(self, sequence: int, end: int) -> bool:
        """Takes off all cells from position ``end`` on; whether the library could."""
        return bool(self._lib.llama_memory_seq_rm(self._memory, sequence, end, -1))

    def holds(self, sequence: int, length: int, start: int = 0) -> bool:
        """Whether a sequence holds exactly the positions ``start`` to ``length - 1``, as far back as the next token can see."""
        first = int(self._lib.llama_memory_seq_pos_min(self._memory, sequence))
        last = self.last_position(sequence)
        if not length:
            return (first, last) == (-1, -1)
        if self.model.has_recurrent_memory:
            return last == length - 1
        window = self.model.window
        reach = max(start, length - window + 1) if window else start  # the first that the next token sees
        return last == length - 1 and 0 <= first <= reach

    def fork(self, source: int, target: int) -> None:
        """Empties ``target`` and lets it share all cells of ``source``; nothing is copied."""
        self.forget(target)
        if self.last_position(source) >= 0:
            self.share(source, target)

    def share(self, source: int, target: int, first: int = 0) -> None:
        """Lets ``target`` see the cells of ``source`` from position ``first`` on as well; nothing is copied."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, first, -1)

    # State.

    def state(self, sequence: int) -> bytes:
        """What the library writes of a sequence.

        Raises:
            InactivePatchError: it gives none.
        """
        self._read_back = _read_state(self._lib, self.handle, sequence, self._read_back)
        return bytes(self._read_back)

    def restore(self, sequence: int, state: bytes | NDArray[np.uint8]) -> None:
        """Puts a state into a sequence and reads it back.

        Raises:
            InactivePatchError: the library did not take it, or holds something else now; the sequence is empty then.
        """
        taken = self._lib.llama_state_seq_set_data(self.handle, _pointer(state), len(state), sequence)
        self._read_back = _read_state(self._lib, self.handle, sequence, self._read_back)
        if taken != len(state) or not np.array_equal(
            np.frombuffer(self._read_back, np.uint8), np.frombuffer(state, np.uint8)
        ):
            self.forget(sequence)
            raise InactivePatchError(
                f"llama.cpp took {taken} of {len(state)} bytes of the seed: {library.library_errors()}"
            )

    def save_state_file(self, path: Path, sequence: int | None, tokens: Sequence[int]) -> None:
        """Writes a sequence, or with ``None`` the whole context, as the library's own file, labelled with token ids.

        Raises:
            InputError: the file cannot be written.
        """
        labels = (self._lib.llama_token * len(tokens))(*tokens)
        if sequence is None:
            size = self._lib.llama_state_save_file(self.handle, bytes(path), labels, len(tokens))
        else:
            size = self._lib.llama_state_seq_save_file(self.handle, bytes(path), sequence, labels, len(tokens))
        if not size:
            raise InputError(f"cannot write {path}: {writing.reason_of(path, library.library_errors())}", writing.HINT)

    @property
    def num_state_bytes(self) -> int:
        """Size of the state of all sequences together, which holds each cell once."""
        return int(self._lib.llama_state_get_size(self.handle))

    # Adapters.

    def set_adapters(self, loras: Sequence[Any] = (), directions: NDArray[np.float32] | None = None) -> None:
        """Applies adapters from now on, in place of those before; none by default.

        Args:
            loras: of ``LlamaModel.load_lora``.
            directions: (L - 1, D) of a control vector, one for each layer from the second on.

        Raises:
            InputError: llama.cpp cannot use them on this model.
        """
        lib, library_type = self._lib, self._lib.llama_adapter_lora_p_ctypes
        scales = (ctypes.c_float * max(1, len(loras)))(*[1.0] * len(loras))
        library.forget_errors()
        failed = lib.llama_set_adapters_lora(
            self.handle, (library_type * max(1, len(loras)))(*loras), len(loras), scales
        )
        if directions is None:
            width = int(lib.llama_model_n_embd(self.model.handle))
            failed |= lib.llama_set_adapter_cvec(self.handle, None, 0, width, 0, 0)
        else:
            values = np.ascontiguousarray(directions, np.float32)
            pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            failed |= lib.llama_set_adapter_cvec(self.handle, pointer, values.size, values.shape[1], 1, len(values))
        if failed:
            raise InputError(
                f"llama.cpp cannot use the adapter on {self.model.path}: {library.library_errors()}",
                hint="make it for this very base",
            )

    # Evaluation.

    def evaluate(
        self, sequence: int, tokens: Sequence[int], every: bool = False, first: int = 0
    ) -> NDArray[np.float32]:
        """Evaluates tokens behind a sequence.

        Args:
            sequence: whichever.
            tokens: one or more.
            every: whether each wants logits.
            first: the position of the first token of an empty sequence.

        Returns:
            (T, V) float32 logits with ``every``, else (1, V) of the last token.
        """
        logits = []  # in chunks: llama.cpp ends the process on more than n_batch tokens
        for start in range(0, len(tokens), self._chunk):
            chunk = tokens[start : start + self._chunk]
            is_last = start + self._chunk >= len(tokens)
            outputs = [every] * (len(chunk) - 1) + [every or is_last]
            self._batch.fill(self._next_positions(sequence, len(chunk), first), [sequence] * len(chunk), outputs)
            self._batch.set_tokens(chunk)
            logits.append(self._outputs(self._batch, self._lib.llama_decode(self.handle, self._batch.struct)))
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def evaluate_rows(self, sequences: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Evaluates one token behind each of B different sequences, as one batch.

        Returns:
            (B, V) float32 logits.
        """
        logits = []
        for start in range(0, len(tokens), self._chunk):
            rows, chunk = sequences[start : start + self._chunk], tokens[start : start + self._chunk]
            self._batch.fill([self.last_position(row) + 1 for row in rows], rows, [True] * len(rows))
            self._batch.set_tokens(chunk)
            logits.append(self._outputs(self._batch, self._lib.llama_decode(self.handle, self._batch.struct)))
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def evaluate_embeddings(
        self, sequence: int, embeddings: NDArray[np.float32], logits: bool = False
    ) -> NDArray[np.float32]:
        """Evaluates (P, D) embeddings behind a sequence, in the scale that llama.cpp's graph takes.

        Returns:
            (1, V) float32 logits of the last with ``logits``, else (0, V).

        Raises:
            InactivePatchError: llama.cpp dies of embeddings on this model.
        """
        if not self.model.takes_embeddings:
            raise InactivePatchError(
                f"{self.model.path}: llama.cpp ends its process when it evaluates embeddings of this model",
                hint="use another release of llama-cpp-python; the note at the start of the model has the reason",
            )
        axes = 4 if self.model.has_position_axes() else 1
        outputs = np.empty((0, self._vocab_size), np.float32)
        with _batch(self._lib, self._chunk, embeddings.shape[1], axes) as batch:
            for start in range(0, len(embeddings), self._chunk):
                chunk = embeddings[start : start + self._chunk]
                is_output = [False] * (len(chunk) - 1) + [logits and start + self._chunk >= len(embeddings)]
                batch.fill(self._next_positions(sequence, len(chunk)), [sequence] * len(chunk), is_output)
                batch.set_embeddings(chunk)
                outputs = self._outputs(batch, self._lib.llama_decode(self.handle, batch.struct))
        return outputs

    def _next_positions(self, sequence: int, count: int, at_least: int = 0) -> range:
        first = max(self.last_position(sequence) + 1, at_least)
        return range(first, first + count)

    def _outputs(self, batch: _Batch, status: int) -> NDArray[np.float32]:
        """Of a batch that was evaluated with this status: (N, V) float32 logits of its N tokens that want them."""
        if status != 0:
            count = batch.struct.n_tokens
            raise EdgepatchError(
                f"llama.cpp cannot evaluate {count} tokens (code {status}): {library.library_errors()}"
            )
        if not batch.num_outputs:
            return np.empty((0, self._vocab_size), np.float32)
        pointer = self._lib.llama_get_logits(self.handle)
        return as_float32(np.ctypeslib.as_array(pointer, (batch.num_outputs, self._vocab_size)))


class Closed:
    """Stands in for llama.cpp once the model is freed: its functions would read freed memory."""

    def __getattr__(self, name: str) -> Any:
        raise EdgepatchError("the model is closed", hint="load it again")


class _Batch:
    """llama.cpp's batch of at most ``size`` tokens, or of embeddings of ``width`` values, with ``axes`` positions each."""

    def __init__(self, lib: Any, size: int, width: int, axes: int) -> None:
        self.struct = lib.llama_batch_init(size, width, 1)
        self.num_outputs, self._axes = 0, axes
        # llama.cpp allocates one position an embedding, and reads four of a model with M-RoPE.
        self._positions = (ctypes.c_int32 * (size * axes))()
        self._own_positions = ctypes.addressof(
            self.struct.pos.contents
        )  # an address: `struct.pos` itself would follow the change
        self.struct.pos = ctypes.cast(self._positions, type(self.struct.pos))
        _fill(self.struct.n_seq_id, [1] * size)

    def fill(self, positions: Sequence[int], sequences: Sequence[int], is_output: Sequence[bool]) -> None:
        """Sets each token's position and sequence, and whether it wants logits."""
        count = self.struct.n_tokens = len(positions)
        self.num_outputs = sum(is_output)
        table = np.ctypeslib.as_array(self._positions)
        for axis in range(
            self._axes
        ):  # section by section; text has the same position on three axes and 0 on the fourth
            table[axis * count : (axis + 1) * count] = positions if axis < 3 else 0
        for i, sequence in enumerate(sequences):
            self.struct.seq_id[i][0] = sequence
        _fill(self.struct.logits, is_output)

    def set_tokens(self, tokens: Sequence[int]) -> None:
        """As many as there are positions."""
        _fill(self.struct.token, tokens)

    def set_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        """(N, D), as many as there are positions."""
        _fill(self.struct.embd, embeddings.ravel())

    def free(self, lib: Any) -> None:
        """Gives the memory back, the positions' to their owner."""
        self.struct.pos = ctypes.cast(self._own_positions, type(self.struct.pos))
        lib.llama_batch_free(self.struct)


@contextmanager
def _batch(lib: Any, size: int, width: int = 0, axes: int = 1) -> Iterator[_Batch]:
    batch = _Batch(lib, size, width, axes)
    try:
        yield batch
    finally:
        batch.free(lib)


def _fill(target: Any, values: Sequence[int] | NDArray[np.float32]) -> None:
    """Copies values into a C array that is at least as long."""
    np.ctypeslib.as_array(target, (len(values),))[:] = values


def _read_state(lib: Any, handle: Any, sequence: int, memory: bytearray) -> bytearray:
    """The state of a sequence, in ``memory`` where it fits: a seed that moves is read back at every move."""
    size = int(lib.llama_state_seq_get_size(handle, sequence))
    if len(memory) != size:
        memory = bytearray(size)
    if lib.llama_state_seq_get_data(handle, _pointer(memory), size, sequence) != size:
        raise InactivePatchError(f"llama.cpp gave no state of its cache: {library.library_errors()}")
    return memory


def _pointer(state: bytes | bytearray | NDArray[np.uint8]) -> Any:
    """The address of bytes, which are not copied; the library does not write to those that it is given."""
    return ctypes.cast(np.frombuffer(state, np.uint8).ctypes.data, ctypes.POINTER(ctypes.c_uint8))
