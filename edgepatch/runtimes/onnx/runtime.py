"""The ONNX runtime: plain onnxruntime on a decoder graph made by onnxruntime-genai's builder, optimum or Transformers.

The seed is the first P positions of the graph's past. Which graph takes its past how is known to ``converters.onnx.graphs``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.onnx.files import open_folder
from edgepatch.converters.onnx.graphs import DecoderGraph, recognise
from edgepatch.converters.onnx.identity import read_identity
from edgepatch.converters.onnx.sessions import open_session, prove_session
from edgepatch.converters.onnx.weights import sketch_of_onnx
from edgepatch.cores import begin_choice, read_allowance
from edgepatch.decoding import defaults
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.runtimes.onnx.caches import Cache, Cells, SharedCache, new_cache
from edgepatch.runtimes.onnx.proof import TRIAL
from edgepatch.runtimes.runtime import Evaluate, Runtime, SeedRoute, Tools, checked_number, moves
from edgepatch.tensors import KVSeed, ModelSpec, as_float32
from edgepatch.text.messages import Message
from edgepatch.text.templates import PLAIN_CHAT, ChatOptions
from edgepatch.text.tokenizers import FolderTokenizer

DEFAULT_POSITIONS = 2048  # as far as a model can; shared buffers for them are allocated at once
PREFILL_TOKENS = 256  # a chunk: the graph gives logits of all its positions, V * 4 bytes each
BATCH_ROWS = 16
GENAI_CONFIG = "genai_config.json"


class OnnxRuntime(Runtime):
    """An ONNX folder.

    Args:
        folder: model, tokenizer and settings; see ``edgepatch convert base --to onnx`` and ``edgepatch convert stamp``.
        planned: the patch that is installed next; where it has no KV seed, nothing is opened.
        context_length: positions, the patch's included; by default the model's own length, at most 2048.
        num_threads: of a forward pass; by default one for each core that is free at the start.
        provider: "cpu" or "cuda".
        num_sequences: conversations held at once.
        model_file: of several graphs in the folder the one to take ("onnx/model_q4.onnx").

    Raises:
        InputError: the folder is incomplete, damaged, of unknown origin or holds links; or the patch has no KV seed.
    """

    name = "onnx"
    max_batch_rows = BATCH_ROWS

    def __init__(
        self,
        folder: Path,
        planned: Patch | None = None,
        *,
        context_length: int | None = None,
        num_threads: int | None = None,
        provider: str = "cpu",
        num_sequences: int = 1,
        model_file: str | None = None,
    ) -> None:
        self.num_sequences = checked_number(num_sequences)
        _require_seed(planned)
        threads = begin_choice(num_threads)
        file = open_folder(folder, model_file)
        with ThreadPoolExecutor(2) as library:  # a child tries the graph, or onnxruntime packs its weights, meanwhile
            reading = library.submit(FolderTokenizer, folder)
            most = num_threads or read_allowance().usable
            proof = prove_session(file, num_threads=most, provider=provider, trial=TRIAL)
            self.num_threads = threads()
            opening = library.submit(open_session, proof, self.num_threads)
            self._tokenizer = reading.result()
            session = opening.result()
        metadata = session.get_modelmeta().custom_metadata_map
        self.spec, self.quantization = read_identity(folder, file, metadata)
        self._graph = recognise(session, file, self.spec)
        self.has_ragged_batches = self._graph.takes_ragged_rows
        self.kv_type = "f16" if self._graph.cache_type is np.float16 else "f32"
        _require_tokenizer(self._tokenizer, folder, self.spec)
        self.end_token_ids, self.text_bound = self._tokenizer.end_token_ids, self._tokenizer.bound
        self.chat_template, self.special_tokens = self._tokenizer.template, self._tokenizer.special_tokens
        self.sampling_defaults = defaults.of_folder(folder)
        self.num_positions = _positions(folder, self._graph, context_length)
        window = _window(folder) if self._graph.windows else 0
        self._new_cache = partial(new_cache, session, self._graph, self.spec, window, provider)
        self._caches = [self._new_cache(positions=self.num_positions) for _ in range(num_sequences)]
        self._is_proven = False
        self._folder, self._model_file, self._fitting = folder, model_file, set[str]()
        self._start = 0
        self._anchors = [0] * num_sequences

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_probe(self, text: str, *, trusted: bool) -> list[int]:
        return self._tokenizer.encode(text, trusted=trusted)

    def encode_chat(
        self, messages: Sequence[Message], tools: Tools | None = None, options: ChatOptions = PLAIN_CHAT
    ) -> list[int]:
        return self._tokenizer.encode_chat(messages, tools, self.require_fit, options, self.chat_template)

    def new_decoder(self) -> Callable[[int], str]:
        return self._tokenizer.new_decoder()

    def token_bytes(self) -> list[bytes]:
        return self._tokenizer.token_bytes(self.spec.vocab_size)

    def check_weights(self, patch: Patch) -> None:
        # Only the builder's graphs name their matrices; of others the stamp and the canary must tell.
        if patch.weight_sketch is not None and self._graph.shared and patch.digest not in self._fitting:
            compare(
                patch.weight_sketch,
                sketch_of_onnx(self._folder, patch.weight_sketch, self._model_file),
                self.quantization,
            )
            self._fitting.add(patch.digest)

    def install(self, patch: Patch | None) -> SeedRoute:
        self.patch = patch
        seed = _require_seed(patch)
        if moves(patch) and self._graph.windows:
            raise InputError(
                f"{self._folder}: its layers with a sliding window count cells, so a seed that moves would be invisible to them behind the window",
                hint="run the GGUF file of this model, or leave the seed at the start of the text by word: --pinned",
            )
        cells = _as_cells(seed, self._graph)
        self._start = seed.num_virtual_tokens if seed else 0
        for cache in self._caches:
            cache.fill([cells])
        self._anchors = [0] * self.num_sequences
        if not self._is_proven:
            self._prove_active(cells)
            self._is_proven = True
        return "stored" if seed else ""

    def rewind(self, sequence: int, length: int) -> int:
        self._caches[sequence].cut(self._start + length)
        if not length:
            self.place_seed([sequence], [0])
        return length

    def place_seed(self, sequences: Sequence[int], anchors: Sequence[int]) -> None:
        for sequence, anchor in zip(sequences, anchors, strict=True):
            if self._anchors[sequence] != anchor:
                self._caches[sequence].put_keys(0, self._keys_at(anchor))
                self._anchors[sequence] = anchor

    def _keys_at(self, anchor: int) -> list[NDArray[Any]]:
        """L keys (K, P, H) of the seed in front of text position ``anchor``, in the cache's element type."""
        patch = self.patch
        assert patch is not None and patch.kv_seed is not None  # the session moves such patches alone
        if not anchor:
            return [key.astype(self._graph.cache_type) for key in patch.kv_seed.keys]
        assert patch.rotation is not None  # so it moves
        turned = (patch.rotation.turned(key, layer, anchor) for layer, key in enumerate(patch.kv_seed.keys))
        return [key.astype(self._graph.cache_type) for key in turned]

    def forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        parts = []
        for first in range(0, len(tokens), PREFILL_TOKENS):
            chunk = np.array([tokens[first : first + PREFILL_TOKENS]], dtype=np.int64)  # (1, T)
            logits = self._caches[sequence].evaluate(chunk)[0]  # (T, V)
            parts.append(as_float32(logits if every else logits[-1]))
        return np.concatenate(parts) if every else parts[-1]

    def _prove_active(self, seed: Sequence[Cells]) -> None:
        """One forward pass: it must leave the seed bit for bit and write its own cell right behind it."""
        cache = self._caches[0]
        if isinstance(cache, SharedCache):
            cache.spoil()
        self.forward(0, [0], every=False)
        cells = cache.cells(self._start + 1)
        if any(
            tensor.shape[1] != self._start + 1 or np.isnan(tensor[:, -1]).any() for layer in cells for tensor in layer
        ):
            raise InactivePatchError(
                "the graph does not write to the cache that it reads",
                hint="update onnxruntime, or convert the model again",
            )
        for layer, (held, put) in enumerate(zip(cells, seed, strict=bool(seed))):
            if any(not np.array_equal(h[:, :-1], s) for h, s in zip(held, put, strict=True)):
                raise InactivePatchError(f"layer {layer}: the seed is not in the model's cache after a forward pass")
        self.rewind(0, 0)

    def open_batch(
        self, prompts: Sequence[list[int]], length: int, evaluate: Evaluate
    ) -> tuple[OnnxBatch, list[NDArray[np.float32]]]:
        """Evaluates each prompt by itself, as GroupQueryAttention demands, and copies its cells into a row."""
        logits, rows = [], []
        for tokens in prompts:
            logits.append(evaluate(tokens))
            rows.append(self._cells(0, self._start + len(tokens)))
        cache = self._new_cache(positions=self._start + length, rows=len(prompts))
        cache.fill(rows)
        return OnnxBatch(cache, len(prompts), self._keys_at), logits

    def save_state(self, sequence: int) -> tuple[int, list[Cells]]:
        """Where the seed stands, and per layer copies of key and value, each (K, N, H)."""
        return self._anchors[sequence], self._cells(sequence, int(self._caches[sequence].lengths[0]))

    def restore_state(self, sequence: int, state: tuple[int, Sequence[Cells]]) -> None:
        self._anchors[sequence], cells = state
        self._caches[sequence].fill([cells])

    def _cells(self, sequence: int, length: int) -> list[Cells]:
        return [(key.copy(), value.copy()) for key, value in self._caches[sequence].cells(length)]

    def close(self) -> None:
        for name in ("_caches", "_new_cache"):  # both hold the session
            vars(self).pop(name, None)


class OnnxBatch:
    """Rows of one cache.

    Args:
        cache: holds the prompts.
        num_rows: B.
        keys_at: L keys (K, P, H) of the seed in front of a text position.
    """

    def __init__(self, cache: Cache, num_rows: int, keys_at: Callable[[int], list[NDArray[Any]]]) -> None:
        self.num_rows, self._cache, self._keys_at = num_rows, cache, keys_at

    def place_seed(self, row: int, anchor: int) -> None:
        """As a runtime's, in one row."""
        self._cache.put_keys(row, self._keys_at(anchor))

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, V) behind (B, 1) tokens."""
        return as_float32(self._cache.evaluate(tokens)[:, 0])


def _require_seed(patch: Patch | None) -> KVSeed | None:
    """The seed of a patch.

    Raises:
        InputError: it has none. A decoder graph takes token ids, so it cannot evaluate a soft prompt.
    """
    if patch is None:
        return None
    if patch.kv_seed is None:
        raise InputError(
            f"patch {patch.name} {patch.version} holds a soft prompt but no KV seed, which ONNX needs",
            hint="add the seed first: edgepatch convert seed",
        )
    return patch.kv_seed


def _as_cells(seed: KVSeed | None, graph: DecoderGraph) -> list[Cells]:
    """The seed in the cache's element type; a patch holds no value beyond float16."""
    layers = list(zip(seed.keys, seed.values, strict=True)) if seed else []
    return [(key.astype(graph.cache_type), value.astype(graph.cache_type)) for key, value in layers]


def _require_tokenizer(tokenizer: FolderTokenizer, folder: Path, spec: ModelSpec) -> None:
    if tokenizer.digest != spec.tokenizer_digest:
        raise InputError(
            f"{folder}: the tokenizer is not the one the model was converted with", hint="convert the model again"
        )


def _setting(folder: Path, name: str, *keys: str) -> int:
    """A number in one of a folder's settings files."""
    path = folder / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        value = value.get("text_config", value) if name == "config.json" else value
        for key in keys:
            value = value[key]
        return int(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is missing or damaged: {error}", hint="convert the model again") from error


def _window(folder: Path) -> int:
    """Width of the sliding window, for graphs that carry it through their memory."""
    return _setting(folder, "config.json", "sliding_window")


def _positions(folder: Path, graph: DecoderGraph, asked: int | None) -> int:
    """M, the patch's positions included."""
    if graph.shared:
        trained = _setting(folder, GENAI_CONFIG, "model", "context_length")
    else:
        trained = _setting(folder, "config.json", "max_position_embeddings")
    positions = min(trained, DEFAULT_POSITIONS) if asked is None else asked
    if not 0 < positions <= trained:
        raise InputError(
            f"context length: expected 1 to {trained}, found {positions}",
            hint="leave it out, or name a length in between",
        )
    return positions
