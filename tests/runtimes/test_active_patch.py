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
def model(request, tiny_folder):
    if request.param == "onnx":
        return request.getfixturevalue("onnx_folders")["fp32"]
    if request.param == "torch":
        return tiny_folder
    return request.getfixturevalue("tiny_ggufs")["F16"]


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


def test_bare_is_never_what_is_left(tiny_folder, store, tmp_path, monkeypatch):
    """Nothing that is missing makes a model run without its patch: a store, its state, a patch for this very model."""
    with pytest.raises(InputError, match=r"expected the folder .*found nothing there"):
        load_runtime(tiny_folder, store=tmp_path / "mistyped")
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="found nothing there"):
        load_runtime(tiny_folder)
    monkeypatch.delenv("EDGEPATCH_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another home"))
    with pytest.raises(InputError, match="found none of them") as error:
        load_runtime(tiny_folder)
    assert "--bare (Python: patch=None)" in error.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none of them"):
        load_runtime(tiny_folder, store=tmp_path / "empty")
    (store.folder / "state.json").unlink()
    (store.folder / "history.jsonl").unlink()
    with pytest.raises(UntrustedError, match="none, but patches and a trust state"):
        load_runtime(tiny_folder, store=store.folder)


def test_a_model_that_is_not_quite_the_base(tiny_folder, store, tmp_path):
    """One bit of one norm vector makes it another model, which has no patch: that is an error, and it names what differs."""
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_folder, tmp_path / "flipped")
    tensors = load_file(tmp_path / "flipped" / "model.safetensors")
    tensors["model.norm.weight"].view("u4")[0] ^= 1 << 20
    save_file(tensors, tmp_path / "flipped" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"no active patch for this model in .*\n.*weight_fingerprint") as error:
        load_runtime(tmp_path / "flipped", store=store.folder)
    assert [*error.value.differences] == ["weight_fingerprint"] and "--bare" in error.value.hint
    store.deactivate("a trial")
    with pytest.raises(MismatchError):
        load_runtime(tmp_path / "flipped", store=store.folder)
    with load_runtime(tiny_folder, store=store.folder) as session:
        assert session.patch is None, "for this very model it was asked by word"


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
    assert (code, out, f"expected the folder {store.folder / 'none'}" in err) == (2, "", True)
    with monkeypatch.context() as patched:
        patched.delenv("EDGEPATCH_STORE")
        patched.setenv("XDG_DATA_HOME", str(store.folder / "another home"))
        for verb in ("generate", "chat", "serve"):
            prompt = () if verb == "serve" else ("--prompt", PROMPT)
            code, out, err = run(patched, capsys, verb, tiny_folder, *prompt)
            assert (code, out, "found none of them" in err, "--bare" in err) == (2, "", True, True), verb
    pinned = f"sha256:{tiny_patch.digest}"
    code, out, _ = generate(monkeypatch, capsys, tiny_folder, "--store", store.folder, "--patch", pinned)
    assert json.loads(out)["system_fingerprint"].endswith(tiny_patch.digest[:12])
    assert generate(monkeypatch, capsys, tiny_folder, "--bare", "--patch", pinned)[0] == 2
    store.patch_path(tiny_patch.digest).write_bytes(b"x")
    assert generate(monkeypatch, capsys, tiny_folder, "--store", store.folder)[0] == 3


def test_a_patch_file_beside_a_trust_root_says_that_nobody_was_asked(
    monkeypatch, capsys, tiny_folder, tiny_patch, tmp_path
):
    from kit.stores import make_store

    file = tmp_path / "tiny.safetensors"
    write_patch(tiny_patch, file)
    for root, expected in ((True, True), (False, False)):
        folder = make_store(tmp_path / "rooted").folder if root else Store(tmp_path / "rootless").folder
        folder.mkdir(exist_ok=True)
        code, _, err = generate(monkeypatch, capsys, tiny_folder, "--store", folder, "--patch", file)
        assert (code, f"not asked of this device's trust root: {file}" in err) == (0, expected)


def test_deep_verification(monkeypatch, capsys, tiny_folder, store, tiny_patch, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "verify", "--deep", "--model", tiny_folder, "--store", store.folder)
    assert (code, "torch F32" in out) == (0, True)
    code, _, err = run(monkeypatch, capsys, "verify", "--deep", "--model", tiny_folder, "--store", tmp_path / "none")
    assert (code, "found nothing there" in err) == (2, True)
    store.deactivate("a trial")
    code, _, err = run(monkeypatch, capsys, "verify", "--deep", "--model", tiny_folder, "--store", store.folder)
    assert (code, "expected an active patch" in err) == (1, True)


def test_deep_verification_needs_a_canary(monkeypatch, capsys, tiny_folder, tiny_patch, tmp_path):
    from dataclasses import replace

    write_patch(replace(tiny_patch, canary=None), tmp_path / "mute.safetensors")
    device = Store(tmp_path / "store")
    device.apply(tmp_path / "mute.safetensors", Allowances(unsigned="test"))
    code, _, err = run(monkeypatch, capsys, "verify", "--deep", "--model", tiny_folder, "--store", device.folder)
    assert (code, "expected a canary" in err) == (1, True)
