"""Composed patches: what the model computes with one is what it computes with the parts' embeddings in a row."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders, seeds
from edgepatch.errors import InactivePatchError, InputError, MismatchError, PatchFormatError
from edgepatch.patch.file import PAYLOAD_TYPE, Patch, patch_bytes, read_patch, signed, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import SoftPrompt
from edgepatch.training import composition
from edgepatch.training.composition import compose
from edgepatch.trust.signatures import sign
from kit.stores import KEYS

TOKENS = [1, 17, 230, 5, 99, 404, 41, 8]


@pytest.fixture(scope="module")
def parts(tiny_patch) -> list[Patch]:
    rng = np.random.default_rng(5)
    prompt = SoftPrompt((rng.standard_normal((7, tiny_patch.base.hidden_size)) * 0.3).astype(np.float32))
    first = signed(tiny_patch, sign(tiny_patch.manifest, PAYLOAD_TYPE, KEYS["vendor"]))
    second = Patch(
        "second",
        "2.0.0",
        tiny_patch.base,
        prompt,
        evaluation={"emt": 0.1},
        license="MIT",
        expires="2031-01-01T00:00:00Z",
    )
    return [replace(first, license="Apache-2.0"), second]


@pytest.fixture(scope="module")
def composed(parts, tiny_folder) -> Patch:
    return compose(parts, tiny_folder, "both", "1.0.0")


def test_it_computes_what_the_parts_in_a_row_compute(parts, composed, tiny_folder, oracle):
    embeddings = np.concatenate([part.soft_prompt.embeddings for part in parts])
    assert composed.num_virtual_tokens == 17
    expected = oracle(TOKENS, SoftPrompt(embeddings))
    with load_runtime(tiny_folder, composed) as runtime:
        logits = runtime.logits(TOKENS)
    assert np.abs(logits - expected).max() < 2e-2  # the seed is float16
    with load_runtime(tiny_folder, replace(composed, kv_seed=None)) as runtime:
        assert np.abs(runtime.logits(TOKENS) - expected).max() < 1e-4
    assert np.abs(oracle(TOKENS, SoftPrompt(embeddings[::-1].copy())) - expected).max() > 0.5, "the order matters"


def test_its_seed_is_not_the_seeds_of_its_parts(parts, composed, tiny_folder):
    assert composed.kv_seed.keys[0].dtype == np.float16
    assert np.abs(composed.kv_seed.keys[0][:, :10] - parts[0].kv_seed.keys[0]).max() < 1e-2, (
        "the first part stands where it stood"
    )
    alone = seeds.compute_kv_seed(folders.load_model(tiny_folder), parts[1].soft_prompt)
    for layer in range(2):
        assert np.abs(composed.kv_seed.keys[layer][:, 10:] - alone.keys[layer]).max() > 0.1, (
            "the second one stands behind it"
        )


def test_its_manifest_tells_what_it_is(parts, composed):
    assert composed.parts == tuple(part.digest for part in parts)
    assert (composed.evaluation, composed.signatures, composed.created) == ({}, (), "")
    assert (composed.license, composed.expires, composed.channel) == (
        "Apache-2.0 AND MIT",
        "2031-01-01T00:00:00Z",
        "stable",
    )
    assert [part["name"] for part in composed.training["parts"]] == ["tiny", "second"]
    assert composed.canary is not None and composed.weight_sketch is not None


def test_its_canary_is_its_own(parts, composed, tiny_folder):
    with load_runtime(tiny_folder, composed) as runtime:
        assert runtime.patch is composed
    with pytest.raises(InactivePatchError), load_runtime(tiny_folder, replace(composed, canary=parts[0].canary)):
        pass


def test_the_same_parts_give_the_same_bytes(parts, composed, tiny_folder):
    assert patch_bytes(compose(parts, tiny_folder, "both", "1.0.0")) == patch_bytes(composed)
    other = compose(parts[::-1], tiny_folder, "both", "1.0.0", created="2026-11-21T10:00:00Z", license="MIT")
    assert other.parts == composed.parts[::-1] and other.digest != composed.digest
    assert (other.created, other.license) == ("2026-11-21T10:00:00Z", "MIT")


def test_a_gguf_file_of_full_precision_will_do(parts, composed, tiny_folder, tmp_path):
    writer.convert_folder(tiny_folder, tmp_path / "F16.gguf", "F16")
    patch = compose(parts, tmp_path / "F16.gguf", "both", "1.0.0")
    assert patch.parts == composed.parts
    assert np.abs(patch.kv_seed.keys[1].astype(np.float32) - composed.kv_seed.keys[1].astype(np.float32)).max() < 0.05
    writer.quantize(tmp_path / "F16.gguf", tmp_path / "Q4_0.gguf", "Q4_0")
    with pytest.raises(InputError, match=r"expected full precision .*, found Q4_0"):
        compose(parts, tmp_path / "Q4_0.gguf", "both", "1.0.0")


def test_parts_that_do_not_go_together(parts, tiny_folder):
    first, second = parts
    foreign = replace(second, base=replace(second.base, rope_theta=5e5, tokenizer_digest="0" * 64))
    with pytest.raises(MismatchError) as caught:
        compose([first, foreign], tiny_folder, "x", "1.0.0")
    assert set(caught.value.differences) == {"rope_theta", "tokenizer_digest"}
    with pytest.raises(MismatchError) as caught:
        compose([foreign, foreign], tiny_folder, "x", "1.0.0")
    assert set(caught.value.differences) == {"rope_theta", "tokenizer_digest"}
    with pytest.raises(
        InputError, match=r"tiny 1\.0\.0 .*expected a soft prompt, found a trained K/V prefix"
    ) as refused:
        compose([second, replace(first, soft_prompt=None)], tiny_folder, "x", "1.0.0")
    assert "positions" in refused.value.hint
    with pytest.raises(InputError, match="expected 2 to 64 patches, found 1"):
        compose([first], tiny_folder, "x", "1.0.0")
    with pytest.raises(InputError, match="fewer than the model's context of 512, found 520"):
        compose([first] * 52, tiny_folder, "x", "1.0.0")
    with pytest.raises(PatchFormatError, match="version"):
        compose(parts, tiny_folder, "x", "one")


def test_a_fine_tune_of_the_base_is_refused(parts, tiny_folder, tmp_path):
    model = folders.load_model(tiny_folder)
    for name, weight in model.named_parameters():
        if "mlp" in name:
            weight.mul_(1.05)
    model.save_pretrained(tmp_path / "tuned")
    for file in tiny_folder.glob("tokenizer*"):
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MismatchError, match="weights"):
        compose(parts, tmp_path / "tuned", "x", "1.0.0")


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("MIT", "MIT"), "MIT"),
        (("MIT", ""), ""),
        (("", ""), ""),
        (("A OR B", "MIT"), "(A OR B) AND MIT"),
        (("x" * 100, "y" * 100), ""),
    ],
)
def test_licences(licences, expected):
    assert composition._licence_of(licences) == expected


def test_verb(parts, composed, tiny_folder, tmp_path, capsys):
    from edgepatch.cli import app

    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for part, file in zip(parts, files, strict=True):
        write_patch(part, file)
    out = tmp_path / "both.safetensors"
    with pytest.raises(SystemExit) as done:
        app(
            [
                "compose",
                *map(str, files),
                "-o",
                str(out),
                "--model",
                str(tiny_folder),
                "--name",
                "both",
                "--version",
                "1.0.0",
                "--json",
            ]
        )
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["num_virtual_tokens"] == 17
    assert patch_bytes(read_patch(out)) == patch_bytes(composed)
    with pytest.raises(SystemExit):
        app(["show", str(out)])
    shown = capsys.readouterr().out
    assert "not evaluated" in shown and parts[0].digest[:20] in shown
