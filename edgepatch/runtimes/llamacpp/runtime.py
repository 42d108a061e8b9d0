"""The llama.cpp runtime: a GGUF model of any quantization, its KV cache seeded with the patch.

One sequence of llama.cpp holds nothing but the seed and never a token of a prompt. Every conversation is a sequence that shares
those cells, so no request can overwrite them, and the seed is in memory once.
"""

from __future__ import annotations

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
from edgepatch.converters.gguf.library import require_gpu, require_installed
from edgepatch.converters.gguf.text import GGUFTokenizer
from edgepatch.converters.gguf.vocabularies import chat_templates
from edgepatch.converters.gguf.vocabulary import TokenFacts, read_token_facts
from edgepatch.converters.origins import naming_origin
from edgepatch.cores import begin_choice, read_allowance
from edgepatch.decoding import defaults
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.runtimes.llamacpp.calibration import Calibration
from edgepatch.runtimes.llamacpp.context import KV_TYPES, Closed, ContextSettings, LlamaContext, LlamaModel
from edgepatch.runtimes.llamacpp.labels import labelled_cells, labelled_state
from edgepatch.runtimes.llamacpp.places import SavedText, SeedPlaces
from edgepatch.runtimes.llamacpp.proof import open_model, prove_model
from edgepatch.runtimes.llamacpp.seeds import SeedStates
from edgepatch.runtimes.patching import why_no_seed_moves
from edgepatch.runtimes.runtime import Runtime, SeedRoute, Tools, check_patch, checked_number, moves
from edgepatch.tensors import ModelSpec
from edgepatch.text.chat_templates import prepare_chat_template
from edgepatch.text.messages import Message
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions, ChatTemplate
from edgepatch.text.tokenizers import AddedTokens, encode_chat
from edgepatch.text.vocabularies import ByteDecoder

DEFAULT_CONTEXT = 4096


class LlamaCppRuntime(Runtime):
    """A GGUF file in llama.cpp.

    Args:
        path: the GGUF file.
        planned: the patch that is installed next; where it does not fit the model or the context, nothing is loaded.
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
        MissingExtraError: llama-cpp-python or gguf is not installed.

    Attributes:
        model: llama.cpp's weights.
        context: its cells, the seed's sequence after those of the conversations.
        header: of the file.
        calibration: what was measured of the model.
        seeds: states of patches, and why one had to be decoded.
    """

    name = "llamacpp"

    def __init__(
        self,
        path: Path,
        planned: Patch | None = None,
        *,
        context_length: int | None = None,
        num_sequences: int = 1,
        kv_type: str = "f16",
        flash_attention: bool = True,
        seed_route: SeedRoute | None = None,
        num_threads: int | None = None,
        num_gpu_layers: int = 0,
    ) -> None:
        self.num_sequences = checked_number(num_sequences)
        threads = begin_choice(num_threads)
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)
        require_installed()
        if num_gpu_layers:
            require_gpu()
        header = read_header(path)
        self.spec = specs.spec_of(header)
        check_patch(planned, self.spec)
        self.kv_type, route = _checked_type(kv_type, flash_attention), _checked_route(seed_route)
        self.num_positions = _positions(context_length, int(header.setting("context_length")), planned)
        self.header, self._fitting = header, set[str]()
        self.sampling_defaults = defaults.of_gguf(header.metadata)
        try:
            settings = self._load(path, header, flash_attention, num_threads, threads, num_gpu_layers)
            self.calibration = self.proofs = Calibration(self.model, header, self.spec, settings)
            self.seeds = SeedStates(self.context, self.calibration, self._master, route)
            self.places = SeedPlaces(self.context, self.num_sequences)
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
    ) -> ContextSettings:
        # The seed's cells are shared; one more sequence holds them while no conversation does. A seed that moves is there once more
        # for each conversation that has left the start, and llama.cpp takes it in before it is shared.
        num_cells = self.num_positions * self.num_sequences + _spare_cells(self.spec)
        self._master = self.num_sequences
        num_sequences = SeedPlaces.sequences_for(self.num_sequences)
        # A trial takes as many threads as there may ever be, so that a free core more does not ask for another.
        most = num_threads or read_allowance().usable
        settings = ContextSettings(num_cells, num_sequences, self.kv_type, flash_attention, most)
        templates = chat_templates(header.metadata)
        # A child tries the file, or llama.cpp reads its weights and then clears the cache in a thread; template and vocabulary
        # are prepared meanwhile. The child is waited for here: Ctrl-C, which reaches the main thread, must end it.
        with ThreadPoolExecutor(2) as library:
            preparing = library.submit(prepare_chat_template, templates.get("default", ""))
            proof = prove_model(path, num_gpu_layers, settings)
            loading = library.submit(open_model, proof, num_gpu_layers, settings)
            self._resources.callback(_close_result, loading)
            preparing.result()
            self.model = loading.result()
            self.notes = self.model.notes
            self.is_cuttable = self.is_forkable = not self.model.has_recurrent_memory
            self.num_threads = threads()
            settings = replace(settings, num_threads=self.num_threads)
            creating = library.submit(LlamaContext, self.model, settings)
            self._resources.callback(_close_result, creating)
            self._tokenizer = GGUFTokenizer(self.model.lib, self.model.vocab, header)
            self._pieces = TokenPieces(self.model.lib, self.model.vocab)
            for readers in (self._tokenizer, self._pieces):  # closed before the model is freed
                self._resources.callback(readers.close)
            self.text_bound = self._tokenizer.bound
            facts = _token_facts(self.model, path, self.spec.vocab_size)
            self.end_token_ids, self.special_tokens = facts.end_token_ids, facts.special_ids
            self._added_tokens = AddedTokens(facts.special, facts.user_defined)
            named = (templates.get("default", ""), templates.get("tool_use", ""))
            self.chat_template = ChatTemplate(*named, facts.bos, facts.eos, facts.ends)
            self.context = creating.result()
        self.quantization = specs.quantization(header)
        return settings

    def check_weights(self, patch: Patch) -> None:
        if patch.weight_sketch is not None and patch.digest not in self._fitting:
            sketch = weight_sketches.sketch_of_gguf(self.header, patch.weight_sketch)
            with naming_origin(self.header):
                compare(patch.weight_sketch, sketch, self.quantization)
            self._fitting.add(patch.digest)

    # The seed.

    def install(self, patch: Patch | None) -> SeedRoute:
        self.patch = patch
        self.places.num_virtual_tokens, self.places.state_at = self.num_virtual_tokens, None
        route: SeedRoute = ""
        if patch is not None:
            route = self.seeds.state_of(patch)[1]
            if moves(patch):
                _require_spare_cells(patch, self.spec)
                self.places.state_at = self.seeds.mover_of(patch, self.places.loading)
        self.restore_seed()
        for sequence in range(self.num_sequences):
            self.places.start(sequence)
        return route

    def restore_seed(self) -> None:
        """Starts the cache afresh with nothing but the seed in it."""
        self.context.clear()
        if self.patch is not None:
            self.context.restore(self._master, self.seeds.state_of(self.patch)[0])
        if not self.context.holds(self._master, self.num_virtual_tokens):
            raise InactivePatchError(
                f"llama.cpp's cache does not hold the {self.num_virtual_tokens} positions of the seed"
            )

    def seed_state(self) -> bytes:
        """llama.cpp's own state of the seeded positions; meaningless to another build or another setting of the cache."""
        return self.context.state(self._master)

    def save_seed_file(self, path: Path, token: int, is_session: bool = False) -> None:
        """Writes the seed as llama.cpp's own file, which stock clients restore; all conversations must start afresh.

        The file is that of one token with the seed in front of it: what clients compare with the start of a prompt is this token alone.

        Args:
            path: the file.
            token: id of the first token of every prompt.
            is_session: the file is of a whole context, and not of one sequence.

        Raises:
            InputError: there is no patch, keys of this model do not turn with their place, or the file cannot be written.
            InactivePatchError: how this model orders its keys was not confirmed.
        """
        if self.patch is None:
            raise InputError("expected a patch, found the bare model")
        _require_turning(self)
        if self.patch.kv_seed is None:
            raise InputError(
                f"{self.patch.name} {self.patch.version} has no stored seed, which a slot file is made of",
                hint="add it with `edgepatch convert seed`, or use `edgepatch serve`",
            )
        layout = self.seeds.layout_of(self.patch)
        if layout is None:
            raise InactivePatchError(
                f"the seed of {self.patch.name} {self.patch.version} cannot be turned: {self.seeds.reason or 'its layout is not confirmed'}",
                hint="use `edgepatch serve`, which needs no slot file",
            )
        cells = labelled_cells(self.context, self.calibration.num_rotated, self.patch, layout, token)
        sequence = 0  # of a context with one
        try:
            self.context.restore(sequence, labelled_state(self.context, sequence, cells, layout, token))
            self.context.save_state_file(path, None if is_session else sequence, [token])
        finally:
            self.restore_seed()

    # Evaluation.

    def rewind(self, sequence: int, length: int) -> int:
        if length and self.places.cut(sequence, length):
            return length
        if not self.context.holds(self._master, self.num_virtual_tokens):
            self.restore_seed()
        self.places.start(sequence)
        return 0

    def place_seed(self, sequences: Sequence[int], anchors: Sequence[int]) -> None:
        self.places.move(sequences, anchors)

    def forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        self.places.require_seed(sequence)
        return self.context.evaluate(sequence, tokens, every)

    def forward_rows(self, sequences: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        if self.model.has_recurrent_memory:
            return super().forward_rows(sequences, tokens)
        for sequence in sequences:
            self.places.require_seed(sequence)
        return self.context.evaluate_rows(sequences, tokens)

    def fork(self, source: int, target: int, length: int) -> bool:
        if source == target or self.model.has_recurrent_memory:
            return super().fork(source, target, length)
        return self.places.fork(source, target, length)

    def save_state(self, sequence: int) -> SavedText:
        return self.places.save(sequence)

    def restore_state(self, sequence: int, state: SavedText) -> None:
        self.places.restore(sequence, state)

    # Text.

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, ends=True, trusted=False)

    def encode_probe(self, text: str, *, trusted: bool) -> list[int]:
        return self._tokenizer.encode(text, ends=True, trusted=trusted)

    def encode_chat(
        self, messages: Sequence[Message], tools: Tools | None = None, options: ChatOptions = PLAIN_CHAT
    ) -> list[int]:
        encode = partial(self._tokenizer.encode, ends=False)
        return encode_chat(self.chat_template, messages, self._added_tokens, encode, tools, self.require_fit, options)

    def token_bytes(self) -> list[bytes]:
        return [self._pieces.bytes_of(i) for i in range(self.spec.vocab_size)]

    def new_decoder(self) -> Callable[[int], str]:
        return ByteDecoder(self._pieces.bytes_of)

    def close(self) -> None:
        """Frees the model; may be called more than once."""
        self._resources.close()


def _close_result(future: Future[LlamaModel] | Future[LlamaContext]) -> None:
    """Frees what a thread has opened, if it has."""
    if future.done() and not future.cancelled() and future.exception() is None:
        future.result().close()


class TokenPieces:
    """The bytes of each token, read once.

    Args:
        lib: ``gguf.library.load_library()``.
        vocab: llama.cpp's pointer; ``close`` must be called before it is freed.
    """

    def __init__(self, lib: Any, vocab: Any) -> None:
        self._lib, self._vocab = lib, vocab
        self._pieces: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """None for a special token.

        Raises:
            EdgepatchError: the model is closed.
        """
        if token not in self._pieces:
            self._pieces[token] = self._read(token)
        return self._pieces[token]

    def _read(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def close(self) -> None:
        """Lets no more tokens be read."""
        self._lib = Closed()


SPARE_CELLS = 256
"""Virtual tokens of a patch whose seed moves, at most."""


def _spare_cells(spec: ModelSpec) -> int:
    """None where llama.cpp chooses between frequencies by the number of cells: there no seed moves."""
    return 0 if spec.rope_scaling.get("rope_type") == "longrope" else SPARE_CELLS


def _require_spare_cells(patch: Patch, spec: ModelSpec) -> None:
    if patch.num_virtual_tokens > _spare_cells(spec):
        raise InputError(
            f"{patch.name} {patch.version}: a seed that moves may have at most {_spare_cells(spec)} virtual tokens here, "
            f"found {patch.num_virtual_tokens}",
            hint="leave it at the start of the text by word: --pinned",
        )


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


def _require_turning(runtime: LlamaCppRuntime) -> None:
    """Refuses a model whose seeds cannot stand in front of the first position."""
    reason = why_no_seed_moves(runtime)
    if runtime.model.has_no_rotary_positions():
        reason = "its positions are not rotary"
    if reason:
        raise InputError(
            f"{runtime.model.path.name}: no seed can stand under one label: {reason}",
            hint="use `edgepatch serve`, which needs no slot file",
        )


def _token_facts(model: LlamaModel, path: Path, vocab_size: int) -> TokenFacts:
    """What llama.cpp says of the tokens.

    Raises:
        InputError: they are more or fewer than the model has.
    """
    facts = read_token_facts(model.lib, model.vocab)
    if facts.size != vocab_size:
        raise InputError(f"{path}: expected {vocab_size} tokens, found {facts.size}", hint="download it again")
    return facts
