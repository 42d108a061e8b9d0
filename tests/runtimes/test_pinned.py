"""A patch that moves, left at the start of the text by word: on every backend, and on models that cannot move it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from edgepatch import cli
from edgepatch.bench.parity import models as parity_models
from edgepatch.converters.hf import folders, seeds
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import Patch, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.tensors import Canary, KVSeed, SoftPrompt
from kit.serving import running
from kit.tiny_folders import copy_folder

BLOCK = 16
TEXT = [int(token) for token in np.random.default_rng(5).integers(3, 512, 3 * BLOCK)]
EXACT = {"kv_type": "f32", "flash_attention": False, "num_threads": 1}


@pytest.fixture(scope="module")
def moving(tiny_folder, tiny_patch) -> Patch:
    """The tiny patch as one that moves every 16 tokens; the last prompt of its canary is longer than two blocks."""
    patch = replace(tiny_patch, name="moving", anchoring=None)
    model = folders.load_model(tiny_folder)
    patch = seeds.complete(replace(seeds.complete(patch, model), anchoring=Anchoring(BLOCK)), model)
    assert [len(prompt.tokens) for prompt in patch.canary.prompts] == [1, 2, 3, 2 * BLOCK + 2]
    return patch


@pytest.fixture(scope="module")
def gguf_file(tiny_ggufs):
    return tiny_ggufs["F32"]


@pytest.fixture(params=["llamacpp", "onnx", "torch"])
def place(request, tiny_folder):
    """(model, options) of each backend."""
    if request.param == "onnx":
        pytest.importorskip("onnxruntime_genai")
        return request.getfixturevalue("onnx_folders")["fp32"], {"num_threads": 1}
    return (request.getfixturevalue("gguf_file"), EXACT) if request.param == "llamacpp" else (tiny_folder, {})


def test_a_pinned_seed_is_one_that_never_moves(place, moving):
    model, options = place
    with load_runtime(model, replace(moving, anchoring=None, canary=None), **options) as still:
        expected = still.logits(TEXT)
        assert not still.slot.is_pinned and still.slot.notes == ()
    with load_runtime(model, moving, **options) as moved:
        assert np.abs(moved.logits(TEXT)[BLOCK:] - expected[BLOCK:]).max() > 1e-2, "or the test cannot fail"
        assert moved.slot.place == "moves: every 16 tokens" and moved.slot.notes == ()
        fingerprint = moved.system_fingerprint
    with load_runtime(model, moving, pinned=True, **options) as pinned:
        assert np.abs(pinned.logits(TEXT) - expected).max() < 1e-4
        assert pinned.patch is moving and pinned.slot.is_pinned
        assert pinned.system_fingerprint == f"{fingerprint}-pinned" and moving.digest[:12] in fingerprint
        assert pinned.slot.place.startswith("pinned to the start of the text by word")
        assert len(pinned.slot.notes) == 1 and "hold fades" in pinned.slot.notes[0]
        pinned.prove()
        assert pinned.patch is moving and np.abs(pinned.logits(TEXT) - expected).max() < 1e-4


def test_the_word_holds_for_every_patch_of_the_session(tiny_folder, tiny_patch, moving):
    with load_runtime(tiny_folder, tiny_patch, pinned=True) as session:
        assert not session.slot.is_pinned and session.slot.notes == ()
        assert not session.system_fingerprint.endswith("-pinned"), (
            "a patch that stays anyway is pinned without the word"
        )
        session.swap(moving)
        assert session.slot.is_pinned and session.patch is moving and session.sequences.anchoring is None
        broken = replace(tiny_patch, kv_seed=None, soft_prompt=SoftPrompt(-tiny_patch.soft_prompt.embeddings))
        with pytest.raises(InactivePatchError):
            session.swap(broken)
        assert session.slot.is_pinned and session.patch is moving and session.slot.notes
        session.swap(None)
        assert session.patch is None and not session.slot.is_pinned
        assert session.system_fingerprint.endswith("+bare") and (session.slot.place, session.slot.notes) == ("", ())


def test_a_seed_without_a_confirmed_layout_runs_pinned(gguf_file, moving):
    """The stored seed is not what the model computes, so how its keys are ordered is not known; its soft prompt is evaluated instead."""
    rng = np.random.default_rng(0)
    wrong = KVSeed(*[tuple(rng.standard_normal(k.shape).astype(np.float16) for k in moving.kv_seed.keys) for _ in "kv"])
    patch = replace(moving, kv_seed=wrong)
    with pytest.raises(InactivePatchError, match="cannot be moved") as caught:
        load_runtime(gguf_file, patch, **EXACT)
    assert "--pinned" in caught.value.hint
    with load_runtime(gguf_file, patch, pinned=True, **EXACT) as session:
        assert session.slot.is_pinned and session.seed_route == "decoded"


def test_frequencies_by_length_refuse_what_moves_and_run_it_pinned(tiny_folder, tiny_patch, tmp_path):
    folder = copy_folder(tiny_folder, tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    rotation, rule = Rotation(((1.0,),), (0, 0)), Anchoring(BLOCK)
    base = folders.read_spec(folder)
    patch = replace(tiny_patch, base=base, weight_sketch=None, rotation=rotation, anchoring=rule)
    with pytest.raises(InputError, match=r"depend on the length of the text \(dynamic\)") as caught:
        load_runtime(folder, patch)
    assert "--pinned" in caught.value.hint
    with load_runtime(folder, patch, pinned=True) as session:
        assert session.slot.is_pinned
        with pytest.raises(InputError, match="depend on the length"):
            load_runtime(folder, None).swap(patch)


def test_recurrent_layers_refuse_what_moves_and_run_it_pinned(tmp_path):
    parity_models.build_folder(parity_models.architecture("lfm2"), tmp_path)
    spec = folders.read_spec(tmp_path)
    embeddings = (np.random.default_rng(3).standard_normal((8, spec.hidden_size)) * 0.1).astype(np.float32)
    rotation = Rotation(((1.0,),), (0,) * spec.num_hidden_layers)
    patch = seeds.complete(Patch("recurrent", "1.0.0", spec, SoftPrompt(embeddings)), folders.load_model(tmp_path))
    patch = replace(patch, rotation=rotation, anchoring=Anchoring(BLOCK))
    with pytest.raises(InputError, match="recurrent layers") as caught:
        load_runtime(tmp_path, patch)
    assert "--pinned" in caught.value.hint
    with load_runtime(tmp_path, patch, pinned=True) as session:
        assert session.slot.is_pinned


# The canary.


def test_prompts_longer_than_the_context_are_skipped_and_told(gguf_file, moving):
    """A part of a canary is no proof for later: a load with room asks all of it."""
    patch = replace(moving, version="3.0.0")
    with load_runtime(gguf_file, patch, context_length=30, **EXACT) as session:
        assert session.slot.notes == (
            "moving 3.0.0: not all of its canary was asked: 1 of 4 prompts are longer than the context of 30 holds",
        )
        assert not session.backend.proofs.has_proved(patch.digest)
    with load_runtime(gguf_file, patch, context_length=60, **EXACT) as session:
        assert session.slot.notes == () and session.backend.proofs.has_proved(patch.digest)


def test_a_pinned_proof_is_none_of_the_moving_seed(gguf_file, moving):
    patch = replace(moving, version="2.0.0")
    with load_runtime(gguf_file, patch, pinned=True, **EXACT) as session:
        assert not session.backend.proofs.has_proved(patch.digest)
        assert session.backend.proofs.has_proved(replace(patch, anchoring=None).digest)


def test_a_canary_that_cannot_be_asked_at_all_is_no_proof(tiny_folder, gguf_file, moving):
    long = replace(moving, canary=Canary(moving.canary.prompts[-1:]))
    with pytest.raises(InactivePatchError, match="expected a prompt of at most 20 tokens, which is what the context"):
        load_runtime(gguf_file, long, context_length=30, **EXACT)
    with pytest.raises(InactivePatchError, match="expected a prompt that a pinned seed can be asked, found none"):
        load_runtime(tiny_folder, long, pinned=True)
    load_runtime(tiny_folder, long).close()


# What is told.


@pytest.fixture
def run(monkeypatch, capfd):
    """Arguments -> (exit code, stdout, stderr) of the entry point, in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def test_the_command_line_takes_the_word_and_repeats_it(run, tiny_folder, moving, tmp_path):
    file = tmp_path / "moving.safetensors"
    write_patch(moving, file)
    asked = ["generate", tiny_folder, "--patch", file, "--prompt", "The", "--max-new-tokens", 1]
    code, _, err = run(*asked)
    assert code == 0 and "; moves: every 16 tokens; torch" in err and "pinned" not in err
    code, out, err = run(*asked, "--pinned", "--json")
    assert code == 0 and json.loads(out)["system_fingerprint"].endswith("-pinned")
    assert err.count("pinned to the start of the text by word: its hold fades") == 2
    code, _, err = run("chat", tiny_folder, "--patch", file, "--prompt", "Hi", "--max-new-tokens", 1, "--pinned")
    assert code == 0 and "-pinned" in err


def test_the_server_says_that_the_seed_is_pinned(tiny_folder, moving):
    with running(lambda: load_runtime(tiny_folder, moving, pinned=True)) as server, server.client() as http:
        listed = http.get("/v1/patches").json()
        assert listed["system_fingerprint"].endswith("-pinned")
        (entry,) = listed["data"]
        assert entry["digest"] == moving.digest and entry["pinned"] and entry["place"].startswith("pinned to the start")
        assert any("hold fades" in note for note in http.get("/health").json()["notes"])
        assert "-pinned" in http.get("/metrics").text
    with running(lambda: load_runtime(tiny_folder, moving)) as server, server.client() as http:
        (entry,) = http.get("/v1/patches").json()["data"]
        assert not entry["pinned"] and entry["place"] == "moves: every 16 tokens"
        assert "notes" not in http.get("/health").json()
