"""What tests of the store are made of: small patches, keys, a trust root, a clock that is set by hand."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgepatch.patch.file import PAYLOAD_TYPE, Patch, signed, write_patch
from edgepatch.seeds.rotation import Rotation
from edgepatch.store.device import Store
from edgepatch.tensors import KVSeed, ModelSpec, SoftPrompt
from edgepatch.trust.drafts import new_root, next_root
from edgepatch.trust.roots import Key, Root
from edgepatch.trust.signatures import raw_public_key, sign

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
NAMES = ("vendor", "site", "officer", "thief", "vendor2")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number, name in enumerate(NAMES, 1)}


def public(name: str) -> Key:
    return Key(raw_public_key(KEYS[name]), name)


def spec(**fields: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 32,
        "rope_theta": 10000.0,
        "tokenizer_digest": "a" * 64,
        "weight_fingerprint": "b" * 64,
    }
    return ModelSpec(**{**values, **fields})


def make_patch(sequence: int = 1, *, by: tuple[str, ...] = ("vendor", "site"), **fields: Any) -> Patch:
    """A patch whose content follows from its sequence, signed by some keys."""
    prompt = SoftPrompt(np.full((2, 8), sequence % 997 / 1024, np.float32))
    values = {
        "name": "detox",
        "version": f"1.{sequence}.0",
        "base": spec(),
        "soft_prompt": prompt,
        "sequence": sequence,
        **fields,
    }
    patch = Patch(**values)
    for name in by:
        patch = signed(patch, sign(patch.manifest, PAYLOAD_TYPE, KEYS[name]))
    return patch


ROTATION = Rotation(((1.0, 0.01),), (0, 0))


def movable(sequence: int = 1, **fields: Any) -> dict[str, Any]:
    """What a patch needs to stand beside others: a seed that follows from its sequence, and how keys turn."""
    rng = np.random.default_rng(sequence)
    keys, values = ([rng.standard_normal((1, 2, 4)).astype(np.float16) for _ in range(2)] for _ in range(2))
    return {"kv_seed": KVSeed(tuple(keys), tuple(values)), "rotation": ROTATION, **fields}


def write(folder: Path, sequence: int = 1, **fields: Any) -> Path:
    patch = make_patch(sequence, **fields)
    path = folder / f"{patch.digest[:12]}-{len(patch.signatures)}.safetensors"
    write_patch(patch, path)
    return path


def make_root(**changes: Any) -> Root:
    """Two of vendor and site sign patches, the officer signs roots."""
    values: dict[str, Any] = {
        "created": NOW - timedelta(days=30),
        "lifetime": timedelta(days=365),
        "patch_threshold": 2,
        **changes,
    }
    return new_root([public("vendor"), public("site")], [public("officer")], **values).signed_by(KEYS["officer"])


def rotated(root: Root, **changes: Any) -> Root:
    """The version after a root."""
    values: dict[str, Any] = {"created": root.created + timedelta(days=1), "lifetime": timedelta(days=365), **changes}
    return next_root(root, **values).signed_by(KEYS["officer"])


class Clock:
    """A clock that stands until it is set."""

    def __init__(self, time: datetime = NOW) -> None:
        self.time = time

    def __call__(self) -> datetime:
        return self.time


def make_store(folder: Path, clock: Clock | None = None, root: Root | None = None, **options: Any) -> Store:
    """A store with a trust root."""
    store = Store(folder, clock=clock or Clock(), **options)
    store.set_root([root or make_root()])
    return store
