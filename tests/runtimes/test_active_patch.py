"""Runtimes load what the store says: the active patch by default, none on purpose, one by its digest."""

from __future__ import annotations

import json
import sys

import pytest

from edgepatch.cli import main
from edgepatch.errors import InputError, MismatchError, UntrustedError
from edgepatch.patch.file import write_patch
from edgepatch.runtimes import ACTIVE, find_patch, load_runtime, read_spec
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances

PROMPT = "The quick brown fox"


@pytest.fixture
def store(tiny_patch, tmp_path):
    """A store with the tiny model's patch in it."""
    write_patch(tiny_patch, tmp_path / "tiny.safetensors")
    device = Store(tmp_path / "store")
    device.apply(tmp_path / "tiny.safetensors", Allowances(unsigned="test"))
    return device


@pytest.fixture(params=["torch", "llamacpp", "onnx"])
def model(request, tiny_folder, tmp_path_factory):
    if request.param == "onnx":
        return request.getfixturevalue("onnx_folders")["fp32"]
    if request.param == "torch":
        return tiny_folder
    from edgepatch.converters.gguf import writer

    path = tmp_path_factory.mktemp("gguf") / "tiny-F16.gguf"
    writer.convert_folder(tiny_folder, path, "F16")
    return path


def test_the_active_patch_is_loaded(model, store, tiny_patch):
    assert read_spec(model) == tiny_patch.base
    with load_runtime(model, store=store.folder) as runtime, load_runtime(model, tiny_patch) as by_hand:
        assert runtime.patch.digest == tiny_patch.digest
        assert runtime.system_fingerprint == by_hand.system_fingerprint
        assert (runtime.logits(PROMPT) == by_hand.logits(PROMPT)).all()


def test_none_is_on_purpose(tiny_folder, store):
    with load_runtime(tiny_folder, None, store=store.folder) as runtime:
        assert runtime.patch is None


def test_by_digest(tiny_folder, store, tiny_patch):
    with load_runtime(tiny_folder, f"sha256:{tiny_patch.digest}", store=store.folder) as runtime:
        assert runtime.patch.digest == tiny_patch.digest
    with pytest.raises(InputError, match="found 0"):
        load_runtime(tiny_folder, "sha256:" + "0" * 64, store=store.folder)
    assert find_patch(None) is None


def test_a_store_without_a_patch_for_the_model(tiny_folder, tmp_path):
    with load_runtime(tiny_folder, store=tmp_path / "none") as runtime:
        assert runtime.patch is None


def test_a_tampered_store_is_refused(tiny_folder, store, tiny_patch):
    path = store.patch_path(tiny_patch.digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for choice in (ACTIVE, f"sha256:{tiny_patch.digest}"):
        with pytest.raises(UntrustedError):
            load_runtime(tiny_folder, choice, store=store.folder)
    (store.folder / "state.json").write_bytes(b"{}")
    with pytest.raises(UntrustedError):
        load_runtime(tiny_folder, store=store.folder)


def test_apply_for_a_model(tiny_folder, tiny_patch, tmp_path):
    from kit.stores import write

    with pytest.raises(MismatchError):
        Store(tmp_path / "store").apply(write(tmp_path), Allowances(unsigned="test"), model=read_spec(tiny_folder))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    return code, *capsys.readouterr()


def generate(monkeypatch, capsys, *arguments):
    return run(monkeypatch, capsys, "generate", *arguments, "--prompt", PROMPT, "--max-new-tokens", 2, "--json")


def test_generate(monkeypatch, capsys, tiny_folder, store, tiny_patch):
    code, out, err = generate(monkeypatch, capsys, tiny_folder, "--store", store.folder)
    assert code == 0
    assert json.loads(out)["system_fingerprint"].endswith(tiny_patch.digest[:12])
    assert f"the active patch of {store.folder}" in err
    code, out, err = generate(monkeypatch, capsys, tiny_folder, "--store", store.folder, "--bare")
    assert (code, json.loads(out)["system_fingerprint"][-4:], "no patch" in err) == (0, "bare", True)
    code, out, err = generate(monkeypatch, capsys, tiny_folder, "--store", store.folder / "none")
    assert (code, f"no patch for this model in {store.folder / 'none'}" in err) == (0, True)
    pinned = f"sha256:{tiny_patch.digest}"
    code, out, _ = generate(monkeypatch, capsys, tiny_folder, "--store", store.folder, "--patch", pinned)
    assert json.loads(out)["system_fingerprint"].endswith(tiny_patch.digest[:12])
    assert generate(monkeypatch, capsys, tiny_folder, "--bare", "--patch", pinned)[0] == 2
    store.patch_path(tiny_patch.digest).write_bytes(b"x")
    assert generate(monkeypatch, capsys, tiny_folder, "--store", store.folder)[0] == 3


def test_deep_verification(monkeypatch, capsys, tiny_folder, store, tiny_patch, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "verify", "--deep", "--model", tiny_folder, "--store", store.folder)
    assert (code, "torch F32" in out) == (0, True)
    code, _, err = run(monkeypatch, capsys, "verify", "--deep", "--model", tiny_folder, "--store", tmp_path / "none")
    assert (code, "expected an active patch" in err) == (1, True)


def test_deep_verification_needs_a_canary(monkeypatch, capsys, tiny_folder, tiny_patch, tmp_path):
    from dataclasses import replace

    write_patch(replace(tiny_patch, canary=None), tmp_path / "mute.safetensors")
    device = Store(tmp_path / "store")
    device.apply(tmp_path / "mute.safetensors", Allowances(unsigned="test"))
    code, _, err = run(monkeypatch, capsys, "verify", "--deep", "--model", tiny_folder, "--store", device.folder)
    assert (code, "expected a canary" in err) == (1, True)
