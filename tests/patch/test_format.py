"""docs/reference/format.md against the program: golden files, a second reader written from the document, and its hexdump."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attacks.mutations import mutated_bytes, mutated_patch
from edgepatch.errors import PatchFormatError
from edgepatch.files.canonical import canonical_json
from edgepatch.patch import file as patches
from edgepatch.patch import manifest as manifest_fields
from edgepatch.patch.file import PAYLOAD_TYPE, parse_patch, patch_bytes, read_patch
from edgepatch.seeds.anchoring import LARGEST_BLOCK, LEAST_BLOCK, MAX_TURN_TOKENS, Anchoring
from edgepatch.seeds.rotation import LARGEST_FREQUENCY, MAX_TABLES, Rotation
from edgepatch.trust.roots import read_root
from edgepatch.trust.verification import verify_threshold
from kit import format_reader, golden_patches

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = (ROOT / "docs" / "reference" / "format.md").read_text("utf-8")
HEXDUMP = ROOT / "docs" / "examples" / "patch-v1-minimal.hex"
MUTANTS = 6000

# Never to be changed: SHA-256 of the file, and the patch's digest.
GOLDEN = {
    "patch-v1.safetensors": (
        "048c2d184603cff6bf5b2b02fca765cfe4cd5da34c1aca79ba3431d77870d745",
        "6199bcd989d258f15ac9ad00767a95af795edf63c8f5ac6bb729a22488614287",
    ),
    "patch-v1-minimal.safetensors": (
        "9b260c383e1abeed30ea66dce818d981f3f423ded4eea29c09099c2191ac1e22",
        "a86f2e6993f6e7faeb0168b749dc84d90af2d6223d4571ac736178c40e0687e1",
    ),
    "patch-v2.safetensors": (
        "39a50059a0873e38f45eb877dc47ddf3cebe8f1599484adf9ee8c839a86caeda",
        "f0bb69691151ab4ea6126f1f04c4dbeb04aad8b8d71267c32b4a1feb2782e873",
    ),
    "patch-v3.safetensors": (
        "c2bf28ac174c1cc3bbf1de5fd446da764a2545d9fa25e76dc911b3fe6481ba6a",
        "81faf0d6fd66dc4480274fa4e8c643c8fc4aa27b5970d738650f63ddfe695cae",
    ),
    "root-v1.json": (
        "f5e843d63fdc3ae41526d7b8c382a5bca57c41c0998d02fff74603a5c77ca235",
        "2e502ba65c379f012ccb43f02f943dac91619fcf00dfa0660e2d42416a325e63",
    ),
}


def golden(name: str) -> bytes:
    return (golden_patches.FOLDER / name).read_bytes()


def accepted(data: bytes) -> bool:
    try:
        parse_patch(data)
    except PatchFormatError:
        return False
    return True


def accepted_by_the_second(data: bytes) -> bool:
    try:
        format_reader.read(data)
    except format_reader.Refused:
        return False
    return True


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_are_untouched(name):
    assert hashlib.sha256(golden(name)).hexdigest() == GOLDEN[name][0]


def test_every_format_version_has_a_golden_file():
    assert {f"patch-v{version}.safetensors" for version in range(1, manifest_fields.FORMAT_VERSION + 1)} <= {
        p.name for p in golden_patches.FOLDER.iterdir()
    }


def test_golden_patch_is_read_with_all_its_content():
    patch = read_patch(golden_patches.FOLDER / "patch-v1.safetensors")
    assert patch.digest == GOLDEN["patch-v1.safetensors"][1]
    assert (patch.name, patch.version, patch.channel, patch.sequence) == ("golden", "1.2.3-rc.1+build.7", "beta-2", 42)
    assert (patch.created, patch.expires, patch.license) == (
        "2026-11-21T10:00:00Z",
        "2027-11-21T10:00:00Z",
        "Apache-2.0",
    )
    assert patch.summary == "Answers politely.\nAuch auf Deutsch: höflich."
    assert (
        patch.base.rope_scaling == {"factor": 8.0, "rope_type": "llama3", "low": 1e-7}
        and patch.base.rope_theta == 500000.0
    )
    assert patch.training["numbers"] == [0.1, 0, 1e21, 1e20, 123456789, 2**53 - 1, 1e-6, 5e-324, 1.7976931348623157e308]
    assert (
        patch.training["none"] is None
        and patch.training["flags"] == [True, False]
        and patch.training[""] == '\u2028\x7f\\"\n\x01'
    )
    assert patch.evaluation == {"F16": {"toxicity": 0.125, "count": 100}}
    assert patch.canary.prompts[0].token_ids == (3, 4) and patch.canary.prompts[0].patched == (-0.5, 2.25)
    assert patch.weight_sketch.tensors["blk.1.attn_q"] == (2, 2) and patch.weight_sketch.low.tolist() == [
        0.5,
        -np.inf,
        0,
    ]
    assert patch.soft_prompt.embeddings.tolist() == [[0.5, -65504], [2**-149, float(np.float32(1 / 3))]]
    assert patch.kv_seed.keys[0].dtype == np.float16 and patch.kv_seed.values[1].tolist() == [[[2, 2.25], [2.5, 2.75]]]
    assert len(patch.supersedes) == 1 and len(patch.parts) == 2 and len(patch.signatures) == 2


def test_golden_patch_of_version_2_is_read_with_all_its_content():
    patch = read_patch(golden_patches.FOLDER / "patch-v2.safetensors")
    assert patch.digest == GOLDEN["patch-v2.safetensors"][1] and patch.soft_prompt is None
    assert patch.rotation == Rotation(((1.0,), (1e-7,)), (0, None, 1), neighbours=False)
    assert patch.anchoring == Anchoring(128, (3, 5))
    assert patch.kv_seed.values[2].tolist() == [[[4, 4.25], [4.5, 4.75]]]


def test_golden_patch_of_version_3_is_read_with_all_its_content():
    patch = read_patch(golden_patches.FOLDER / "patch-v3.safetensors")
    assert patch.digest == GOLDEN["patch-v3.safetensors"][1] and patch.rotation is None
    plain, trusted = patch.tokenizer_probe.texts
    assert (plain.text, plain.trusted, plain.token_ids) == ("It's 12\n\u00e9", False, (1, 2, 7))
    assert (trusted.text, trusted.trusted, trusted.token_ids) == ("<s>word", True, (0, 3))


@pytest.mark.parametrize("name", ["patch-v1.safetensors", "patch-v2.safetensors", "patch-v3.safetensors"])
def test_golden_signatures_are_accepted(name):
    root = read_root(golden_patches.FOLDER / "root-v1.json")
    assert root.fingerprint == GOLDEN["root-v1.json"][1]
    patch = read_patch(golden_patches.FOLDER / name)
    signers = verify_threshold(patch.manifest, PAYLOAD_TYPE, patch.signatures, root, "patch", golden_patches.NOW)
    assert {root.keys[key].owner for key in signers} == {"vendor", "site"}


def test_the_golden_files_are_what_is_written():
    """When this fails, the format has changed and needs a new version. What needs no later version is written as version 1."""
    assert patch_bytes(golden_patches.moving()) == golden("patch-v2.safetensors")
    assert patch_bytes(golden_patches.full()) == golden("patch-v1.safetensors")
    assert patch_bytes(golden_patches.minimal()) == golden("patch-v1-minimal.safetensors")
    assert golden_patches.root().to_bytes() == golden("root-v1.json")
    assert (
        read_patch(golden_patches.FOLDER / "patch-v1-minimal.safetensors").digest
        == GOLDEN["patch-v1-minimal.safetensors"][1]
    )


# The second reader.


SEEDS = [
    golden("patch-v1.safetensors"),
    golden("patch-v1-minimal.safetensors"),
    golden("patch-v2.safetensors"),
    patch_bytes(golden_patches.signed_small()),
]


@pytest.mark.parametrize("data", SEEDS)
def test_both_readers_find_the_same(data):
    patch, fields = parse_patch(data), format_reader.read(data)
    manifest = {key: value for key, value in fields.items() if key not in ("data", "signatures")}
    assert canonical_json(manifest) == patch.manifest
    assert fields["signatures"] == [s.as_dict() for s in patch.signatures]
    assert {name: hashlib.sha256(raw).hexdigest() for name, raw in fields["data"].items()} == patch.tensor_digests


def test_both_readers_refuse_the_same():
    """Crafted files, most of which fit together but for one value."""
    outcomes = []
    for seed in range(MUTANTS):
        data = mutated_patch(SEEDS[seed % len(SEEDS)], random.Random(seed))
        outcomes.append(accepted(data))
        assert accepted_by_the_second(data) == outcomes[-1], f"seed {seed}"
    assert MUTANTS * 0.02 < sum(outcomes) < MUTANTS * 0.2


@settings(max_examples=300, deadline=1000)
@given(st.randoms(use_true_random=False), st.sampled_from(SEEDS))
def test_both_readers_agree_on_what_hypothesis_finds(rng, data):
    changed = mutated_patch(data, rng)
    assert accepted(changed) == accepted_by_the_second(changed)


@settings(max_examples=300, deadline=1000)
@given(st.integers(0, 2**64), st.sampled_from(SEEDS), st.integers(1, 3))
def test_changed_bytes_are_refused_or_read_alike(seed, data, rounds):
    rng = random.Random(seed)
    for _ in range(rounds):
        data = mutated_bytes(data, rng)
    assert accepted(data) == accepted_by_the_second(data)


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(2.0**-24)  # its nearest 16 digits are those of another double; other 16 digits are its own
@example(5e-324)
@example(9.5367431640625e-07)
def test_both_write_the_same_numbers(value):
    assert format_reader.number(value).encode() == canonical_json(value)


def test_the_second_reader_is_independent():
    source = Path(format_reader.__file__).read_text("utf-8")
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)) == {
        "__future__",
        "base64",
        "datetime",
        "decimal",
        "hashlib",
        "json",
        "math",
        "re",
        "struct",
    }


# The document.


def hexdump(data: bytes) -> str:
    """As `hexdump -C` prints it, without the lines of a long run in between."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        left = "  ".join(" ".join(f"{b:02x}" for b in row[i : i + 8]) for i in (0, 8) if row[i:])
        lines.append(f"{at:08x}  {left:<49} |{''.join(chr(b) if 32 <= b < 127 else '.' for b in row)}|")
    return "\n".join([*lines, f"{len(data):08x}"])


def test_the_hexdump_is_that_of_the_golden_file():
    assert hexdump(golden("patch-v1-minimal.safetensors")) + "\n" == HEXDUMP.read_text("utf-8")


def test_the_document_names_every_key_and_bound():
    for key in manifest_fields.manifest_kinds(manifest_fields.FORMAT_VERSION):
        assert f"| `{key}` |" in DOCUMENT, key
    for name in (
        "head_dim",
        "hidden_size",
        "model_type",
        "num_hidden_layers",
        "num_key_value_heads",
        "rope_scaling",
        "rope_theta",
        "tokenizer_digest",
        "vocab_size",
        "weight_fingerprint",
    ):
        assert f"| `{name}` |" in DOCUMENT, name
    for bound in (patches.MAX_FILE_BYTES, patches.MAX_HEADER_BYTES, manifest_fields.MAX_SEQUENCE):
        assert f"{bound:,}" in DOCUMENT
    assert f"DSSEv1 SP {len(patches.PAYLOAD_TYPE)} SP {patches.PAYLOAD_TYPE} SP LEN SP MANIFEST" in DOCUMENT
    for bound in (LEAST_BLOCK, LARGEST_BLOCK, MAX_TURN_TOKENS, MAX_TABLES, LARGEST_FREQUENCY):
        assert str(bound) in DOCUMENT
    for patch in (golden_patches.full(), golden_patches.minimal(), golden_patches.moving()):
        assert patch.digest in DOCUMENT
