"""The ONNX runtime: plain onnxruntime on a decoder graph made by onnxruntime-genai's builder, optimum or Transformers.

The seed is the first P positions of the graph's past. Which graph takes its past how is known to ``converters.onnx.graphs``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.onnx.files import open_folder
from edgepatch.converters.onnx.graphs import DecoderGraph, recognise
from edgepatch.converters.onnx.identity import read_identity
from edgepatch.converters.onnx.sessions import open_session, prove_session
from edgepatch.converters.onnx.weights import sketch_of_onnx
from edgepatch.cores import begin_choice, read_allowance
from edgepatch.decoding.replies import drain
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.patch.sketches import compare
from edgepatch.runtimes.base import Message, Prompt, Runtime, SeedRoute, Tools, as_float32, require_text_only
from edgepatch.runtimes.onnx.caches import Cache, Cells, SharedCache, new_cache
from edgepatch.runtimes.onnx.proof import TRIAL
from edgepatch.tensors import KVSeed, ModelSpec
from edgepatch.text.tokenizers import FolderTokenizer

DEFAULT_POSITIONS = 2048  # as far as a model can; shared buffers for them are allocated at once
PREFILL_TOKENS = 256  # a chunk: the graph gives logits of all its positions, V * 4 bytes each
BATCH_ROWS = 16
GENAI_CONFIG = "genai_config.json"


class OnnxRuntime(Runtime):
    """An ONNX folder, seeded with the patch.

    Args:
        folder: model, tokenizer and settings; see ``edgepatch convert base --to onnx`` and ``edgepatch convert stamp``.
        patch: ``None`` for the bare model.
        context_length: positions, the patch's included; by default the model's own length, at most 2048.
        num_threads: of a forward pass; by default one for each core that is free at the start.
        provider: "cpu" or "cuda".
        num_sequences: conversations held at once.
        model_file: of several graphs in the folder the one to take ("onnx/model_q4.onnx").

    Raises:
        InputError: the folder is incomplete, damaged, of unknown origin or holds links; or the patch has no KV seed.
        MismatchError: the patch was made for another model.
        InactivePatchError: the first forward pass damaged the seed.
    """

    name = "onnx"

    def __init__(
        self,
        folder: Path,
        patch: Patch | None = None,
        *,
        context_length: int | None = None,
        num_threads: int | None = None,
        provider: str = "cpu",
        num_sequences: int = 1,
        model_file: str | None = None,
    ) -> None:
        super().__init__(num_sequences)
        _require_seed(patch)
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
        self.kv_type = "f16" if self._graph.cache_type is np.float16 else "f32"
        _require_tokenizer(self._tokenizer, folder, self.spec)
        self.end_token_ids, self.text_bound = self._tokenizer.end_token_ids, self._tokenizer.bound
        self.num_positions = _positions(folder, self._graph, context_length)
        window = _window(folder) if self._graph.windows else 0
        self._new_cache = partial(new_cache, session, self._graph, self.spec, window, provider)
        self._caches = [self._new_cache(positions=self.num_positions) for _ in range(num_sequences)]
        self._is_proven = False
        self._folder, self._model_file, self._fitting = folder, model_file, set[str]()
        self._start = 0
        self._load_patch(patch)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
        return self._tokenizer.encode_chat(messages, tools, self.require_fit)

    def _new_decoder(self) -> Callable[[int], str]:
        return self._tokenizer.new_decoder()

    def _token_bytes(self) -> list[bytes]:
        return self._tokenizer.token_bytes(self.spec.vocab_size)

    def _check_weights(self, patch: Patch) -> None:
        # Only the builder's graphs name their matrices; of others the stamp and the canary must tell.
        if patch.weight_sketch is not None and self._graph.shared and patch.digest not in self._fitting:
            compare(
                patch.weight_sketch,
                sketch_of_onnx(self._folder, patch.weight_sketch, self._model_file),
                self.quantization,
            )
            self._fitting.add(patch.digest)

    def _install(self, patch: Patch | None) -> SeedRoute:
        seed = _require_seed(patch)
        cells = _as_cells(seed, self._graph)
        self._start = seed.num_virtual_tokens if seed else 0
        for cache in self._caches:
            cache.fill([cells])
        if not self._is_proven:
            self._prove_active(cells)
            self._is_proven = True
        return "stored" if seed else ""

    def _rewind(self, sequence: int, length: int) -> int:
        self._caches[sequence].cut(self._start + length)
        return length

    def _forward(self, sequence: int, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
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
        self._forward(0, [0], every=False)
        cells = cache.cells(self._start + 1)
        if any(
            tensor.shape[1] != self._start + 1 or np.isnan(tensor[:, -1]).any() for layer in cells for tensor in layer
        ):
            raise InactivePatchError(
                "the graph does not write to the cache that it reads",
                hint="update onnxruntime, or convert the model again",
            )
        for layer, (found, put) in enumerate(zip(cells, seed, strict=bool(seed))):
            if any(not np.array_equal(f[:, :-1], s) for f, s in zip(found, put, strict=True)):
                raise InactivePatchError(f"layer {layer}: the seed is not in the model's cache after a forward pass")
        self.reset()

    # Several continuations at once.

    def generate_many(self, prompt: Prompt, sampling: Sampling, count: int) -> list[str]:
        """As the base class, with up to 16 continuations evaluated as one batch."""
        if sampling.rng_seed is None or count < 2:
            return super().generate_many(prompt, sampling, count)
        tokens, first = self.tokens(prompt), sampling.rng_seed
        return self._continue([tokens] * count, [replace(sampling, rng_seed=first + i) for i in range(count)])

    def generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """A continuation of each prompt, the same as ``generate`` gives, with up to 16 evaluated as one batch."""
        return self._continue([self.tokens(prompt) for prompt in prompts], [sampling] * len(prompts))

    def _continue(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> list[str]:
        """Continuations in order of the prompts; what cannot share a batch runs alone."""
        for sampling in samplings:
            require_text_only(sampling)
        texts = [""] * len(prompts)
        together: list[int] = []
        for i, (tokens, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            if len(tokens) + sampling.max_new_tokens <= self.context_length + 1:
                together.append(i)
            else:
                texts[i] = self.generate(tokens, sampling)
        for rows in self._batches(together, prompts):
            found = self._continue_together([prompts[i] for i in rows], [samplings[i] for i in rows])
            for i, text in zip(rows, found, strict=True):
                texts[i] = text
        return texts

    def _batches(self, rows: Sequence[int], prompts: Sequence[list[int]]) -> Iterable[Sequence[int]]:
        """Rows of a batch, by length where the graph takes no rows of different lengths."""
        by_length = sorted(rows, key=lambda i: len(prompts[i]))
        lengths = [0 if self._graph.takes_ragged_rows else len(prompts[i]) for i in by_length]
        first = 0
        for end in range(1, len(by_length) + 1):
            if end == len(by_length) or end - first == BATCH_ROWS or lengths[end] != lengths[first]:
                yield by_length[first:end]
                first = end

    def _continue_together(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> list[str]:
        """Evaluates each prompt by itself, as GroupQueryAttention demands, and then a token of each row at a time."""
        logits, rows = [], []
        for tokens in prompts:
            logits.append(self._evaluate(tokens)[-1])
            cells = self._caches[0].cells(self._start + len(tokens))
            rows.append([(key.copy(), value.copy()) for key, value in cells])
        longest = max(
            len(tokens) + sampling.max_new_tokens for tokens, sampling in zip(prompts, samplings, strict=True)
        )
        batch: Cache = self._new_cache(positions=self._start + longest, rows=len(prompts))
        batch.fill(rows)
        replies = [self._new_reply(sampling, tokens) for sampling, tokens in zip(samplings, prompts, strict=True)]
        return drain(replies, logits, lambda drawn: as_float32(batch.evaluate(drawn)[:, 0]))

    def close(self) -> None:
        for name in ("_caches", "_new_cache"):  # both hold the session
            vars(self).pop(name, None)


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
