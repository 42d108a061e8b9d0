"""The patches whose files lie in tests/golden for ever, and the keys and trust root that they are signed with.

A file of a past format version is never written again: when the format changes, its functions here go and its file stays.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgepatch.patch.file import PAYLOAD_TYPE, Patch, signed
from edgepatch.patch.sketches import Sketch
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import Canary, CanaryPrompt, KVSeed, ModelSpec, SoftPrompt
from edgepatch.text.probes import ProbeText, TokenizerProbe
from edgepatch.trust.drafts import new_root
from edgepatch.trust.roots import Key, Root
from edgepatch.trust.signatures import raw_public_key, sign

FOLDER = Path(__file__).parent.parent / "golden"
NOW = datetime(2026, 11, 21, 10, tzinfo=timezone.utc)
BASE = ModelSpec(
    "llama", 2, 1, 1, 2, 8, 10000.0, hashlib.sha256(b"tokenizer").hexdigest(), hashlib.sha256(b"weights").hexdigest()
)


def key(name: str) -> Ed25519PrivateKey:
    """A key that everybody knows: it protects nothing."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"edgepatch golden {name}".encode()).digest())


def minimal() -> Patch:
    """One virtual token as a soft prompt, nothing told about it, unsigned."""
    return Patch("tiny", "1.0.0", BASE, SoftPrompt(np.array([[0.5, -0.25]], "<f4")))


def full() -> Patch:
    """Every field filled, with the numbers and characters that canonical forms differ in; signed by two keys."""
    base = replace(
        BASE, num_hidden_layers=2, rope_theta=500000.0, rope_scaling={"factor": 8.0, "rope_type": "llama3", "low": 1e-7}
    )
    values = np.arange(2 * 2 * 4, dtype="<f2").reshape(2, 2, 1, 2, 2) / 4 - 1
    seed = KVSeed((values[0, 0], values[0, 1]), (values[1, 0], values[1, 1]))
    numbers = [0.1, -0.0, 1e21, 1e20, 123456789.0, 2**53 - 1, 1e-6, 5e-324, 1.7976931348623157e308]
    patch = Patch(
        "golden",
        "1.2.3-rc.1+build.7",
        base,
        SoftPrompt(np.array([[0.5, -65504], [2**-149, 1 / 3]], "<f4")),
        seed,
        training={
            "numbers": numbers,
            "none": None,
            "flags": [True, False],
            "\U0001f642": 1,
            "\ufb33": 2,
            "": '\u2028\x7f\\"\n\x01',
        },
        evaluation={"F16": {"toxicity": 0.125, "count": 100}},
        canary=Canary((CanaryPrompt((1, 2), (3, 4), (1.5, 2.0), (-0.5, 2.25)),)),
        weight_sketch=Sketch(
            2,
            {"token_embd": (8, 2), "blk.0.attn_q": (2, 2), "blk.1.attn_q": (2, 2), "blk.1.ffn_up": (4, 2)},
            np.array([0.5, -np.inf, -0.0], np.float32),
            np.array([0.5, 1.5, 0.25], np.float32),
        ),
        channel="beta-2",
        sequence=42,
        created="2026-11-21T10:00:00Z",
        expires="2027-11-21T10:00:00Z",
        license="Apache-2.0",
        summary="Answers politely.\nAuch auf Deutsch: h\u00f6flich.",
        chat_template=hashlib.sha256(b"template").hexdigest(),
        supersedes=(hashlib.sha256(b"old").hexdigest(),),
        parts=(hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()),
    )
    return signed_by_both(patch)


def probing() -> Patch:
    """What version 3 adds, and null for what version 2 added."""
    texts = (ProbeText("It's 12\n\u00e9", False, (1, 2, 7)), ProbeText("<s>word", True, (0, 3)))
    return signed_by_both(replace(minimal(), name="probing", version="3.0.0", tokenizer_probe=TokenizerProbe(texts)))


def moving() -> Patch:
    """A seed that moves, with both keys of version 2 filled; the second layer has no positions, the third has frequencies of its own."""
    values = np.arange(2 * 3 * 4, dtype="<f2").reshape(2, 3, 1, 2, 2) / 4 - 1
    seed = KVSeed(tuple(values[0]), tuple(values[1]))
    return signed_by_both(
        Patch(
            "moving",
            "2.0.0",
            replace(BASE, num_hidden_layers=3),
            None,
            seed,
            canary=Canary((CanaryPrompt((1, 2), (3, 4), (1.5, 2.0), (-0.5, 2.25)),)),
            rotation=Rotation(((1.0,), (1e-7,)), (0, None, 1)),
            anchoring=Anchoring(128, (3, 5)),
        )
    )


def signed_by_both(patch: Patch) -> Patch:
    for name in ("vendor", "site"):
        patch = signed(patch, sign(patch.manifest, PAYLOAD_TYPE, key(name)))
    return patch


def root() -> Root:
    """Patches need two signatures, of the vendor and the site."""
    keys = {name: Key(raw_public_key(key(name)), name) for name in ("officer", "vendor", "site")}
    unsigned = new_root(
        [keys["vendor"], keys["site"]], [keys["officer"]], created=NOW, lifetime=timedelta(days=3650), patch_threshold=2
    )
    return unsigned.signed_by(key("officer"))


def signed_small() -> Patch:
    return signed_by_both(minimal())
