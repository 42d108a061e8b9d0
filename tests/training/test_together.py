"""``train-together``: patches go on from what they are, each beside any of the others."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.cli import main
from edgepatch.patch.file import Patch, read_patch, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import SoftPrompt
from edgepatch.training.pairs.preferences import Pair, write_pairs

STEPS = ["--dpo-steps", "4", "--batch-size", "2", "--block", "0", "--no-turns", "--front-tokens", "0"]


@pytest.fixture(scope="module")
def folder(tiny_folder, tiny_patch, tmp_path_factory):
    """A soft prompt with its seed, trained keys and values, one patch for another model, and pairs."""
    from edgepatch.converters.hf import folders, rotary, seeds

    folder, model = tmp_path_factory.mktemp("together"), folders.load_model(tiny_folder)
    rotation, rng = rotary.read_rotation(model), np.random.default_rng(3)
    for name in ("kind", "fair"):
        prompt = SoftPrompt((rng.standard_normal((5, tiny_patch.base.hidden_size)) * 0.3).astype(np.float32))
        patch = seeds.complete(Patch(name, "0.1.0", tiny_patch.base, prompt, rotation=rotation), model)
        patch = replace(patch, training={"kind": "soft_prompt"})
        if name == "fair":
            patch = replace(patch, soft_prompt=None, training={"kind": "kv_prefix"})
        write_patch(patch, folder / f"{name}.safetensors")
    other = replace(patch, name="other", base=replace(tiny_patch.base, weight_fingerprint="0" * 64))
    write_patch(other, folder / "other.safetensors")
    for name, words in (("kind", (" Thanks", " Hell")), ("fair", (" they", " he"))):
        write_pairs([Pair(f"Day {i}:", *words, 0.0, 1.0) for i in range(12)], folder / f"{name}.jsonl")
    write_pairs([Pair("Day", " a", " b", 0.0, 1.0)] * 2, folder / "few.jsonl")
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as done:
        patched.setattr(sys, "argv", ["edgepatch", "train-together", *map(str, words)])
        main()
    return done.value.code, *capsys.readouterr()


def part(folder, patch, pairs=None):
    return f"{folder / patch}.safetensors={folder / (pairs or patch)}.jsonl"


def test_each_goes_on_as_what_it_is_and_is_no_longer_named_as_trained_alone(folder, tiny_folder, tmp_path, capsys):
    words = [tiny_folder, "--part", part(folder, "kind"), "--part", part(folder, "fair"), "--version", "0.2.0", *STEPS]
    code, out, _ = run(capsys, *words, "-o", tmp_path / "new", "--run", tmp_path / "run", "--json")
    assert code == 0
    rows = json.loads(out)["patches"]
    trained = [read_patch(tmp_path / "new" / f"{name}-0.2.0.safetensors") for name in ("kind", "fair")]
    assert [row["digest"] for row in rows] == [patch.digest for patch in trained]
    assert (trained[0].soft_prompt is not None, trained[1].soft_prompt is None) == (True, True)
    for patch in trained:
        before = read_patch(folder / f"{patch.name}.safetensors")
        assert patch.version == "0.2.0" and patch.created and patch.canary is not None
        moved = [np.abs(a - b).max() for a, b in zip(patch.kv_seed.keys, before.kv_seed.keys, strict=True)]
        assert max(moved) > 1e-3, f"{patch.name} was trained"
    assert (tmp_path / "run" / "curves.html").is_file() and (tmp_path / "run" / "train.log").is_file()
    with load_runtime(tiny_folder, trained) as session:
        assert not session.slot.notes
    with load_runtime(
        tiny_folder, [read_patch(folder / f"{name}.safetensors") for name in ("kind", "fair")]
    ) as session:
        assert "trained alone, not for company: fair, kind" in session.slot.notes[0]
    code, _, err = run(capsys, *words, "-o", tmp_path / "new")
    assert code and "kind-0.2.0.safetensors" in err and "--force" in err


def test_company_stays_as_it_is_and_is_recorded(folder, tiny_folder, tmp_path, capsys):
    third = replace(read_patch(folder / "fair.safetensors"), name="third")
    write_patch(third, tmp_path / "third.safetensors")
    words = [tiny_folder, "--part", part(folder, "kind"), "--part", part(folder, "fair"), "--version", "0.2.0", *STEPS]
    code, _, err = run(capsys, *words, "--beside", tmp_path / "third.safetensors", "-o", tmp_path / "new")
    assert code == 0, err
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "fair-0.2.0.safetensors",
        "kind-0.2.0.safetensors",
    ]
    for name in ("kind", "fair"):
        assert read_patch(tmp_path / "new" / f"{name}-0.2.0.safetensors").training["company"] == [third.digest]
    code, _, err = run(capsys, *words, "--beside", folder / "kind.safetensors", "-o", tmp_path / "other")
    assert code and "kind twice" in " ".join(err.split()) and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["kind"], "expected 2 to 12 patches, found 1"),
        (["kind", "kind"], "kind twice"),
        (["kind", "other:fair"], "different bases"),
        (["kind", "fair:few"], "at least 10 pairs, found 2"),
        (["kind", "fair:none"], "none.jsonl"),
        (["kind", "none:fair"], "none.safetensors"),
    ],
)
def test_what_cannot_be_trained_is_said_before_a_model_is_loaded(
    folder, tmp_path, capsys, parts, expected, tiny_folder
):
    words = [word for each in parts for word in ("--part", part(folder, *each.split(":")))]
    code, _, err = run(capsys, tiny_folder, *words, "--version", "0.2.0", "-o", tmp_path / "new", *STEPS)
    assert code and expected in " ".join(err.split()) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", ["kind.safetensors", "kind.safetensors=", "=kind.jsonl"])
def test_a_part_has_a_patch_and_pairs(folder, tmp_path, capsys, wrong, tiny_folder):
    words = ["--part", part(folder, "fair"), "--part", wrong, "--version", "0.2.0", "-o", tmp_path / "new"]
    code, _, err = run(capsys, tiny_folder, *words)
    assert code and f"--part: expected PATCH=PAIRS, found {wrong}" in " ".join(err.split())


def test_a_version_that_no_patch_may_have_is_refused_first(folder, tmp_path, capsys, tiny_folder):
    words = ["--part", "a=b", "--part", "c=d", "--version", "two", "-o", tmp_path / "new"]
    code, _, err = run(capsys, tiny_folder, *words)
    assert code and "version" in err and "two" in err
