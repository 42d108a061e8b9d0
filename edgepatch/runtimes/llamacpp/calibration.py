"""Self-calibration: what a GGUF model in this build of llama.cpp does with keys, values and embeddings, measured once and kept.

Nothing is concluded from an architecture's name. The layout of keys and values comes from comparing what the model caches for a
patch's soft prompt with the patch's stored seed (``llamacpp.layout.measure``), or, for a seed without soft prompt, from what RoPE
does to one token repeated. The scale of embeddings comes from feeding a token's own embedding instead of the token.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters import rope
from edgepatch.converters.gguf.header import BLOCK_SIZES, GGUFHeader
from edgepatch.converters.llamacpp import layout as llamacpp_layout
from edgepatch.converters.llamacpp.layout import Layout
from edgepatch.converters.llamacpp.state import SequenceState, read_state
from edgepatch.converters.machine_identity import cache_folder, digest_of, keep_memory, read_memory
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.runtimes.llamacpp.context import ContextSettings, LlamaContext, LlamaModel
from edgepatch.tensors import ModelSpec

PROBE_TOKENS = 16
EMBEDDING_TOLERANCE = 0.02
"""Relative difference of logits up to which a token and its embedding are the same input; another scale is at 0.1 and more."""

SCALED_IN_TRANSFORMERS = ("gemma", "gemma2", "gemma3_text", "gemma3")
"""Models whose embedding layer in Transformers multiplies by sqrt(D), so that ``inputs_embeds`` are given after that."""


class Calibration:
    """What is known of one model under one setting of the cache, in memory and on disk.

    Args:
        model: loaded.
        header: of its file.
        spec: of its file.
        settings: of the context that will hold the seed.
    """

    def __init__(self, model: LlamaModel, header: GGUFHeader, spec: ModelSpec, settings: ContextSettings) -> None:
        self._model, self._header, self._spec, self._settings = model, header, spec, settings
        self._file = cache_folder() / "calibration" / f"{self._key()}.json"
        self._facts = read_memory(self._file)

    def _key(self) -> str:
        """Digest of all that a measurement depends on."""
        lib = self._model.lib
        facts = {
            "model": self._spec.as_dict(),
            "architecture": self._header.architecture,
            "quantization": self._header.metadata.get("general.file_type"),
            "library": [lib.__version__, lib.LLAMA_STATE_SEQ_VERSION, lib.llama_print_system_info().decode()],
            "kv_type": self._settings.kv_type,
            "flash_attention": self._settings.flash_attention,
            "num_gpu_layers": self._model.num_gpu_layers,
            # llama.cpp chooses between two sets of frequencies by the size of the context.
            "num_cells": self._settings.num_cells if "longrope" in str(self._spec.rope_scaling) else 0,
            "rotation_disabled": os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""),
        }
        return digest_of(facts)

    @property
    def layout(self) -> Layout | None:
        """The confirmed layout, or ``None`` when none was measured yet."""
        try:
            return Layout.from_dict(self._facts["layout"])
        except (KeyError, TypeError, ValueError):
            return None

    def has_confirmed(self, seed_digest: str) -> bool:
        """Whether this very seed was compared with what the model makes of its soft prompt."""
        return seed_digest in self._facts.get("confirmed", ())

    def keep_layout(self, layout: Layout, seed_digest: str) -> None:
        """Remembers a layout and the seed that has confirmed it."""
        self._keep("layout", layout.as_dict())
        self._keep("confirmed", [*self._facts.get("confirmed", ())[-63:], seed_digest])

    def has_proved(self, patch_digest: str) -> bool:
        """Whether a patch has passed all prompts of its canary under these settings, with what is known now of layout and scale."""
        return self._proof(patch_digest) in self._facts.get("proved", ())

    def keep_proof(self, patch_digest: str) -> None:
        """Remembers that it has."""
        self._keep("proved", [*self._facts.get("proved", ())[-63:], self._proof(patch_digest)])

    def _proof(self, patch_digest: str) -> str:
        facts = [patch_digest, self._facts.get("layout"), self._facts.get("embedding_factor")]
        return digest_of(facts)

    def key_error_factor(self) -> float:
        """How much more wrong cached keys may be than values, by the types of the weights that make them."""
        types = {name: info.ggml_type for name, info in self._header.tensors.items()}
        differ = any(
            types[name] != types.get(name.replace("attn_k.", "attn_v."), types[name])
            for name in types
            if ".attn_k.weight" in name
        )
        return llamacpp_layout.COARSER_KEYS_FACTOR if differ else llamacpp_layout.KEY_ERROR_FACTOR

    @property
    def num_rotated(self) -> int:
        """R, how many dimensions of a head rotary embeddings turn."""
        return int(self._header.setting("rope.dimension_count", self._spec.head_dim))

    def _keep(self, name: str, value: Any) -> None:
        self._facts = {**self._facts, name: value}
        keep_memory(self._file, self._facts)

    # The scale of embeddings.

    def embedding_factor(self, context: LlamaContext, sequence: int) -> float:
        """What a soft prompt in Transformers' scale is multiplied with before llama.cpp's graph gets it.

        Args:
            context: its ``sequence`` is empty, and is empty again afterwards.
            sequence: any.

        Raises:
            InactivePatchError: the model does not take embeddings as it takes tokens.
        """
        measured = self._facts.get("embedding_factor")
        if isinstance(measured, float):
            return measured
        width = float(np.sqrt(self._spec.hidden_size))
        token = self._spec.vocab_size // 2
        row = _embedding_row(self._header, token)
        expected = context.evaluate(sequence, [token])[0]
        for factor in (1.0, width, 1 / width):
            context.forget(sequence)
            actual = context.evaluate_embeddings(sequence, row * np.float32(factor), logits=True)[0]
            if _distance(actual, expected) <= EMBEDDING_TOLERANCE:
                break
        else:
            raise InactivePatchError(
                f"{self._header.architecture}: llama.cpp gives other logits for a token's embedding than for the token",
                hint="a soft prompt cannot be evaluated on this architecture",
            )
        context.forget(sequence)
        in_transformers = width if self._spec.model_type in SCALED_IN_TRANSFORMERS else 1.0
        self._keep("embedding_factor", factor / in_transformers)
        return factor / in_transformers

    # The layout without a soft prompt.

    def layout_by_rope(self) -> Layout:
        """The layout for a seed that comes without soft prompt, from one token repeated; remembered for seeds that a canary proves.

        Raises:
            InputError: it cannot be confirmed.
        """
        exact = self._probe("f32", False)
        if len(exact.caches) != 1:
            raise self._unconfirmed("it keeps the layers with a sliding window apart")
        neighbours = self._turns_neighbours(exact)
        if neighbours and not rope.ROTATES_NEIGHBOURS.get(self._header.architecture, False):
            raise self._unconfirmed("RoPE turns neighbouring dimensions, and Transformers' order for it is not known")
        key_block = value_block = 0
        if self._settings.kv_type not in ("f32", "f16", "bf16"):
            actual = self._probe(self._settings.kv_type, self._settings.flash_attention)
            key_block, value_block = (self._block(exact, actual, kind) for kind in ("keys", "values"))
        layout = Layout(neighbours, key_block, value_block, (tuple(range(len(exact.caches[0].keys))),))
        if self.layout is None:  # one that a soft prompt has confirmed stays
            self._keep("layout", layout.as_dict())
        return layout

    def _unconfirmed(self, reason: str) -> InputError:
        return InputError(
            f"{self._header.architecture}: the layout of its cache cannot be confirmed for a patch with a KV seed alone: {reason}",
            hint="use a patch with a soft prompt",
        )

    def _probe(self, kv_type: str, flash_attention: bool) -> SequenceState:
        """What the model caches for one token repeated: all keys of a layer are then turned copies of one key."""
        settings = replace(
            self._settings, num_cells=256, num_sequences=1, kv_type=kv_type, flash_attention=flash_attention
        )
        context = LlamaContext(self._model, settings)
        try:
            context.evaluate(0, [self._spec.vocab_size // 2] * PROBE_TOKENS)
            return read_state(context.state(0))
        finally:
            context.close()

    def _rows(self, state: SequenceState, kind: str) -> list[NDArray[np.float32]]:
        cache = state.caches[0]
        layers = cache.keys if kind == "keys" else cache.values
        transposed = cache.transposed and kind == "values"
        shape = (self._spec.num_key_value_heads, self._spec.head_dim)
        return [llamacpp_layout.decode_rows(layer, PROBE_TOKENS, shape, transposed) for layer in layers]

    def _turns_neighbours(self, state: SequenceState) -> bool:
        answers = {llamacpp_layout.turns_neighbours(keys, self.num_rotated) for keys in self._rows(state, "keys")} - {
            None
        }
        if len(answers) != 1:
            raise self._unconfirmed("its keys show no clear rotation")
        return bool(answers.pop())

    def _block(self, exact: SequenceState, actual: SequenceState, kind: str) -> int:
        """Size of the Hadamard blocks between the two caches."""
        pairs = list(zip(self._rows(exact, kind), self._rows(actual, kind), strict=True))
        errors = {
            block: float(np.mean([_distance(llamacpp_layout.hadamard(a, block), b) for a, b in pairs]))
            for block in llamacpp_layout.blocks_of(self._spec.head_dim)
        }
        best, *others = sorted(errors, key=lambda block: errors[block])
        if others and errors[best] > 0.5 * min(errors[other] for other in others):
            raise self._unconfirmed(f"the quantized {kind} fit no rotation")
        return best


def _distance(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Relative; a constant added to all logits does not count."""
    a, b = actual - actual.mean(), expected - expected.mean()
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))


def _embedding_row(header: GGUFHeader, token: int) -> NDArray[np.float32]:
    """(1, D) float32 of the token embeddings, as the file stores them."""
    import gguf

    info = header.tensors["token_embd.weight"]
    values, size = BLOCK_SIZES[info.ggml_type]
    row_bytes = info.shape[1] // values * size
    data = np.fromfile(header.path, np.uint8, row_bytes, offset=info.offset + token * row_bytes)
    kind = gguf.GGMLQuantizationType(info.ggml_type)
    return np.asarray(gguf.quants.dequantize(data.reshape(1, -1), kind), dtype=np.float32).reshape(1, -1)
