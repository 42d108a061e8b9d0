"""The ONNX runtime: plain onnxruntime on a folder that ``converters.onnx.export`` wrote.

The graph's attention (GroupQueryAttention) reads and writes one buffer per layer and kind in place. The seed is copied to the
first P positions once; the attention mask's length alone says how much of the rest counts, so rewinding costs nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.onnx import CONFIG_FILE, MODEL_FILE, QUANTIZATION_KEY, QUANTIZATIONS, SPEC_KEY
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError, MissingExtraError, PatchFormatError
from edgepatch.patches import Patch
from edgepatch.runtimes.base import Message, Prompt, Runtime, as_float32, check_patch
from edgepatch.sampling import Sampling
from edgepatch.tensors import ModelSpec
from edgepatch.tokenizers import FolderTokenizer

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ELEMENT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
DEFAULT_POSITIONS = 2048  # as far as a model can; the buffers for them are allocated at once
PREFILL_TOKENS = 256  # a chunk: the graph gives logits of all its positions, V * 4 bytes each
BATCH_ROWS = 16

Cells = tuple[NDArray[Any], NDArray[Any]]  # a layer's key and value, each (K, N, H)


class OnnxRuntime(Runtime):
    """An ONNX folder made by ``edgepatch convert base --to onnx``, seeded with the patch.

    Args:
        folder: model, tokenizer and settings.
        patch: ``None`` for the bare model.
        context_length: positions, the patch's included; by default the model's own length, at most 2048.
        num_threads: threads of one forward pass; by default one for each core.
        provider: "cpu" or "cuda".

    Raises:
        InputError: the folder is incomplete, damaged, not made by edgepatch or holds links; or the patch has no KV seed.
        MismatchError: the patch was made for another model.
        InactivePatchError: the first forward pass damaged the seed.
    """

    name = "onnx"

    def __init__(
        self, folder: Path, patch: Patch | None = None, *,
        context_length: int | None = None, num_threads: int | None = None, provider: str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__()
        if patch is not None and patch.kv_seed is None:
            raise InputError(
                f"patch {patch.name} {patch.version} holds a soft prompt but no KV seed, which ONNX needs",
                hint="add the seed first: edgepatch convert seed",
            )
        _refuse_links(folder)
        session = _open_session(folder / MODEL_FILE, num_threads, provider)
        self.spec, self.quantization = _read_metadata(session, folder)
        _require_seedable(session, self.spec, folder)
        check_patch(patch, self.spec)
        self.patch = patch
        self.seed_route = "stored" if patch else ""
        self._tokenizer = _read_tokenizer(folder, self.spec)
        self.end_token_ids = self._tokenizer.end_token_ids
        self._start = patch.num_virtual_tokens if patch else 0
        self._length = 0
        positions = _positions(folder, self._start, context_length)
        self.context_length = positions - self._start
        seed = patch.kv_seed if patch else None
        self._seed: list[Cells] = list(zip(seed.keys, seed.values, strict=True)) if seed else []
        self._new_graph = partial(_SharedCacheGraph, session, self.spec, provider=provider)
        self._graph = self._new_graph(rows=1, positions=positions, cells=self._seed)
        self._prove_active()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode_chat(messages)

    def _new_decoder(self) -> Callable[[int], str]:
        return self._tokenizer.new_decoder()

    def _rewind(self, length: int) -> int:
        self._length = length
        return length

    def _forward(self, tokens: Sequence[int], every: bool) -> NDArray[np.float32]:
        parts = []
        for first in range(0, len(tokens), PREFILL_TOKENS):
            chunk = np.array([tokens[first : first + PREFILL_TOKENS]], dtype=np.int64)  # (1, T)
            logits = self._graph.run(chunk, self._start + self._length)[0]  # (T, V)
            self._length += chunk.shape[1]
            parts.append(as_float32(logits if every else logits[-1]))
        return np.concatenate(parts) if every else parts[-1]

    def _prove_active(self) -> None:
        """One forward pass: it must leave the seed bit for bit and write its own cell right behind it."""
        self._forward([0], every=False)
        cells = self._graph.cells(self._start + 1)
        if any(np.isnan(tensor[:, -1]).any() for layer in cells for tensor in layer):
            raise InactivePatchError(
                "the graph does not write to the cache that it reads",
                hint="update onnxruntime, or convert the model again",
            )
        for layer, (found, seed) in enumerate(zip(cells, self._seed, strict=bool(self._seed))):
            if any(not np.array_equal(f[:, :-1], s.astype(f.dtype)) for f, s in zip(found, seed, strict=True)):
                raise InactivePatchError(f"layer {layer}: the seed is not in the model's cache after a forward pass")
        self.reset()

    def generate_many(self, prompt: Prompt, sampling: Sampling, count: int) -> list[str]:
        """As the base class, with up to 16 continuations evaluated as one batch."""
        if sampling.rng_seed is None or count < 2:
            return super().generate_many(prompt, sampling, count)
        tokens = self.tokens(prompt)
        logits = self._evaluate(tokens)[-1]
        seeds = range(sampling.rng_seed, sampling.rng_seed + count)
        groups = [seeds[i : i + BATCH_ROWS] for i in range(0, count, BATCH_ROWS)]
        return [text for group in groups for text in self._continue_together(tokens, logits, sampling, group)]

    def _continue_together(
        self, tokens: list[int], logits: NDArray[np.float32], sampling: Sampling, rng_seeds: Sequence[int]
    ) -> list[str]:
        """Continuations of an evaluated prompt, one row each."""
        room = min(sampling.max_new_tokens, self.context_length - len(tokens) + 1)
        filled = self._start + self._length
        graph = self._new_graph(rows=len(rng_seeds), positions=filled + room, cells=self._graph.cells(filled))
        positions = itertools.count(filled)

        def step(drawn: NDArray[np.int64]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = graph.run(drawn, next(positions))[:, 0]
            return logits

        return self._continue_rows(logits, rng_seeds, sampling, room, step)

    def close(self) -> None:
        for name in ("_graph", "_new_graph"):  # both hold the session
            vars(self).pop(name, None)


class _SharedCacheGraph:
    """A GroupQueryAttention graph bound to its cache: per layer and kind one (B, K, M, H) buffer, both past and present.

    Args:
        session: of a graph that ``_require_seedable`` has recognised.
        spec: K, H, L and V.
        rows: B.
        positions: M, the patch's own included.
        provider: "cpu" or "cuda".
        cells: per layer a key and a value (K, N, H) for the first N positions of every row; keys after RoPE, rotate-half order.
    """

    def __init__(
        self, session: Any, spec: ModelSpec, rows: int, positions: int, provider: str, cells: Sequence[Cells]
    ) -> None:
        from onnxruntime import OrtValue

        self._session, self._vocab_size, self._provider = session, spec.vocab_size, provider
        self._dtype = ELEMENT_TYPES[session.get_outputs()[0].type]
        self._binding = session.io_binding()
        self._mask = np.ones((rows, positions), dtype=np.int64)
        self._step_logits = np.empty((rows, 1, spec.vocab_size), dtype=self._dtype)
        shape = (rows, spec.num_key_value_heads, positions, spec.head_dim)
        self._buffers = []
        for layer in range(spec.num_hidden_layers):
            for kind, name in enumerate(("key", "value")):
                array = np.zeros(shape, dtype=self._dtype)
                filled = cells[layer][kind].shape[1] if cells else 0
                if cells:
                    array[:, :, :filled] = cells[layer][kind]
                array[:, :, filled] = np.nan  # stays only if the graph does not write to this buffer
                value = OrtValue.ortvalue_from_numpy(array, provider, 0)  # on the CPU the array's own memory
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{name}", value)
                self._binding.bind_ortvalue_output(f"present.{layer}.{name}", value)
                self._buffers.append((array, value))

    def run(self, tokens: NDArray[np.int64], start: int) -> NDArray[Any]:
        """Evaluates tokens at positions ``start``, ``start + 1``, ... behind what the cache holds before them.

        Args:
            tokens: (B, T); T must be 1 when B > 1.
            start: the position of the first, the same in every row.

        Returns:
            (B, T, V) logits; the memory is used again by the next call with T = 1.
        """
        rows, length = tokens.shape
        logits = self._step_logits if length == 1 else np.empty((rows, length, self._vocab_size), dtype=self._dtype)
        mask = self._mask[:, : start + length] if rows == 1 else self._mask.reshape(-1)[: rows * (start + length)]
        for name, array, shape in (
            ("input_ids", tokens, tokens.shape),
            ("attention_mask", mask, (rows, start + length)),
        ):
            self._binding.bind_input(name, "cpu", 0, np.int64, list(shape), array.ctypes.data)
        self._binding.bind_output("logits", "cpu", 0, self._dtype, list(logits.shape), logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's errors derive from Exception alone
            raise EdgepatchError(
                f"onnxruntime failed: {error}", hint="check memory, or convert the model again"
            ) from error
        return logits

    def cells(self, length: int) -> list[Cells]:
        """Per layer the key and the value (K, length, H) of the first row's first positions."""
        whole = [array if self._provider == "cpu" else value.numpy() for array, value in self._buffers]
        return [(whole[i][0, :, :length], whole[i + 1][0, :, :length]) for i in range(0, len(whole), 2)]


def _refuse_links(folder: Path) -> None:
    """Links could make the model read files outside its folder; onnxruntime itself refuses paths that lead out of it.

    Raises:
        InputError: the folder holds no model, or something else than files of its own.
    """
    try:
        if not stat.S_ISREG((folder / MODEL_FILE).lstat().st_mode) or not (folder / MODEL_FILE).stat().st_size:
            raise InputError(f"{folder / MODEL_FILE} is not a regular file, or empty", hint="convert the model again")
        for path in folder.rglob("*"):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise InputError(
                    f"{path} is a link or no regular file", hint="copy the folder with its contents: cp -rL"
                )
    except OSError as error:
        raise InputError(
            f"{folder} is not an ONNX model folder: {error.filename}: {error.strerror}",
            hint="edgepatch convert base --to onnx makes one",
        ) from error


def _open_session(model_file: Path, num_threads: int | None, provider: str) -> Any:
    """An inference session.

    Raises:
        InputError: the model is damaged or the provider unknown.
        MissingExtraError: onnxruntime, or its build for the provider, is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx") from None
    if provider not in PROVIDERS:
        raise InputError(f"provider: expected one of {', '.join(PROVIDERS)}, found {provider!r}")
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise MissingExtraError("onnxruntime-gpu", "onnx-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or os.cpu_count() or 1
    options.log_severity_level = 4  # what matters is raised
    # Spinning threads burn the time that the other processes of a small device need: up to half of the speed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(model_file), options, providers=[PROVIDERS[provider]])
    except Exception as error:  # onnxruntime's errors derive from Exception alone
        raise InputError(
            f"{model_file} is damaged or cannot be loaded: {error}", hint="convert the model again"
        ) from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise InputError(
            f"provider {provider}: onnxruntime fell back to {session.get_providers()[0]}",
            hint="check the driver and its libraries, or use the CPU",
        )
    return session


def _read_metadata(session: Any, folder: Path) -> tuple[ModelSpec, str]:
    """(spec, quantization) from the graph's metadata."""
    metadata = session.get_modelmeta().custom_metadata_map
    hint = f"convert it with edgepatch: edgepatch convert base HF_FOLDER {folder} --to onnx"
    if SPEC_KEY not in metadata or metadata.get(QUANTIZATION_KEY) not in QUANTIZATIONS.values():
        raise InputError(
            f"{folder / MODEL_FILE} was not converted by edgepatch: its metadata names no base model", hint=hint
        )
    try:
        return ModelSpec.from_dict(json.loads(metadata[SPEC_KEY])), metadata[QUANTIZATION_KEY]
    except (ValueError, RecursionError, PatchFormatError) as error:
        raise InputError(f"{folder / MODEL_FILE}: its metadata is damaged: {error}", hint=hint) from None


def _require_seedable(session: Any, spec: ModelSpec, folder: Path) -> None:
    """Recognises the kind of graph by its inputs; the model builder's is the one kind that can be seeded.

    Raises:
        InputError: the inputs, their shapes or element types are of another kind.
    """
    inputs = {i.name: i for i in session.get_inputs()}
    layers = range(min(spec.num_hidden_layers, len(inputs)))
    past = {f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")}
    if set(inputs) != past | {"input_ids", "attention_mask"}:
        raise InputError(
            f"{folder / MODEL_FILE}: a graph with the inputs {sorted(inputs)} cannot take a seed",
            hint="convert the model again: edgepatch convert base --to onnx",
        )
    kinds = {inputs[name].type for name in past} | {session.get_outputs()[0].type}
    heads = {inputs[name].shape[1] for name in past}
    if len(kinds) != 1 or not kinds <= ELEMENT_TYPES.keys() or heads != {spec.num_key_value_heads}:
        raise InputError(
            f"{folder / MODEL_FILE}: cannot seed a cache of {sorted(kinds)} with {sorted(map(str, heads))} heads",
            hint="convert the model again: edgepatch convert base --to onnx",
        )


def _read_tokenizer(folder: Path, spec: ModelSpec) -> FolderTokenizer:
    tokenizer = FolderTokenizer(folder)
    if tokenizer.digest != spec.tokenizer_digest:
        raise InputError(
            f"{folder}: the tokenizer is not the one the model was converted with", hint="convert the model again"
        )
    return tokenizer


def _positions(folder: Path, num_virtual_tokens: int, asked: int | None) -> int:
    """M, the patch's positions included."""
    path = folder / CONFIG_FILE
    try:
        trained = int(json.loads(path.read_text(encoding="utf-8"))["model"]["context_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing or damaged: {error}", hint="convert the model again") from error
    positions = min(trained, DEFAULT_POSITIONS) if asked is None else asked
    if not num_virtual_tokens < positions <= trained:
        raise InputError(
            f"context length: expected {num_virtual_tokens + 1} (patch and a token) to {trained}, found {positions}",
            hint="leave it out, or name a length in between",
        )
    return positions
