"""``edgepatch show`` knows what it is given: every kind of file by name, and a clear error for what it cannot use."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from edgepatch import cli
from edgepatch.converters.gguf import adapters as adapters_gguf
from edgepatch.converters.peft import adapters as peft
from edgepatch.inspection.kinds import Kind, recognise
from edgepatch.patch.file import write_patch
from edgepatch.progress import logged
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances
from edgepatch.training.pairs.files import Pair, write_pairs
from edgepatch.trust.keys import create_key_pair
from edgepatch.trust.signatures import key_id, raw_public_key
from kit import golden_patches, tiny_gguf
from kit.bundle_files import SIGNERS, make_bundle
from kit.stores import make_root, write
from kit.tiny_folders import copy_folder

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench" / "results"
PASSPHRASE = "four random words here"


@pytest.fixture
def show(monkeypatch, capsys, tmp_path):
    """Arguments -> (exit code, stdout, stderr) of `edgepatch show`."""
    (tmp_path / "own-store").mkdir()
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "own-store"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", "show", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", ["patch-v1", "patch-v1-minimal", "patch-v2", "patch-v3"])
def test_a_patch_of_every_version_is_known_by_its_content(show, name, tmp_path):
    """Whatever its file is called."""
    golden = golden_patches.FOLDER / f"{name}.safetensors"
    renamed = tmp_path / "model.bin"
    renamed.write_bytes(golden.read_bytes())
    assert recognise(renamed).kind is Kind.PATCH
    for path in (golden, renamed):
        assert json.loads(show(path, "--json")[1])["kind"] == "patch"
    newer = golden.read_bytes().replace(b'\\"format_version\\":', b'\\"format_version\\":9')
    renamed.write_bytes((int.from_bytes(newer[:8], "little") + 1).to_bytes(8, "little") + newer[8:])
    code, _, err = show(renamed)
    assert recognise(renamed).kind is Kind.PATCH and code == 3
    assert "format version: expected 1 to 3, found 9" in err and "update edgepatch" in err


def require_named(show, path: Path, kind: str, *phrases: str) -> dict:
    """The file is named, people and programs read the same facts, and a last line says what to do with it."""
    code, out, err = show(path)
    assert (code, err) == (0, ""), err
    flat = " ".join(out.split())
    assert flat.startswith(f"kind {kind} ") and " use " in flat
    assert all(text in flat for text in phrases), (phrases, flat)
    facts = json.loads(show(path, "--json")[1])
    assert facts["kind"] == kind and facts["hint"]
    return facts


def require_refused(show, path: Path, *phrases: str, code: int = 2) -> None:
    for flags in ([], ["--json"]):
        exit_code, out, err = show(path, *flags)
        flat = " ".join(err.split())
        assert (exit_code, out) == (code, ""), out + err
        assert str(path) in err.replace("\n", "") and "hint:" in err and "internal error" not in err
        assert all(text in flat for text in phrases), (phrases, flat)


# Files of edgepatch.


def test_keys(show, tmp_path):
    private, public, key = create_key_pair(tmp_path, "vendor", PASSPHRASE)
    facts = require_named(show, public, "public signing key", key_id(raw_public_key(key)))
    assert facts["key_id"] == key_id(raw_public_key(key))
    require_named(show, private, "private signing key", "encrypted yes", "rights 0600")
    plain, _, _ = create_key_pair(tmp_path, "plain", None)
    plain.chmod(0o644)
    require_named(show, plain, "private signing key", "encrypted no", "others can read it")


def test_nothing_of_a_private_key_is_shown(show, tmp_path):
    private, _, key = create_key_pair(tmp_path, "plain", None)
    secrets = [line for line in private.read_text().splitlines() if not line.startswith("-")]
    secrets += [key.private_bytes_raw().hex(), key_id(raw_public_key(key))]
    for flags in ([], ["--json"], ["--all"]):
        code, out, err = show(private, *flags)
        assert code == 0 and not any(secret[:16] in out + err for secret in secrets)


def test_a_trust_root(show, tmp_path):
    root = make_root(created=datetime.now(timezone.utc))
    (tmp_path / "root.json").write_bytes(root.to_bytes())
    require_named(show, tmp_path / "root.json", "trust root", root.fingerprint, "version 1", "vendor")
    (tmp_path / "root.json").write_bytes(root.to_bytes()[:-1] + b" }")
    require_refused(show, tmp_path / "root.json", code=3)


def test_a_bundle(show, tmp_path):
    bundle = make_bundle(tmp_path, keys=SIGNERS, root=True)
    facts = require_named(show, bundle, "bundle", "no wheels", "checked no")
    with tarfile.open(bundle) as tar:
        manifest = json.load(tar.extractfile("manifest.json"))
    assert facts["patch"] == manifest["patch"] and facts["files"] == len(manifest["members"])
    data = bytearray(bundle.read_bytes())
    data[600] ^= 0xFF
    (tmp_path / "bad.tar").write_bytes(data)
    require_refused(show, tmp_path / "bad.tar", code=3)


def test_a_store(show, tmp_path):
    store = Store(tmp_path / "store")
    store.set_root([make_root(created=datetime.now(timezone.utc) - timedelta(days=1))])
    store.apply(write(tmp_path, 1), Allowances("", "", ""))
    require_named(show, tmp_path / "store", "store", "patches 1", "active detox 1.1.0", "errors none")
    (next((tmp_path / "store" / "patches").iterdir())).write_bytes(b"x")
    assert "errors none" not in " ".join(show(tmp_path / "store")[1].split())


def test_pairs_prompts_and_their_provenance(show, tmp_path):
    write_pairs([Pair(f"p{i}", "good", "bad", 0.1, 0.9) for i in range(7)], tmp_path / "pairs.jsonl")
    facts = require_named(show, tmp_path / "pairs.jsonl", "preference pairs", "plain text", "scores yes")
    assert facts["lines"] == 7
    write_pairs([Pair(({"role": "user", "content": "x"},), "good", "bad", 0.1, 0.9)], tmp_path / "one.jsonl")
    require_named(show, tmp_path / "one.jsonl", "preference pairs", "conversations", "lines 1")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    require_named(show, tmp_path / "prompts.jsonl", "prompts", "lines 2")
    (tmp_path / "p.provenance.json").write_text('{"format": "edgepatch-pairs/1", "pairs": 7}')
    require_named(show, tmp_path / "p.provenance.json", "provenance of preference pairs")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_result_of_this_repository(show, path):
    require_named(show, path, "results of a measurement", "holds")


def test_what_the_harness_writes(show, tmp_path):
    document = {
        "model": {},
        "runtime": "torch",
        "quantization": "F32",
        "patch": None,
        "config": {},
        "scores": [{}, {}],
        "items": {},
    }
    (tmp_path / "h.json").write_text(json.dumps(document))
    require_named(show, tmp_path / "h.json", "results of a measurement", "holds", "2 scores")


# Files of others.


def write_gguf(path: Path, architecture: str, tensors: dict[str, tuple[int, int]], **texts: object) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in texts.items():
        name = key.replace("__", ".")
        if isinstance(value, int):
            writer.add_uint16(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, str(value))
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files_that_are_no_models(show, tiny_patch, tmp_path):
    lora = write_gguf(
        tmp_path / "a", "llama", {"blk.0.attn_q.weight.lora_a": (2, 8)}, general__type="adapter", adapter__type="lora"
    )
    require_named(show, lora, "LoRA adapter of llama.cpp", "1 F32", "merge it into its base model")
    projector = write_gguf(tmp_path / "b", "clip", {"v.patch_embd.weight": (2, 8)}, general__type="mmproj")
    require_named(show, projector, "projector of a multimodal GGUF model (mmproj)", "name that one")
    words = write_gguf(tmp_path / "c", "llama", {}, tokenizer__ggml__tokens=["a", "b"])
    require_named(show, words, "vocabulary of a GGUF model, without weights", "tensors none")
    part = write_gguf(tmp_path / "d", "llama", {"blk.9.x": (2, 8)}, split__no=1, split__count=3)
    assert require_named(show, part, "part of a split GGUF model", "--merge")["part"] == "2 of 3"
    vector = write_gguf(tmp_path / "e", "controlvector", {"direction.1": (1, 8)})
    require_named(show, vector, "control vector of llama.cpp")
    matrix = write_gguf(tmp_path / "f", "llama", {"x.in_sum2": (1, 8)}, general__type="imatrix")
    require_named(show, matrix, "GGUF file without a language model")
    other = write_gguf(tmp_path / "g", "whisper", {"encoder.x": (1, 8)})
    require_named(show, other, "GGUF file without a language model", "architecture whisper")
    adapters_gguf.write_gguf(tiny_patch, tmp_path / "h.gguf")
    require_named(show, tmp_path / "h.gguf", "patch as a GGUF file, for registries", "edgepatch convert adapter")


def test_the_first_part_of_a_split_model_is_no_model(show, monkeypatch, tmp_path):
    """It holds the embeddings, as a whole model does."""
    write = gguf.GGUFWriter.write_header_to_file
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_header_to_file", lambda self, *a: (self.add_uint16("split.count", 2), write(self, *a))
    )
    tiny_gguf.write_llama(tmp_path / "x.gguf")
    assert require_named(show, tmp_path / "x.gguf", "part of a split GGUF model")["part"] == "1 of 2"


def test_peft_folders(show, tiny_patch, tmp_path):
    peft.write_adapter(tiny_patch, tmp_path / "prompt")
    require_named(show, tmp_path / "prompt", "PEFT adapter folder", "type PROMPT_TUNING", "edgepatch convert adapter")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}')
    save_file({"a": np.zeros((2, 8), np.float32)}, lora / "adapter_model.safetensors")
    facts = require_named(show, lora, "PEFT adapter folder", "type LORA", "merge it into its base model", "org/base")
    assert (facts["rank"], facts["parameters"]) == (8, 16)
    (lora / "adapter_model.safetensors").unlink()
    (lora / "adapter_model.bin").write_bytes(b"\x80\x02.")
    require_refused(show, lora, "the pickle adapter_model.bin")


def test_safetensors_that_are_no_patch(show, tiny_folder, tmp_path):
    save_file({"x": np.zeros((3, 4), np.float16)}, tmp_path / "w.safetensors", {"format": "pt", "by": "\x1b[31mme"})
    facts = require_named(show, tmp_path / "w.safetensors", "safetensors file, no patch", "1 F16")
    assert facts["parameters"] == 12
    assert "\x1b" not in show(tmp_path / "w.safetensors")[1]
    require_named(show, tiny_folder / "model.safetensors", "safetensors file, no patch", f"the folder {tiny_folder}")


def test_an_onnx_graph(show, onnx_folders):
    folder = onnx_folders["int4"]
    require_named(show, folder / "model.onnx", "ONNX graph", "onnxruntime-genai", f"name {folder}")


def test_a_link_to_a_patch_is_followed(show, tiny_patch, tmp_path):
    write_patch(tiny_patch, tmp_path / "p.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "p.safetensors")
    assert show(tmp_path / "link")[0] == 0


# What cannot be used.


def pickled() -> bytes:
    return pickle.dumps({"weights": [1.0]})


def torch_archive() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickled())
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        ("empty", b"", "is empty"),
        ("empty.gguf", b"", "is empty"),
        ("pytorch_model.bin", pickled(), "is a pickle, which can run code"),
        ("model.pt", torch_archive(), "is a pickle, which can run code"),
        ("model.pth", b"anything", "is a pickle, which can run code"),
        ("renamed", pickled(), "is a pickle, which can run code"),
        ("renamed.zip", torch_archive(), "is a pickle, which can run code"),
        ("old.bin2", b"tjgg" + bytes(60), "a GGML file of 2023"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer"),
        ("page.gguf", b"\n<!DOCTYPE html><html></html>", "a web page"),
        ("x.whl", b"PK\x03\x04" + bytes(60), "a zip archive or a wheel"),
        ("x.tar.gz", b"\x1f\x8b" + bytes(60), "a gzip archive"),
        ("x.npy", b"\x93NUMPY" + bytes(60), "a NumPy array"),
        ("x.png", b"\x89PNG" + bytes(60), "an image"),
        ("notes.txt", "Grüße \x1b[31m".encode(), "a text that starts with"),
        ("x.dat", b"\xff\x00\x12" + bytes(60), "binary data that starts with ff 00 12"),
        ("x.json", b'{"a": 1}', "a JSON object with a"),
        ("x.json", b"[1, 2]", "looks like JSON"),
        ("x.json", b'{"a": ', "damaged JSON"),
        ("deep.json", b'{"a": ' + b"[" * 100_000, "damaged JSON"),
        ("config.json", b'{"model_type": "llama"}', "expected its folder"),
        ("tokenizer.json", b'{"model": {}}', "expected its folder"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', "expected its folder"),
        ("c.pem", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", "a certificate in PEM"),
        ("x.gguf", b"GGUF" + bytes(4), "damaged"),
        ("x.onnx", b"\x08\x0a" + b"\xff" * 60, "damaged"),
    ],
)
def test_files_that_cannot_be_used(show, tmp_path, name, content, phrase):
    (tmp_path / name).write_bytes(content)
    require_refused(show, tmp_path / name, phrase)
    assert "\x1b" not in show(tmp_path / name)[2]


def test_other_tar_archives(show, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(__file__, "some\x1b[31m.txt")
    require_refused(show, tmp_path / "x.tar", "a tar archive that starts with")
    assert "\x1b" not in show(tmp_path / "x.tar")[2]


def test_folders_that_cannot_be_used(show, tiny_folder, tmp_path):
    empty, files, models, pickles, bare = (tmp_path / name for name in ("empty", "files", "models", "pickles", "bare"))
    for folder in (empty, files, models, pickles, bare):
        folder.mkdir()
    require_refused(show, empty, "is an empty folder")
    for number in range(9):
        (files / f"f{number}\x1b[31m").write_text("x")
    require_refused(show, files, "a folder with f0", ", ...")
    tiny_gguf.write_llama(models / "tiny.gguf")
    require_refused(show, models, f"name {models / 'tiny.gguf'}")
    (models / "config.json").write_text('{"model_type": "llama"}')
    require_refused(show, models, f"name {models / 'tiny.gguf'}")
    (pickles / "pytorch_model.bin").write_bytes(pickled())
    (pickles / "config.json").write_text('{"model_type": "llama"}')
    require_refused(show, pickles, "the pickle pytorch_model.bin")
    copy_folder(tiny_folder, tmp_path / "model")
    (bare / "config.json").write_text((tiny_folder / "config.json").read_text())
    require_refused(show, bare, "no safetensors weights")


def test_what_edgepatch_writes_on_the_way(show, tmp_path):
    """Exports, runs, results, journals, conversations and logs: whoever finds one learns what it is, and how to go on."""
    patch = {"name": "detox", "version": "1.0.0", "digest": "ab" * 32}
    model = {"file": "model-Q8_0.gguf", "quantization": "Q8_0"}
    documents = {
        "sent/manifest.json": {"client": "mlx", "patch": patch, "model": model, "place": "stays", "files": {"a": "b"}},
        "measured/results.json": {"command": "edgepatch bench safety", "created": "2030", "cells": [{}, {}]},
        "run/run.json": {"kind": "soft", "config": {"dpo_steps": 40, "dtype": "float32"}},
        "talk.json": {"system_fingerprint": "abc+def", "messages": [{"role": "user", "content": "Hello"}]},
    }
    for name, document in documents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(document))
    (tmp_path / "pairs.jsonl.partial").write_text('{"settings": {"teacher": {"kind": "self"}}}\n{"prompt": "a"}\n')
    with logged(tmp_path / "train.log", print) as progress:
        progress("DPO", 1, 2)
    for name, *phrases in (
        ("sent", "export for another program", "mlx", "detox 1.0.0 (abababababab)", "Q8_0", "check-export"),
        ("measured", "results of a measurement", "edgepatch bench safety", "2 cells"),
        ("run", "run of a training", "40", "none yet", f"--run {tmp_path / 'run'}"),
        ("talk.json", "conversation", "abc+def", "/load"),
        ("pairs.jsonl.partial", "journal", "self", "goes on from there"),
        ("train.log", "log of", "finished"),
    ):
        code, out, err = show(tmp_path / name)
        assert code == 0 and all(phrase in out for phrase in phrases), (name, out, err)
        assert json.loads(show(tmp_path / name, "--json")[1])["kind"]
    (tmp_path / "sent" / "manifest.json").write_text('{"client": "mlx", "patch": 3, "files": []}')
    assert show(tmp_path / "sent")[0] == 0
    (tmp_path / "sent" / "manifest.json").write_text("{")
    require_refused(show, tmp_path / "sent", "a folder with manifest.json")


def test_what_is_not_there(show, tmp_path):
    require_refused(show, tmp_path / "nothing", "No such file")
