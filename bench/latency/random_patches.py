"""What stands beside a seed on llama.cpp and is made here, at random: patches, LoRA adapters, control vectors, texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.arms import random_directions, read_control_vector, write_control_vector
from edgepatch.converters import rope
from edgepatch.converters.gguf.header import GGUFHeader
from edgepatch.converters.llamacpp import layout as llamacpp_layout
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.patch import canary
from edgepatch.patch.file import Patch
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session
from edgepatch.tensors import Canary, KVSeed, SoftPrompt

PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""What adapters change: all linear layers, as PEFT's "all-linear"."""


def random_tokens(vocab_size: int, count: int, rng_seed: int = 0) -> list[int]:
    """Token ids of a text that means nothing; the last twentieth of a vocabulary, where special tokens may be, is left out."""
    return [int(token) for token in np.random.default_rng([rng_seed, count]).integers(0, vocab_size * 19 // 20, count)]


# Patches.


def make_patch(runtime: Session, num_virtual_tokens: int, name: str = "random") -> Patch:
    """A random patch, with the seed and the canary that this very model gives it.

    Args:
        runtime: llama.cpp or ONNX; left without a patch.
        num_virtual_tokens: P.
        name: of the patch.
    """
    backend = runtime.backend
    if isinstance(backend, LlamaCppRuntime):
        patch = _random_patch(runtime, num_virtual_tokens, name)
        seeded = _with_canary(runtime, patch, lambda: _seed_of(backend, num_virtual_tokens))
    else:
        seed = _seed_of_text(runtime, num_virtual_tokens)
        seeded = _with_canary(runtime, Patch(name, "1.0.0", runtime.spec, None, seed), lambda: seed)
    runtime.swap(None)
    return seeded


def _random_patch(runtime: Session, num_virtual_tokens: int, name: str) -> Patch:
    rng = np.random.default_rng(num_virtual_tokens)
    embeddings = rng.standard_normal((num_virtual_tokens, runtime.spec.hidden_size)) * 0.02
    return Patch(name, "1.0.0", runtime.spec, SoftPrompt(embeddings.astype(np.float32)))


def _with_canary(runtime: Session, patch: Patch, seed: Any) -> Patch:
    """The patch with its seed, and with what the model answers to the canary's prompts."""
    prompts = canary.canary_prompts(runtime.spec.vocab_size)

    def answers(active: Patch | None) -> dict[tuple[int, ...], NDArray[np.float32]]:
        runtime.swap(active)
        return {tokens: runtime.logits_of_last(tokens) for tokens in prompts}

    bare, patched = answers(None), answers(patch)
    measured: Canary = canary.make_canary(
        runtime.spec.vocab_size, lambda t: bare[tuple(t)], lambda t: patched[tuple(t)]
    )
    return replace(patch, kv_seed=seed(), canary=measured)


def _seed_of(runtime: LlamaCppRuntime, count: int) -> KVSeed | None:
    """What the model has cached for the soft prompt, in Transformers' order; none for an order that is not known here."""
    caches = read_state(runtime.seed_state()).caches
    if len(caches) != 1 or runtime.kv_type not in ("f16", "f32"):
        return None
    shape = (runtime.spec.num_key_value_heads, runtime.spec.head_dim)
    keys = [llamacpp_layout.decode_rows(rows, count, shape, False) for rows in caches[0].keys]
    values = [llamacpp_layout.decode_rows(rows, count, shape, caches[0].transposed) for rows in caches[0].values]
    if rope.ROTATES_NEIGHBOURS.get(runtime.header.architecture, False):
        keys = [key.reshape(*key.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(key.shape) for key in keys]
    return KVSeed(tuple(k.astype(np.float16) for k in keys), tuple(v.astype(np.float16) for v in values))


def _seed_of_text(runtime: Session, count: int) -> KVSeed:
    """What the graph has cached for a random text: it takes no embeddings."""
    runtime.swap(None)
    runtime.logits_of_last(random_tokens(runtime.spec.vocab_size, count))
    _, cells = runtime.sequences.save().state
    return KVSeed(
        tuple(key.astype(np.float16) for key, _ in cells), tuple(value.astype(np.float16) for _, value in cells)
    )


# Adapters.


def write_random_lora(header: GGUFHeader, rank: int, target: Path, rng_seed: int = 0) -> None:
    """Writes a random adapter of all linear layers in float16, as llama.cpp's own converter writes them.

    Args:
        header: of the base's file.
        rank: r.
        target: the GGUF file.
        rng_seed: of the factors.
    """
    import gguf

    rng = np.random.default_rng(rng_seed)
    writer = gguf.GGUFWriter(target, header.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for name, info in header.tensors.items():
        if name.split(".")[-2] in PROJECTIONS:
            rows, columns = info.shape
            down, up = rng.standard_normal((rank, columns)) / np.sqrt(columns), 0.01 * rng.standard_normal((rows, rank))
            writer.add_tensor(f"{name}.lora_a", down.astype(np.float16))
            writer.add_tensor(f"{name}.lora_b", up.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Adapters:
    """What can be attached to a loaded model's only context, one at a time.

    Args:
        runtime: stays open as long as the adapters are used.
        folder: gets their files.
        ranks: of the LoRA adapters.
    """

    def __init__(self, runtime: LlamaCppRuntime, folder: Path, ranks: Sequence[int]) -> None:
        self._runtime = runtime
        self.files = {f"lora-r{rank}": folder / f"lora-r{rank}.gguf" for rank in ranks} | {
            "control-vector": folder / "control-vector.gguf"
        }
        for rank in ranks:
            write_random_lora(runtime.header, rank, self.files[f"lora-r{rank}"])
        directions = random_directions(runtime.spec, 1.0)
        write_control_vector(runtime.spec, directions, self.files["control-vector"])
        self._loras = {
            name: runtime.model.load_lora(path) for name, path in self.files.items() if name.startswith("lora")
        }
        self._directions = read_control_vector(self.files["control-vector"], runtime.spec)

    def attach(self, name: str) -> None:
        """Attaches an adapter by its name, in place of what was attached; "" for none."""
        loras = [self._loras[name]] if name in self._loras else []
        self._runtime.context.set_adapters(loras, self._directions if name == "control-vector" else None)
