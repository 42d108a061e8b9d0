"""The patch file: what is written, and every refusal. tests/patch/test_format.py holds the format against its document."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.mutations import assembled
from edgepatch.errors import EdgepatchError, InputError, PatchFormatError, UntrustedError
from edgepatch.files.canonical import canonical_json, parse_json
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    PAYLOAD_TYPE,
    SIGNATURES_KEY,
    Patch,
    parse_patch,
    patch_bytes,
    read_patch,
    signed,
    write_patch,
)
from edgepatch.patch.manifest import ENTRIES, MAX_SEQUENCE, is_timestamp
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import Canary, CanaryPrompt, KVSeed, SoftPrompt
from edgepatch.trust.signatures import Signature, sign
from edgepatch.trust.verification import verify_threshold
from kit import format_reader, golden_patches

ROOT = Path(__file__).parent.parent.parent
FULL, SMALL, MOVING = golden_patches.full(), golden_patches.signed_small(), golden_patches.moving()


def taken_apart(data: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def crafted(patch: Patch, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The patch's file with another manifest, in canonical form."""
    header, body = taken_apart(patch_bytes(patch))
    manifest = parse_json(header["__metadata__"][METADATA_KEY].encode(), "manifest")
    change(manifest)
    header["__metadata__"][METADATA_KEY] = canonical_json(manifest).decode()
    return assembled(header, body)


def with_header(patch: Patch, change: Callable[[dict[str, Any]], object]) -> bytes:
    header, body = taken_apart(patch_bytes(patch))
    change(header)
    return assembled(header, body)


def set_key(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.__setitem__(key, value)


def verified(data: bytes) -> Patch:
    """What a device does: read, then count the signatures."""
    patch = parse_patch(data)
    verify_threshold(patch.manifest, PAYLOAD_TYPE, patch.signatures, golden_patches.root(), "patch", golden_patches.NOW)
    return patch


# Values.


def same(one: Patch, other: Patch) -> bool:
    return (
        one.manifest == other.manifest and one.signatures == other.signatures and patch_bytes(one) == patch_bytes(other)
    )


@pytest.mark.parametrize(
    "patch", [FULL, SMALL, MOVING, golden_patches.minimal(), replace(FULL, soft_prompt=None, signatures=())]
)
def test_round_trip(patch, tmp_path):
    assert write_patch(patch, tmp_path / "new" / "patch") == patch.digest
    again = read_patch(tmp_path / "new" / "patch")
    assert same(again, patch)
    for field in ("base", "canary", "training", "evaluation", "parts", "expires", "sequence", "rotation", "anchoring"):
        assert getattr(again, field) == getattr(patch, field)
    assert type(again.base.rope_theta) is float and stat.S_IMODE((tmp_path / "new" / "patch").stat().st_mode) == 0o644


def test_the_digest_is_of_the_content_whoever_signs_it():
    assert replace(FULL, signatures=()).digest == FULL.digest == hashlib.sha256(FULL.manifest).hexdigest()
    assert replace(FULL, summary="Another.").digest != FULL.digest


def test_a_second_signature_of_a_key_takes_the_place_of_the_first():
    other = Signature(SMALL.signatures[0].key_id, b"\1" * 64)
    patch = signed(SMALL, other)
    assert other in patch.signatures and len(patch.signatures) == 2 and patch.digest == SMALL.digest
    order = replace(SMALL, signatures=SMALL.signatures[::-1])
    assert patch_bytes(order) == patch_bytes(SMALL)


def test_safetensors_reads_it_and_writes_the_same_bytes():
    import safetensors.numpy

    tensors = safetensors.numpy.load(patch_bytes(FULL))
    assert set(tensors) == set(FULL.tensor_digests) and np.array_equal(
        tensors["past_key_values.1.key"], FULL.kv_seed.keys[1]
    )
    unsigned = patch_bytes(replace(FULL, signatures=()))  # the library writes several keys of metadata in any order
    assert safetensors.numpy.save(tensors, metadata=taken_apart(unsigned)[0]["__metadata__"]) == unsigned


def test_the_layout_of_arrays_in_memory_does_not_matter():
    """Fortran-ordered arrays and, as on a big-endian machine, big-endian ones hold the same numbers."""
    prompt = SoftPrompt(np.asfortranarray(FULL.soft_prompt.embeddings))
    seed = KVSeed(FULL.kv_seed.keys, tuple(np.repeat(v, 2, axis=2)[:, :, ::2] for v in FULL.kv_seed.values))
    assert patch_bytes(replace(FULL, soft_prompt=prompt, kv_seed=seed)) == patch_bytes(FULL)
    object.__setattr__(prompt, "embeddings", prompt.embeddings.astype(">f4"))
    assert patch_bytes(replace(FULL, soft_prompt=prompt)) == patch_bytes(FULL)


@pytest.mark.parametrize(("seed", "locale"), [("0", "C"), ("1", "C.UTF-8"), ("12345", "POSIX"), ("7", "tr_TR.UTF-8")])
def test_same_content_same_bytes_in_every_process(seed, locale):
    """F11: neither the order of hashes, nor the language, nor the time zone gets into the file."""
    code = "from kit import golden_patches as g; import hashlib; from edgepatch.patch.file import patch_bytes; print(hashlib.sha256(patch_bytes(g.full())).hexdigest())"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONHASHSEED": seed,
        "LC_ALL": locale,
        "TZ": "Asia/Kathmandu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == hashlib.sha256(patch_bytes(FULL)).hexdigest()


BAD_VALUES = [
    *[("name", value) for value in ("", "-a", "a" * 65, "a/b", "é", "a\n", 1, None)],
    *[
        ("version", value)
        for value in (
            "1",
            "1.0",
            "01.0.0",
            "1.0.0-",
            "1.0.0-01",
            "1.0.0-a..b",
            "1.0.0+",
            "v1.0.0",
            "1.0.0\n",
            "1.0.٣",
            f"1.0.{'1' * 61}",
            1,
        )
    ],
    *[("channel", value) for value in ("", "Beta", "a_b", "a" * 33, None)],
    *[("sequence", value) for value in (0, -1, True, 1.5, MAX_SEQUENCE + 1, "1")],
    *[
        (key, value)
        for key in ("created", "expires")
        for value in (
            "2026-11-21",
            "2026-02-29T00:00:00Z",
            "2026-11-21T24:00:00Z",
            "2026-11-21T10:00:60Z",
            "0000-01-01T00:00:00Z",
            "٢٠٢٦-11-21T10:00:00Z",
            None,
        )
    ],
    *[("license", value) for value in ("a" * 129, "a\tb", 1)],
    *[("summary", value) for value in ("a" * 2001, "\x1b[31m", "\x9b", "\u202eevil", "\u2066", "\ud800", None)],
    *[(key, value) for key in ("supersedes", "parts") for value in (("x",), ("A" * 64,), (1,), ("a" * 65,))],
    *[("chat_template", value) for value in ("x", "A" * 64, None, 1)],
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_values_that_are_refused(key, value):
    with pytest.raises(PatchFormatError, match=f"manifest: {key}: expected"):
        replace(FULL, **{key: value})
    stored = list(value) if isinstance(value, tuple) else value
    if value != "\ud800":  # canonical JSON has no such text
        with pytest.raises(PatchFormatError, match=key):
            parse_patch(crafted(FULL, set_key(key, stored if value != MAX_SEQUENCE + 1 else 1e300)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a" * 64),
        ("version", "1.0.0-0A.is.legal+001"),
        ("version", "10.20.30"),
        ("version", "1.0.0--"),
        ("channel", "0-"),
        ("sequence", MAX_SEQUENCE),
        ("created", "2024-02-29T23:59:59Z"),
        ("summary", "\n" + "\U0001f642" * 1999),
        ("license", ""),
        ("chat_template", ""),
        ("training", {"x": 2.0**70}),
    ],
)
def test_values_at_the_edge_are_accepted(key, value):
    patch = replace(FULL, **{key: value})
    assert getattr(parse_patch(patch_bytes(patch)), key) == value


def test_times():
    assert is_timestamp("9999-12-31T23:59:59Z") and not is_timestamp("2026-13-01T00:00:00Z") and not is_timestamp(5)


def test_parts_that_do_not_fit_together():
    wide = SoftPrompt(np.ones((2, 3), np.float32))
    short = KVSeed(tuple(k[:, :1] for k in FULL.kv_seed.keys), tuple(v[:, :1] for v in FULL.kv_seed.values))
    for change, match in [
        ({"soft_prompt": wide}, r"prompt_embeddings: expected \(2, 2\), found \(2, 3\)"),
        ({"kv_seed": short}, r"prompt_embeddings: expected \(1, 2\), found \(2, 2\)"),
        ({"kv_seed": short, "base": replace(FULL.base, head_dim=4), "soft_prompt": None}, "KV seed: expected"),
        ({"base": replace(FULL.base, num_hidden_layers=3)}, "3 layers"),
        ({"base": replace(FULL.base, vocab_size=4)}, "canary: expected ids below the vocabulary's 4"),
        ({"soft_prompt": None, "kv_seed": None}, "found neither"),
        ({"soft_prompt": SoftPrompt(np.array([[1, 65536], [1, 1]], np.float32))}, "values up to 65504, found 65536"),
        (
            {"soft_prompt": SoftPrompt(np.array([[1, -65520], [1, 1]], np.float32))},
            "values up to 65504, found -65520|found 65520",
        ),
    ]:
        with pytest.raises(PatchFormatError, match=match):
            replace(FULL, **change)


def test_what_could_not_be_read_is_not_written(tmp_path):
    many = Canary((CanaryPrompt((1,), (1, 2), (0.0, 0.0), (1.0, 1.0)),) * 17)
    deep: dict[str, Any] = {}
    for _ in range(16):
        deep = {"x": deep}
    for change in (
        {"canary": many},
        {"training": deep},
        {"training": {"x": float("nan")}},
        {"training": {"x": 2**53}},
        {"training": {"x": "\ud800"}},
        {"evaluation": {"x": "y" * MAX_HEADER_BYTES}},
        {"signatures": tuple(Signature(f"{i:064x}", bytes(64)) for i in range(17))},
        {"base": replace(FULL.base, tokenizer_digest=1)},
        {"base": replace(FULL.base, rope_theta=float("inf"))},
    ):
        with pytest.raises(PatchFormatError):
            write_patch(replace(FULL, **change), tmp_path / "patch")
        assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "patch"
    write_atomically(file, b"old")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(tmp_path / "folder", b"new")
    with pytest.raises(InputError, match="cannot write"):
        write_atomically(file / "below", b"new")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new" and sorted(p.name for p in tmp_path.iterdir()) == ["folder", "patch"]


# Refusals of files.


def no_bytes(header: dict[str, Any]) -> None:
    header["prompt_embeddings"]["shape"] = [0, 2]
    header["prompt_embeddings"]["data_offsets"] = [0, 0]


TENSOR = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
HEADERS = {
    "no metadata": (lambda h: h.pop("__metadata__"), "no readable manifest"),
    "metadata is no object": (set_key("__metadata__", []), "no readable manifest"),
    "metadata of another program": (set_key("__metadata__", {"format": "pt"}), "metadata key"),
    "further metadata": (lambda h: h["__metadata__"].update(x="y"), r"found \['x'\]"),
    "manifest is no text": (lambda h: h["__metadata__"].update({METADATA_KEY: {}}), "metadata key"),
    "manifest is no JSON": (lambda h: h["__metadata__"].update({METADATA_KEY: "{"}), "manifest is no readable JSON"),
    "manifest is half a surrogate pair": (
        lambda h: h["__metadata__"].update({METADATA_KEY: '"\ud800"'}),
        "no readable JSON",
    ),
    "manifest is no object": (lambda h: h["__metadata__"].update({METADATA_KEY: "[]"}), "no readable manifest"),
    "manifest without a version": (lambda h: h["__metadata__"].update({METADATA_KEY: "{}"}), "no readable manifest"),
    "no tensor": (lambda h: h.pop("prompt_embeddings"), "tensors: expected prompt_embeddings"),
    "unknown tensor": (set_key("lora_A", TENSOR), "tensors: expected prompt_embeddings"),
    "value without key": (set_key("past_key_values.0.value", TENSOR), "tensors: expected prompt_embeddings"),
    "a layer is missing": (
        lambda h: h.update({"past_key_values.1.key": TENSOR, "past_key_values.1.value": TENSOR}),
        "tensors: expected",
    ),
    "a layer with a leading zero": (
        lambda h: h.update({"past_key_values.00.key": TENSOR, "past_key_values.00.value": TENSOR}),
        "tensors: expected",
    ),
    "tensor is no object": (set_key("prompt_embeddings", []), "expected dtype F32 or F16"),
    "tensor without a shape": (lambda h: h["prompt_embeddings"].pop("shape"), "expected dtype F32 or F16"),
    "tensor with more": (lambda h: h["prompt_embeddings"].update(x=1), "expected dtype F32 or F16"),
    "dtype of pickled objects": (lambda h: h["prompt_embeddings"].update(dtype="O"), "expected dtype F32 or F16"),
    "dtype is a list": (lambda h: h["prompt_embeddings"].update(dtype=["F32"]), "expected dtype F32 or F16"),
    "shape is a text": (lambda h: h["prompt_embeddings"].update(shape="12"), "whole numbers"),
    "shape of floats": (lambda h: h["prompt_embeddings"].update(shape=[1.5, 2]), "whole numbers"),
    "shape of booleans": (lambda h: h["prompt_embeddings"].update(shape=[True, 2]), "whole numbers"),
    "negative shape": (lambda h: h["prompt_embeddings"].update(shape=[-1, -2]), "whole numbers"),
    "shape of 2^20 x 2^20": (lambda h: h["prompt_embeddings"].update(shape=[2**20, 2**20]), "does not lie in the file"),
    "shape of 2^60": (lambda h: h["prompt_embeddings"].update(shape=[2**60, 2]), "whole numbers"),
    "shape of 100,000 numbers": (lambda h: h["prompt_embeddings"].update(shape=[2**28] * 90_000), "whole numbers"),
    "no dimension": (lambda h: h["prompt_embeddings"].update(shape=[]), "whole numbers"),
    "one offset": (lambda h: h["prompt_embeddings"].update(data_offsets=[8]), "whole numbers"),
    "offsets are no list": (lambda h: h["prompt_embeddings"].update(data_offsets=None), "whole numbers"),
    "no element": (no_bytes, "does not lie in the file"),
    "offsets swapped": (lambda h: h["prompt_embeddings"].update(data_offsets=[8, 0]), "does not lie in the file"),
    "offsets beyond the end": (
        lambda h: h["prompt_embeddings"].update(data_offsets=[8, 16]),
        "does not lie in the file",
    ),
    "another shape of the same size": (
        lambda h: h["prompt_embeddings"].update(shape=[2, 1]),
        r"prompt_embeddings: expected \(2, 2\)",
    ),
    "three dimensions": (lambda h: h["prompt_embeddings"].update(shape=[1, 1, 2]), r"expected \(P, D\)"),
    "keys in another order": (
        lambda h: h.update(__metadata__=h.pop("__metadata__")),
        "bytes are not in canonical form",
    ),
    "signatures are no text": (lambda h: h["__metadata__"].update({SIGNATURES_KEY: []}), "signatures: expected a list"),
    "signatures are no list": (
        lambda h: h["__metadata__"].update({SIGNATURES_KEY: "{}"}),
        "signatures: expected a list",
    ),
    "no signature in the list": (
        lambda h: h["__metadata__"].update({SIGNATURES_KEY: "[]"}),
        "signatures: expected a list",
    ),
    "17 signatures": (
        lambda h: h["__metadata__"].update({SIGNATURES_KEY: json.dumps([0] * 17)}),
        "signatures: expected a list",
    ),
    "signature without a key": (
        lambda h: h["__metadata__"].update({SIGNATURES_KEY: '[{"signature":""}]'}),
        "signatures: a signature",
    ),
    "short signature": (
        lambda h: h["__metadata__"].update({SIGNATURES_KEY: json.dumps([{"key_id": "a" * 64, "signature": "00"}])}),
        "64 bytes",
    ),
    "two signatures of one key": (
        lambda h: h["__metadata__"].update(
            {SIGNATURES_KEY: canonical_json([s.as_dict() for s in SMALL.signatures[:1] * 2]).decode()}
        ),
        "one a key",
    ),
    "signatures not sorted": (
        lambda h: h["__metadata__"].update(
            {SIGNATURES_KEY: canonical_json([s.as_dict() for s in SMALL.signatures[::-1]]).decode()}
        ),
        "bytes are not in canonical",
    ),
    "signatures with white space": (
        lambda h: h["__metadata__"].update({SIGNATURES_KEY: json.dumps([s.as_dict() for s in SMALL.signatures])}),
        "bytes are not in canonical",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(case):
    change, match = HEADERS[case]
    started = time.perf_counter()
    with pytest.raises(PatchFormatError, match=match):
        parse_patch(with_header(SMALL, change))
    assert time.perf_counter() - started < 1


MANIFESTS = {
    "unknown key": (set_key("exec", "x"), r"unknown or missing: \['exec'\]"),
    "missing key": (lambda m: m.pop("summary"), r"unknown or missing: \['summary'\]"),
    "newer version": (set_key("format_version", 4), "format version: expected 1 to 3, found 4"),
    "version is a list": (set_key("format_version", [1]), "format version: expected 1"),
    "version is true": (set_key("format_version", True), "format version: expected 1"),
    "base is a text": (set_key("base", "x"), "base: a str is out of place"),
    "base with more": (lambda m: m["base"].update(x=1), "model spec: expected the fields"),
    "base of other types": (lambda m: m["base"].update(hidden_size="2"), "model spec: hidden_size must be int"),
    "canary is a list": (set_key("canary", []), "canary: a list is out of place"),
    "canary with more": (set_key("canary", {"prompts": [], "x": 1}), "canary: expected an object"),
    "canary without prompts": (set_key("canary", {"prompts": []}), "canary: expected a prompt"),
    "canary that proves nothing": (
        set_key("canary", {"prompts": [{"tokens": [1], "token_ids": [1, 2], "bare": [1, 2], "patched": [1, 2]}]}),
        "that the patch moves",
    ),
    "canary beyond the vocabulary": (
        set_key("canary", {"prompts": [{"tokens": [8], "token_ids": [1, 2], "bare": [1, 2], "patched": [0, 2]}]}),
        "vocabulary's 8",
    ),
    "sketch with more": (set_key("weight_sketch", {"x": 1}), "weight sketch: expected an object"),
    "digest of no tensor": (lambda m: m["tensors"].update(x="0" * 64), "tensor x: its SHA-256"),
    "no digest": (set_key("tensors", {}), "tensor prompt_embeddings: its SHA-256"),
    "another digest": (set_key("tensors", {"prompt_embeddings": "0" * 64}), "tensor prompt_embeddings: its SHA-256"),
    "digest is no text": (set_key("tensors", {"prompt_embeddings": None}), "tensor prompt_embeddings: its SHA-256"),
    "another P": (set_key("num_virtual_tokens", 2), "num_virtual_tokens: expected 1, found 2"),
    "P of another type": (set_key("num_virtual_tokens", 1.5), "num_virtual_tokens: a float is out of place"),
    "another width": (lambda m: m["base"].update(hidden_size=3), r"prompt_embeddings: expected \(1, 3\)"),
}


@pytest.mark.parametrize(
    ("patch", "version"),
    [
        (FULL, 1),
        (SMALL, 1),
        (MOVING, 2),
        (replace(MOVING, anchoring=None), 2),
        (replace(MOVING, anchoring=None, rotation=None), 1),
    ],
)
def test_a_patch_is_written_as_the_first_version_that_can_say_it(patch, version):
    assert json.loads(patch.manifest)["format_version"] == version
    assert ("rotation" in json.loads(patch.manifest)) == (version == 2)
    assert parse_patch(patch_bytes(patch)).manifest == patch.manifest


def set_in(part: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest[part].__setitem__(key, value)


def of_version_1(manifest: dict[str, Any]) -> None:
    manifest["format_version"] = 1


MOVEMENTS = {
    "version 1 with the keys of 2": (of_version_1, r"unknown or missing: \['anchoring', 'rotation'\]"),
    "version 2 without one": (lambda m: m.pop("anchoring"), r"unknown or missing: \['anchoring'\]"),
    "version 2 without need": (lambda m: m.update(rotation=None, anchoring=None), "not in canonical form"),
    "newer version": (set_key("format_version", 4), "format version: expected 1 to 3, found 4"),
    "an anchoring alone": (set_key("rotation", None), "anchoring: expected a rotation as well"),
    "rotation is a list": (set_key("rotation", []), "rotation: a list is out of place"),
    "rotation with more": (set_in("rotation", "x", 1), "rotation: expected an object"),
    "rotation with less": (lambda m: m["rotation"].pop("neighbours"), "rotation: expected an object"),
    "neighbours is a number": (set_in("rotation", "neighbours", 0), "neighbours: expected true or false"),
    "layers is a text": (set_in("rotation", "layers", "012"), "layers: expected a list"),
    "a layer is true": (set_in("rotation", "layers", [0, True, 1]), "layers: expected a list"),
    "a layer is a fraction": (set_in("rotation", "layers", [0, None, 0.5]), "layers: expected a list"),
    "a layer is a text": (set_in("rotation", "layers", [0, None, "1"]), "layers: expected a list"),
    "fewer layers": (set_in("rotation", "layers", [0, 1]), "expected 3 layers of at most 2 dimensions, found 2 of 2"),
    "more layers": (set_in("rotation", "layers", [0, None, 1, 1]), "expected 3 layers"),
    "no layers": (set_key("rotation", {"tables": [], "layers": [], "neighbours": False}), "tables, numbered"),
    "a table that is not there": (set_in("rotation", "layers", [0, 1, 2]), "tables, numbered"),
    "a table that nobody uses": (set_in("rotation", "layers", [0, None, 0]), "tables, numbered"),
    "a negative table": (set_in("rotation", "layers", [0, 1, -1]), "tables, numbered"),
    "tables in another order": (
        set_key("rotation", {"tables": [[1e-7], [1]], "layers": [1, None, 0], "neighbours": False}),
        "numbered from 0 as the layers use them",
    ),
    "one table twice": (set_in("rotation", "tables", [[1], [1]]), "different tables"),
    "neighbours where nothing turns": (
        set_key("rotation", {"tables": [], "layers": [None] * 3, "neighbours": True}),
        "no neighbours where nothing turns",
    ),
    "tables is an object": (set_in("rotation", "tables", {}), "tables: expected lists of numbers"),
    "a table is a number": (set_in("rotation", "tables", [1, [1e-7]]), "tables: expected lists of numbers"),
    "a table without a frequency": (set_in("rotation", "tables", [[1], []]), "a frequency or more in each table"),
    "a frequency is a text": (set_in("rotation", "tables", [["1"], [1e-7]]), "tables: expected lists of numbers"),
    "a frequency is true": (set_in("rotation", "tables", [[True], [1e-7]]), "tables: expected lists of numbers"),
    "a frequency is null": (set_in("rotation", "tables", [[None], [1e-7]]), "tables: expected lists of numbers"),
    "a frequency is negative": (set_in("rotation", "tables", [[1], [-1e-7]]), "frequencies from 0 to"),
    "a frequency of more than half a turn": (set_in("rotation", "tables", [[3.2], [1]]), "frequencies from 0 to"),
    "a frequency beyond all bounds": (set_in("rotation", "tables", [[1e308], [1]]), "frequencies from 0 to"),
    "more frequencies than half a head": (
        set_in("rotation", "tables", [[1, 0.5], [1]]),
        "at most 2 dimensions, found 3 of 4",
    ),
    "anchoring is a number": (set_key("anchoring", 128), "anchoring: a int is out of place"),
    "anchoring with more": (set_in("anchoring", "x", 1), "anchoring: expected an object"),
    "anchoring with less": (lambda m: m["anchoring"].pop("block"), "anchoring: expected an object"),
    "an anchoring that never moves": (
        set_key("anchoring", {"block": 0, "turn_tokens": []}),
        "a block length or tokens that open a turn",
    ),
    **{
        f"a block of {block!r}": (set_in("anchoring", "block", block), "anchoring")
        for block in (7, 513, 1, -8, 2**53 - 1, 8.5, True, None, "128", [128])
    },
    **{
        f"turn tokens {ids!r:.60}": (set_in("anchoring", "turn_tokens", ids), "anchoring")
        for ids in ([5, 3], [3, 3], [8], [-1], [3.5], [True], [None], ["3"], 3, None, {}, [*range(9)], [2**53 - 1])
    },
}


@pytest.mark.parametrize("case", MOVEMENTS)
def test_movements_that_are_refused(case):
    change, match = MOVEMENTS[case]
    data = crafted(MOVING, change)
    with pytest.raises(PatchFormatError, match=match):
        parse_patch(data)
    with pytest.raises(format_reader.Refused):
        format_reader.read(data)


@pytest.mark.parametrize(
    "change",
    [
        {"rotation": Rotation((), (None,) * 3)},
        {"rotation": Rotation(((0.0,),), (None, 0, 0), neighbours=True)},
        {"rotation": Rotation(((3.141592653589793,), (0.0,)), (0, 1, 1))},
        {"anchoring": None},
        *[{"anchoring": Anchoring(*values)} for values in ((8,), (512,), (0, (0,)), (8, tuple(range(8))))],
    ],
)
def test_movements_at_the_edge_are_accepted(change):
    data = patch_bytes(replace(MOVING, **change))
    assert format_reader.read(data) and all(getattr(parse_patch(data), key) == value for key, value in change.items())


def test_what_moves_fits_its_base():
    for change, match in [
        ({"rotation": None}, "anchoring: expected a rotation as well"),
        ({"rotation": Rotation(((1.0,),), (0, 0))}, "expected 3 layers"),
        ({"rotation": Rotation(((1.0, 0.5),), (0, 0, 0))}, "at most 2 dimensions"),
        ({"anchoring": Anchoring(0, (8,))}, "turn tokens below the vocabulary's 8, found 8"),
        ({"anchoring": Anchoring(0, (-1,))}, "turn tokens below the vocabulary's 8, found -1"),
    ]:
        with pytest.raises(PatchFormatError, match=match):
            replace(MOVING, **change)


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_are_refused(case):
    change, match = MANIFESTS[case]
    with pytest.raises(PatchFormatError, match=match):
        parse_patch(crafted(SMALL, change))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"sequence":1', '"sequence":1.0', "sequence: a float|not in canonical form"),
        ('"rope_theta":10000', '"rope_theta":1e4', "not in canonical form"),
        ('"rope_theta":10000', '"rope_theta":10000.0', "not in canonical form"),
        ('"rope_theta":10000', '"rope_theta":1e400', "finite numbers"),
        ('"rope_theta":10000', '"rope_theta":Infinity', "finite numbers"),
        ('"parts":[]', '"parts": []', "not in canonical form"),
        ('"name":"tiny"', '"name":"t\\u0069ny"', "not in canonical form"),
        ('"name":"tiny"', '"name":"tiny","name":"tiny"', "a key appears twice"),
        ('"training":{}', '"training":{"x":"\\ud800"}', "surrogate"),
        ('"training":{}', '"training":{"x":' + "[" * 15 + "]" * 15 + "}", "16 levels"),
        ('"training":{}', '"training":{"b":1,"a":2}', "not in canonical form"),
        ('"weight_sketch":null}', '"weight_sketch":null} ', "not in canonical form"),
    ],
)
def test_manifests_in_other_forms_are_refused(old, new, match):
    header, body = taken_apart(patch_bytes(SMALL))
    text = header["__metadata__"][METADATA_KEY]
    assert text.count(old) == 1
    header["__metadata__"][METADATA_KEY] = text.replace(old, new)
    with pytest.raises(PatchFormatError, match=match):
        parse_patch(assembled(header, body))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [*[(v, d) for v in (np.nan, np.inf, -np.inf) for d in ("<f4", "<f2")], (65536.0, "<f4"), (-1e30, "<f4")],
)
def test_values_of_tensors_are_bounded(value, dtype):
    """With digests and signatures that fit: the vendor's own mistake."""
    name = "prompt_embeddings" if dtype == "<f4" else "past_key_values.0.key"
    header, body = taken_apart(patch_bytes(FULL))
    begin, end = header[name]["data_offsets"]
    raw = np.frombuffer(body[begin:end], dtype).copy()
    raw[-1] = value
    body = body[:begin] + raw.tobytes() + body[end:]
    manifest = parse_json(header["__metadata__"][METADATA_KEY].encode(), "manifest")
    manifest["tensors"][name] = hashlib.sha256(raw.tobytes()).hexdigest()
    header["__metadata__"][METADATA_KEY] = canonical_json(manifest).decode()
    with pytest.raises(PatchFormatError, match=r"values|NaN"):
        parse_patch(assembled(header, body))


def test_tensors_of_another_dtype_are_refused():
    header, body = taken_apart(patch_bytes(SMALL))
    header["prompt_embeddings"].update(dtype="F16", shape=[2, 2])
    with pytest.raises(PatchFormatError, match="float32"):
        parse_patch(assembled(header, body))


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 8, b"PK\3\4"])
def test_bytes_before_between_and_behind_are_refused(extra):
    data = patch_bytes(SMALL)
    start = 8 + int.from_bytes(data[:8], "little")
    for at in (0, 8, start, len(data)):
        with pytest.raises(PatchFormatError):
            parse_patch(data[:at] + extra + data[at:])


def test_other_headers_of_the_same_content_are_refused():
    data = patch_bytes(SMALL)
    header, body = taken_apart(data)
    padded = data[8 : len(data) - len(body)] + b" " * 8
    spaced = json.dumps(header, ensure_ascii=False).encode()
    for text in (padded, spaced, spaced.decode().encode("utf-16"), b"\xef\xbb\xbf" + padded):
        with pytest.raises(PatchFormatError):
            parse_patch(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("length", [0, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_lengths_of_the_header_are_bounded(length):
    with pytest.raises(PatchFormatError):
        parse_patch(length.to_bytes(8, "little") + patch_bytes(SMALL)[8:])


def test_f2_truncation_at_every_byte():
    data = patch_bytes(FULL)
    for length in range(len(data)):
        with pytest.raises(PatchFormatError):
            parse_patch(data[:length])


def test_f1_every_single_bit():
    """Read and verified, each of all flips is refused. Reading alone lets those through that make another valid manifest."""
    data = patch_bytes(SMALL)
    assert verified(data).digest == SMALL.digest
    unsigned = 0
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            patch = parse_patch(bytes(changed))
        except PatchFormatError:
            continue
        unsigned += 1
        assert patch.digest != SMALL.digest or patch.signatures != SMALL.signatures
        with pytest.raises(UntrustedError):
            verified(bytes(changed))
    assert unsigned > 100  # so many are for the signatures to catch


def test_mix_and_match_tensors_of_another_signed_patch():
    other = golden_patches.minimal()
    other = replace(other, soft_prompt=SoftPrompt(np.array([[1.0, 2.0]], np.float32)))
    for name in ("vendor", "site"):
        other = signed(other, sign(other.manifest, PAYLOAD_TYPE, golden_patches.key(name)))
    verified(patch_bytes(other))
    header, _ = taken_apart(patch_bytes(SMALL))
    _, body = taken_apart(patch_bytes(other))
    with pytest.raises(PatchFormatError, match="SHA-256"):
        parse_patch(assembled(header, body))
    with pytest.raises(UntrustedError):
        verified(patch_bytes(replace(other, signatures=SMALL.signatures)))


# Files that are none.


def test_endless_data(tmp_path):
    """10 GB that take no room on the disk: refused by its size, within 64 MB and a second."""
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as handle:
        handle.write(patch_bytes(SMALL))
        handle.truncate(10 * 2**30)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(PatchFormatError, match=f"expected at most {MAX_FILE_BYTES} bytes"):
            read_patch(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 1 and peak < 2**20


def test_what_grows_while_it_is_read_is_refused():
    with pytest.raises(PatchFormatError, match="at most"):
        parse_patch(bytes(MAX_FILE_BYTES + 1))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "endless device", "missing", "loop"])
def test_no_regular_file(kind, tmp_path):
    path = {"device": Path("/dev/null"), "endless device": Path("/dev/zero")}.get(kind, tmp_path / kind)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    handles = len(os.listdir("/proc/self/fd"))
    started = time.perf_counter()
    with pytest.raises(InputError, match="cannot read patch") as caught:
        read_patch(path)
    assert time.perf_counter() - started < 1 and str(path) in str(caught.value) and caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == handles


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04\x95", b"PK\3\4" + bytes(100), b"GGUF" + bytes(100), b"{}" * 50, bytes(8), bytes(4096)]
)
def test_other_files(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(PatchFormatError) as caught:
        read_patch(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value) and isinstance(caught.value, EdgepatchError) and caught.value.hint


def test_every_field_stands_in_the_manifest_or_beside_it():
    beside = {"soft_prompt", "kv_seed", "signatures"}  # tensors, by their digests; signatures are over the manifest
    assert {field.name for field in fields(Patch)} == ENTRIES.keys() | beside
