"""The patch as a value: what it holds, and that its parts agree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import PatchFormatError
from edgepatch.files.canonical import canonical_json
from edgepatch.patch.manifest import check_values, entries_of, version_of
from edgepatch.patch.sketches import Sketch
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import Canary, KVSeed, ModelSpec, SoftPrompt
from edgepatch.text.probes import TokenizerProbe
from edgepatch.trust.signatures import Signature

LARGEST_VALUE = 65504.0  # of float16
PROMPT_TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class Patch:
    """A safety policy patch.

    Attributes:
        name: what the vendor calls it ("lab-detox"); letters, digits, ``._-``.
        version: SemVer, for people.
        base: the model it was made for.
        soft_prompt: the trained virtual tokens, or ``None`` for a trained K/V prefix.
        kv_seed: their keys and values, computed by the full-precision model, or ``None`` when not yet converted.
        training: how it was trained (JSON values): data digests, settings, software.
        evaluation: what was measured (JSON values), per quantization.
        canary: proves in every runtime that the patch is active; ``None`` only where no full-precision model was at hand.
        channel: line of releases for one base ("stable", "beta"); ``sequence`` grows within it.
        sequence: for machines: an older one is refused by a device that has seen a newer one.
        created: RFC 3339 in UTC ("2026-11-21T10:00:00Z"), or "" when not told.
        expires: the same; from then on a device warns. "" for never.
        license: SPDX expression, or "".
        summary: a sentence for people.
        weight_sketch: tells the base from its fine-tunes, at every quantization; ``None`` where its weights were not at hand.
        chat_template: SHA-256 of the chat template that it was trained with, or "".
        supersedes: digests of the patches that it replaces.
        parts: digests of the patches that it was composed of.
        rotation: how the keys of its base turn with their place; ``None`` where its seed cannot be moved, or nobody has said how.
        anchoring: where its seed stands in a text; ``None`` leaves it at the start of all.
        tokenizer_probe: what its base's tokenizer makes of some texts; ``None`` where nobody has asked.
        signatures: over ``manifest``; not part of the digest.
    """

    name: str
    version: str
    base: ModelSpec
    soft_prompt: SoftPrompt | None
    kv_seed: KVSeed | None = None
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    canary: Canary | None = None
    channel: str = "stable"
    sequence: int = 1
    created: str = ""
    expires: str = ""
    license: str = ""
    summary: str = ""
    weight_sketch: Sketch | None = None
    chat_template: str = ""
    supersedes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    rotation: Rotation | None = None
    anchoring: Anchoring | None = None
    tokenizer_probe: TokenizerProbe | None = None
    signatures: tuple[Signature, ...] = ()

    def __post_init__(self) -> None:
        if self.soft_prompt is None and self.kv_seed is None:
            raise PatchFormatError("patch: expected a soft prompt or a KV seed, found neither")
        _check_tensors(self)
        _check_bounds(self.tensors)
        check_values(self)
        _check_movement(self)
        for prompt in self.canary.prompts if self.canary else ():
            if not all(0 <= i < self.base.vocab_size for i in (*prompt.tokens, *prompt.token_ids)):
                raise PatchFormatError(f"canary: expected ids below the vocabulary's {self.base.vocab_size}")
        for probe in self.tokenizer_probe.texts if self.tokenizer_probe else ():
            if not all(0 <= i < self.base.vocab_size for i in probe.token_ids):
                raise PatchFormatError(f"tokenizer probe: expected ids below the vocabulary's {self.base.vocab_size}")

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        source = self.kv_seed or self.soft_prompt
        assert source is not None  # __post_init__
        return source.num_virtual_tokens

    @cached_property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors in the file's byte order, by their names in it."""
        return _tensors(self)

    @cached_property
    def tensor_digests(self) -> dict[str, str]:
        """SHA-256 of every tensor's bytes, by its name in the file."""
        return {name: hashlib.sha256(tensor.data).hexdigest() for name, tensor in self.tensors.items()}

    @cached_property
    def manifest(self) -> bytes:
        """The canonical JSON that is signed; through the tensors' digests it covers the whole patch."""
        version = version_of(self)
        fields = {key: entry.write(getattr(self, key)) for key, entry in entries_of(version).items()}
        computed = {"format_version": version, "num_virtual_tokens": self.num_virtual_tokens}
        return canonical_json({**fields, **computed, "tensors": self.tensor_digests})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest: names the content, whoever signs it."""
        return hashlib.sha256(self.manifest).hexdigest()


def _check_tensors(patch: Patch) -> None:
    if patch.soft_prompt is not None:
        expected = (patch.num_virtual_tokens, patch.base.hidden_size)
        if patch.soft_prompt.embeddings.shape != expected:
            raise PatchFormatError(f"{PROMPT_TENSOR}: expected {expected}, found {patch.soft_prompt.embeddings.shape}")
    if patch.kv_seed is not None:
        layers = len(patch.kv_seed.keys)
        shape = (patch.base.num_key_value_heads, patch.num_virtual_tokens, patch.base.head_dim)
        if layers != patch.base.num_hidden_layers or patch.kv_seed.keys[0].shape != shape:
            actual = f"{layers} layers of {patch.kv_seed.keys[0].shape}"
            raise PatchFormatError(
                f"KV seed: expected {patch.base.num_hidden_layers} layers of {shape}, found {actual}"
            )


def _check_movement(patch: Patch) -> None:
    """What a reader can know of it; whether a model's keys do turn so is for the device, and for the canary, to tell."""
    rotation, anchoring, base = patch.rotation, patch.anchoring, patch.base
    if rotation is not None:
        longest = 2 * max(map(len, rotation.tables), default=0)
        if len(rotation.layers) != base.num_hidden_layers or longest > base.head_dim:
            raise PatchFormatError(
                f"manifest: rotation: expected {base.num_hidden_layers} layers of at most {base.head_dim} dimensions, "
                f"found {len(rotation.layers)} of {longest}"
            )
    if anchoring is None:
        return
    if rotation is None:
        raise PatchFormatError(
            "manifest: anchoring: expected a rotation as well, found none: nobody says how keys turn"
        )
    wrong = next((token for token in anchoring.turn_tokens if not 0 <= token < base.vocab_size), None)
    if wrong is not None:
        raise PatchFormatError(
            f"manifest: anchoring: expected turn tokens below the vocabulary's {base.vocab_size}, found {wrong}"
        )


def _tensors(patch: Patch) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    if patch.soft_prompt is not None:
        tensors[PROMPT_TENSOR] = patch.soft_prompt.embeddings
    if patch.kv_seed is not None:
        for layer, (key, value) in enumerate(zip(patch.kv_seed.keys, patch.kv_seed.values, strict=True)):
            tensors[f"past_key_values.{layer}.key"] = key
            tensors[f"past_key_values.{layer}.value"] = value
    return {
        name: np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")) for name, tensor in tensors.items()
    }


def _check_bounds(tensors: dict[str, NDArray[Any]]) -> None:
    """Compares bit patterns: without their sign, floats grow with their bits, and NaN and infinity are the largest of all."""
    for name, tensor in tensors.items():
        bits = tensor.view(f"<u{tensor.itemsize}")
        largest = (
            (bits & np.array(2 ** (8 * tensor.itemsize - 1) - 1, bits.dtype))
            .max(keepdims=True)
            .view(tensor.dtype)
            .item()
        )
        if not largest <= LARGEST_VALUE:
            raise PatchFormatError(f"tensor {name}: expected values up to {LARGEST_VALUE:.0f}, found {largest}")


def signed(patch: Patch, signature: Signature) -> Patch:
    """The patch with one more signature; another by the same key takes its place."""
    others = tuple(s for s in patch.signatures if s.key_id != signature.key_id)
    return replace(patch, signatures=tuple(sorted((*others, signature), key=lambda s: s.key_id)))
