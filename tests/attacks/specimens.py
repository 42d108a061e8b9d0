"""Patches and a trust root to attack: small enough for work on every bit, or as large as a patch gets."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgepatch.patch.file import PAYLOAD_TYPE, Patch, signed
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import Canary, CanaryPrompt, KVSeed, ModelSpec, SoftPrompt
from edgepatch.trust.drafts import new_root
from edgepatch.trust.roots import Key, Root
from edgepatch.trust.signatures import raw_public_key, sign
from edgepatch.trust.verification import verify_threshold

NOW = datetime(2026, 11, 21, 10, tzinfo=timezone.utc)
SIGNERS = ("vendor", "site")


def private_key(name: str) -> Ed25519PrivateKey:
    """A key that everybody can make: it protects nothing."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"edgepatch specimen {name}".encode()).digest())


def signed_by_all(patch: Patch) -> Patch:
    for name in SIGNERS:
        patch = signed(patch, sign(patch.manifest, PAYLOAD_TYPE, private_key(name)))
    return patch


def trust_root() -> Root:
    """Patches need the signatures of both."""
    keys = {name: Key(raw_public_key(private_key(name)), name) for name in (*SIGNERS, "officer")}
    root = new_root(
        [keys[name] for name in SIGNERS],
        [keys["officer"]],
        created=NOW,
        lifetime=timedelta(days=365),
        patch_threshold=len(SIGNERS),
    )
    return root.signed_by(private_key("officer"))


def require_trusted(patch: Patch, root: Root) -> None:
    """Raises UntrustedError unless both signatures are there and hold."""
    verify_threshold(patch.manifest, PAYLOAD_TYPE, patch.signatures, root, "patch", NOW)


def _patch(name: str, num_virtual_tokens: int, spec: ModelSpec, canary: Canary | None) -> Patch:
    rng = np.random.default_rng(0)
    shape = (spec.num_key_value_heads, num_virtual_tokens, spec.head_dim)
    keys, values = (
        [(rng.integers(-128, 128, shape) / 64).astype(np.float16) for _ in range(spec.num_hidden_layers)]
        for _ in range(2)
    )
    prompt = SoftPrompt((rng.integers(-128, 128, (num_virtual_tokens, spec.hidden_size)) / 64).astype(np.float32))
    return signed_by_all(Patch(name, "1.0.0", spec, prompt, KVSeed(tuple(keys), tuple(values)), canary=canary))


def small_patch() -> Patch:
    """2.5 kB: one layer, one virtual token."""
    canary = Canary((CanaryPrompt((1,), (2, 3), (0.0, 1.5), (0.25, -1.0)),))
    return _patch("small", 1, ModelSpec("llama", 2, 1, 1, 2, 8, 10000.0, "a" * 64, "b" * 64, {"factor": 8.0}), canary)


def moving_patch() -> Patch:
    """The small patch with a seed that moves, so that it is of version 2."""
    patch = replace(small_patch(), signatures=(), rotation=Rotation(((1.0,),), (0,)), anchoring=Anchoring(128, (3,)))
    return signed_by_all(patch)


def large_patch() -> Patch:
    """26 MB: 176 virtual tokens of a model with 32 layers and 8 key/value heads of 128."""
    return _patch("large", 176, ModelSpec("llama", 4096, 32, 8, 128, 128256, 500000.0, "a" * 64, "b" * 64), None)
