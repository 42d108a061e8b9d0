"""The llama.cpp runtime: a GGUF model of any quantization, its KV cache seeded with the patch.

One sequence of llama.cpp holds nothing but the seed and never a token of a prompt. Every conversation is a sequence that shares
those cells, so no request can overwrite them, and the seed is in memory once.
"""

from __future__ import annotations

import codecs
import ctypes
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import weight_sketches
from edgepatch.converters.gguf import specs
from edgepatch.converters.gguf.header import GGUFHeader, read_header
from edgepatch.converters.gguf.library import require_installed
from edgepatch.converters.gguf.text import GGUFTokenizer
from edgepatch.converters.gguf.vocabulary import read_token_facts
from edgepatch.converters.llamacpp import layout as llamacpp_layout
from edgepatch.converters.llamacpp.state import SequenceState, read_state
from edgepatch.cores import begin_choice, read_allowance
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.runtimes.base import Message, Runtime, SeedRoute, Tools, check_patch
from edgepatch.runtimes.llamacpp.calibration import Calibration
from edgepatch.runtimes.llamacpp.context import KV_TYPES, ContextSettings, LlamaContext, LlamaModel
from edgepatch.runtimes.llamacpp.proof import open_model, prove_model
from edgepatch.text.chat_templates import prepare_chat_template
from edgepatch.text.tokenizers import AddedTokens, encode_chat

DEFAULT_CONTEXT = 4096
MAX_KEPT_STATES = 8
"""Patches whose state stays in memory, so that a swap back costs a copy."""


class LlamaCppRuntime(Runtime):
    """A GGUF file in llama.cpp, seeded with the patch.

    Args:
        path: the GGUF file.
        patch: ``None`` for the bare model.
        context_length: positions of a sequence, the patch's included; by default the model's own length, at most 4096.
        num_sequences: conversations held at once; they share the seed, and each has ``context_length`` positions.
        kv_type: type of the KV cache, one of ``KV_TYPES``; quantized types need flash attention.
        flash_attention: llama.cpp's fused attention; it computes in float16 whatever the cache's type.
        seed_route: "stored" for the patch's own seed, "decoded" for one that this very model computes from the soft prompt;
            by default the stored one where its layout is confirmed by measurement, else the decoded one.
        num_threads: of a forward pass; by default one for each core that is free while the model loads.
        num_gpu_layers: layers to keep on a GPU, where llama.cpp was built for one.

    Raises:
        InputError: the file is missing or damaged, or an option cannot be used.
        MismatchError: the patch was made for another model.
        InactivePatchError: llama.cpp did not take the seed, or the canary says that it does not work.
        MissingExtraError: llama-cpp-python or gguf is not installed.
    """

    name = "llamacpp"

    def __init__(
        self,
        path: Path,
        patch: Patch | None = None,
        *,
        context_length: int | None = None,
        num_sequences: int = 1,
        kv_type: str = "f16",
        flash_attention: bool = True,
        seed_route: SeedRoute | None = None,
        num_threads: int | None = None,
        num_gpu_layers: int = 0,
    ) -> None:
        super().__init__(num_sequences)
        self._lib: Any = _Closed()
        threads = begin_choice(num_threads)
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        require_installed()
        header = read_header(path)
        self.spec = specs.spec_of(header)
        check_patch(patch, self.spec)
        self.kv_type, self._wanted_route = _checked_type(kv_type, flash_attention), _checked_route(seed_route)
        self.num_positions = _positions(context_length, int(header.setting("context_length")), patch)
        self.seed_reason = ""
        self._header, self._fitting = header, set[str]()
        self._states: dict[str, tuple[bytes, SeedRoute]] = {}
        self._probe: SequenceState | None = None
        self._pieces: dict[int, bytes] = {}
        try:
            self._load(path, header, flash_attention, num_threads, threads, num_gpu_layers)
            self._load_patch(patch)
        except BaseException:
            self.close()
            raise

    # Loading.

    def _load(
        self,
        path: Path,
        header: GGUFHeader,
        flash_attention: bool,
        num_threads: int | None,
        threads: Callable[[], int],
        num_gpu_layers: int,
    ) -> None:
        # The seed's cells are shared; one more sequence holds them while no conversation does.
        num_cells = self.num_positions * self.num_sequences
        self._master = self.num_sequences
        # A trial takes as many threads as there may ever be, so that a free core more does not ask for another.
        most = num_threads or read_allowance().usable
        settings = ContextSettings(num_cells, self.num_sequences + 1, self.kv_type, flash_attention, most)
        self._template = str(header.metadata.get("tokenizer.chat_template", ""))
        # A child tries the file, or llama.cpp reads its weights and then clears the cache in a thread; template and vocabulary
        # are prepared meanwhile. The child is waited for here: Ctrl-C, which reaches the main thread, must end it.
        with ThreadPoolExecutor(2) as library:
            preparing = library.submit(prepare_chat_template, self._template)
            proof = prove_model(path, num_gpu_layers, settings)
            loading = library.submit(open_model, proof, num_gpu_layers, settings)
            self._resources.callback(_close_result, loading)
            preparing.result()
            self._model = loading.result()
            self._lib, self.notes = self._model.lib, self._model.notes
            self.num_threads = threads()
            settings = replace(settings, num_threads=self.num_threads)
            creating = library.submit(LlamaContext, self._model, settings)
            self._resources.callback(_close_result, creating)
            self._vocab = self._model.vocab
            self._tokenizer = GGUFTokenizer(self._lib, self._vocab, header)
            self._resources.callback(self._tokenizer.close)  # before the model is freed
            self.text_bound = self._tokenizer.bound
            self._read_vocabulary(path)
            self._context = creating.result()
        self.quantization = specs.quantization(header)
        self._calibration = Calibration(self._model, header, self.spec, settings)

    def _read_vocabulary(self, path: Path) -> None:
        facts = read_token_facts(self._lib, self._vocab)
        if facts.size != self.spec.vocab_size:
            raise InputError(
                f"{path}: expected {self.spec.vocab_size} tokens, found {facts.size}", hint="download it again"
            )
        self.end_token_ids, self._bos, self._eos = facts.end_token_ids, facts.bos, facts.eos
        self._added_tokens = AddedTokens(facts.special, facts.user_defined)

    def _check_weights(self, patch: Patch) -> None:
        if patch.weight_sketch is not None and patch.digest not in self._fitting:
            compare(
                patch.weight_sketch,
                weight_sketches.sketch_of_gguf(self._header, patch.weight_sketch),
                self.quantization,
            )
            self._fitting.add(patch.digest)

    # The seed.

    def _load_patch(self, patch: Patch | None) -> None:
        """As the base class; a patch that has passed its whole canary on this device before proves itself as in a swap."""
        is_proved = patch is not None and self._calibration.has_proved(patch.digest)
        self._exchange(patch, num_prompts=1 if is_proved else None)
        if patch is not None and not is_proved:
            self._calibration.keep_proof(patch.digest)

    def _install(self, patch: Patch | None) -> SeedRoute:
        route: SeedRoute = ""
        if patch is not None:
            route = self._state_of(patch)[1]
        self._restore()
        for sequence in range(self.num_sequences):
            self._context.fork(self._master, sequence)
        return route

    def _restore(self) -> None:
        """Starts the cache afresh with nothing but the seed in it."""
        self._context.clear()
        if self.patch is not None:
            self._context.restore(self._master, self._state_of(self.patch)[0])
        if not self._context.holds(self._master, self.num_virtual_tokens):
            raise InactivePatchError(
                f"llama.cpp's cache does not hold the {self.num_virtual_tokens} positions of the seed"
            )

    def _state_of(self, patch: Patch) -> tuple[bytes, SeedRoute]:
        """llama.cpp's own state of the P seeded positions, and how it was made."""
        digest = patch.digest
        if digest not in self._states:
            while len(self._states) >= MAX_KEPT_STATES:
                del self._states[next(iter(self._states))]
            self._states[digest] = self._make_state(patch)
        return self._states[digest]

    def _make_state(self, patch: Patch) -> tuple[bytes, SeedRoute]:
        self.seed_reason = ""
        if self._wanted_route == "stored" and patch.kv_seed is None:
            raise InputError(
                "the patch has no stored seed", hint="add it with `edgepatch convert seed`, or use seed_route decoded"
            )
        if patch.kv_seed is None or self._wanted_route == "decoded":
            return self._decode(patch), "decoded"
        if self._model.has_recurrent_memory:
            return self._fall_back(patch, "the model has recurrent layers, whose memory no KV seed holds")
        # A layout says nothing about another seed: one of another rope theta fits it too. So each seed is compared once.
        confirmed = patch.soft_prompt is None or self._calibration.has_confirmed(patch.digest)
        layout = self._calibration.layout if patch.canary and confirmed else None
        if layout is None and patch.soft_prompt is None:
            layout = self._calibration.layout_by_rope()
        if layout is not None:
            return self._lay_out(patch, layout), "stored"
        return self._measure(patch)

    def _measure(self, patch: Patch) -> tuple[bytes, SeedRoute]:
        """Compares what the model itself makes of the soft prompt with the stored seed, and takes the layout if one fits."""
        assert patch.kv_seed is not None  # _make_state
        decoded = self._decode(patch)
        try:
            self._probe = read_state(decoded)
            found = llamacpp_layout.measure(self._probe, patch.kv_seed, self._calibration.key_error_factor())
        except InactivePatchError as error:
            return self._fall_back(patch, str(error), decoded)
        if not found.confirmed:
            errors = f"keys differ from the stored seed by {found.key_error:.2f}, values by {found.value_error:.2f}"
            return self._fall_back(patch, f"no layout of its cache fits: {errors}", decoded)
        self._calibration.keep_layout(found.layout, patch.digest)
        return self._lay_out(patch, found.layout), "stored"

    def _fall_back(self, patch: Patch, reason: str, decoded: bytes | None = None) -> tuple[bytes, SeedRoute]:
        """The decoded route, unless the stored one was asked for or is the only one; the reason is kept for the user."""
        if self._wanted_route == "stored" or patch.soft_prompt is None:
            raise InputError(
                f"the stored seed cannot be used: {reason}",
                hint="use a patch with a soft prompt, and seed_route decoded",
            )
        self.seed_reason = reason
        return decoded or self._decode(patch), "decoded"

    def _lay_out(self, patch: Patch, layout: llamacpp_layout.Layout) -> bytes:
        assert patch.kv_seed is not None  # _make_state
        if self._probe is None:  # any token: only the structure of its state is wanted
            if self._context.last_position(0) != 0:  # else the canary has left one there
                self._context.clear()
                self._context.evaluate(0, [0])
            self._context.fork(0, self._master)
            self._context.forget(0)  # a cell names the sequences that share it
            self._probe = read_state(self._context.state(self._master))
        return llamacpp_layout.seeded_state(self._probe, layout, patch.kv_seed, self._model.window)

    def _decode(self, patch: Patch) -> bytes:
        """The state of the soft prompt evaluated by this very model."""
        if patch.soft_prompt is None:
            raise InputError("the patch has a KV seed alone: it cannot be decoded", hint="use seed_route stored")
        self._context.clear()
        factor = self._calibration.embedding_factor(self._context, self._master)
        self._context.evaluate_embeddings(self._master, patch.soft_prompt.embeddings * np.float32(factor))
        return self._context.state(self._master)

    def forget_states(self) -> None:
        """Frees the states of patches that were active before; the next swap to one lays it out anew."""
        self._states.clear()

    def seed_state(self) -> bytes:
        """llama.cpp's own state of the seeded positions; meaningless to another build or another setting of the cache."""
        return self._context.state(self._master)

    def save_seed_file(self, path: Path, token_ids: Sequence[int]) -> None:
        """Writes the seed as llama.cpp's own sequence file, which stock clients restore.

        Args:
            path: the file.
            token_ids: P ids that label the positions; clients compare them with the start of a prompt.

        Raises:
            InputError: there is no patch, the number of ids is not P, or the file cannot be written.
        """
        if len(token_ids) != self.num_virtual_tokens or not token_ids:
            raise InputError(
                f"expected {self.num_virtual_tokens} token ids, one a virtual token, found {len(token_ids)}"
            )
        self._context.save_state_file(path, self._master, token_ids)

    # Evaluation.

    def _rewind(self, sequence: int, length: int) -> int:
        if length and self._context.truncate(sequence, self.num_virtual_tokens + length):
            return length
        if not self._context.holds(self._master, self.num_virtual_tokens):
            self._restore()
        self._context.fork(self._master, sequence)
        if self._context.last_position(sequence) != self.num_virtual_tokens - 1:
            raise InactivePatchError(
                f"llama.cpp did not start sequence {sequence} from the seed", hint="load the model again"
            )
        return 0

    def num_cached(self, tokens: Sequence[int], sequence: int = 0) -> int:
        shared = super().num_cached(tokens, sequence)
        # Recurrent memory cannot be cut back: it goes on from its end or starts afresh.
        cut = self._model.has_recurrent_memory and shared < len(self.evaluated(sequence))
        return 0 if cut else shared

    def _forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        self._require_seed(sequence)
        return self._context.evaluate(sequence, tokens, every)

    def _forward_rows(self, sequences: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        if self._model.has_recurrent_memory:
            return super()._forward_rows(sequences, tokens)
        for sequence in sequences:
            self._require_seed(sequence)
        return self._context.evaluate_rows(sequences, tokens)

    def _fork(self, source: int, target: int, length: int) -> bool:
        if source == target or self._model.has_recurrent_memory:
            return super()._fork(source, target, length)
        self._context.fork(source, target)
        return self._context.truncate(target, self.num_virtual_tokens + length)

    def _require_seed(self, sequence: int) -> None:
        """The last guard: nothing is evaluated in a sequence whose first P positions are not there.

        Raises:
            InactivePatchError: they are gone, which nothing that a caller can do should bring about.
        """
        length = self._context.last_position(sequence) + 1
        if length < self.num_virtual_tokens or not self._context.holds(sequence, length):
            raise InactivePatchError(
                f"sequence {sequence} holds {length} positions, of which the patch's {self.num_virtual_tokens} are not intact",
                hint="load the model again; please report it",
            )

    # Text.

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, ends=True, trusted=False)

    def encode_chat(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        encode = partial(self._tokenizer.encode, ends=False)
        return encode_chat(
            self._template, messages, self._bos, self._eos, self._added_tokens, encode, tools, self.require_fit
        )

    def _token_bytes(self) -> list[bytes]:
        return [self._piece(i) for i in range(self.spec.vocab_size)]

    def _piece(self, token: int) -> bytes:
        """The bytes of a token; none for a special token."""
        if token not in self._pieces:
            self._pieces[token] = self._read_piece(token)
        return self._pieces[token]

    def _read_piece(self, token: int) -> bytes:
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


def _close_result(made: Future[LlamaModel] | Future[LlamaContext]) -> None:
    """Frees what a thread has made, if it has."""
    if made.done() and not made.cancelled() and made.exception() is None:
        made.result().close()


class _Closed:
    """Stands in for llama.cpp once the model is freed: its functions would read freed memory."""

    def __getattr__(self, name: str) -> Any:
        raise EdgepatchError("the model is closed", hint="load it again")


def _checked_type(kv_type: str, flash_attention: bool) -> str:
    if kv_type not in KV_TYPES:
        raise InputError(f"KV type: expected one of {sorted(KV_TYPES)}, found {kv_type!r}")
    if kv_type.startswith("q") and not flash_attention:
        raise InputError(f"KV type {kv_type} needs flash attention", hint="turn it on or use f16")
    return kv_type


def _checked_route(route: SeedRoute | None) -> SeedRoute | None:
    if route not in (None, "stored", "decoded"):
        raise InputError(f"seed route: expected stored or decoded, found {route!r}")
    return route


def _positions(asked: int | None, trained: int, patch: Patch | None) -> int:
    """Positions of a sequence, the patch's included."""
    taken = patch.num_virtual_tokens if patch else 0
    positions = min(trained, DEFAULT_CONTEXT) if asked is None else asked
    if not taken < positions <= trained:
        raise InputError(
            f"context length: expected {taken + 1} to {trained}, found {positions}", f"the patch takes {taken} of them"
        )
    return positions
