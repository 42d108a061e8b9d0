"""What can be known before any work is checked before any work: no model is loaded for a command that cannot end well."""

from __future__ import annotations

import shutil
import sys
from datetime import datetime, timedelta, timezone

import pytest
from transformers import AutoModelForCausalLM

from edgepatch.cli import main
from edgepatch.errors import MissingExtraError
from edgepatch.patch.file import write_patch
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.text.tokenizers import FolderTokenizer
from edgepatch.training.pairs.preferences import Pair, write_pairs
from edgepatch.training.runs import SETTINGS_FILE
from edgepatch.trust.keys import private_pem
from kit.stores import KEYS, make_patch, make_root, rotated


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """(exit code, stderr) of a command that loads no model."""

    def load(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setenv("COLUMNS", "300")

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().err

    return command


@pytest.fixture(scope="module")
def model_file(tiny_ggufs):
    return tiny_ggufs["F32"]


def pairs_file(folder, count):
    pairs = [Pair(f"The fox {i}", " sleeps in the sun", " jumps over the dog", 0.1, 0.9) for i in range(count)]
    write_pairs(pairs, folder / f"{count}.jsonl")
    return folder / f"{count}.jsonl"


def test_train_refuses_before_it_loads(refused, tiny_folder, tmp_path):
    enough, few = pairs_file(tmp_path, 12), pairs_file(tmp_path, 3)
    write_patch(make_patch(), tmp_path / "other.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"a patch")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / SETTINGS_FILE).write_text('{"config": {"sft_steps": 60, "batch_size": 8, "block": 128}}')
    cases = (
        (("--name", "My Patch"), 2, "--name: expected 1 to 64 letters"),
        (("--version", "1"), 2, "--version: expected a semantic version"),
        (("-o", "there.safetensors"), 2, "there.safetensors exists"),
        (("-o", tmp_path), 2, "it is a folder"),
        (("--pairs", few), 2, "training needs at least 10 pairs, found 3"),
        (("--pairs", tmp_path / "none.jsonl"), 2, "none.jsonl"),
        (("--beside", tmp_path / "none.safetensors"), 2, "none.safetensors"),
        (("--beside", tmp_path / "other.safetensors"), 4, "weight_fingerprint"),
        (("--kind", "kv", "--start", tmp_path / "none.safetensors"), 2, "none.safetensors"),
        (("--run", tmp_path / "run", "--sft-steps", 61), 2, "config.sft_steps: expected 60, found 61"),
        (("--dpo-reference", "model"), 2, "the reference model is missing"),
        (("--num-virtual-tokens", 512), 2, "expected fewer than the model's context of 512, found 512"),
        (("--kind", "lora", "-o", tmp_path), 2, "not an empty folder"),
        (("--kind", "lora", "--pairs", few), 2, "training needs at least 10 pairs"),
    )
    for options, code, words in cases:
        files = {"--pairs": enough, "-o": "new.safetensors"}
        defaults = [word for name, value in files.items() if name not in options for word in (name, value)]
        answer = refused("train", tiny_folder, *defaults, *options)
        assert answer[0] == code and words in answer[1], (options, answer)
    assert (tmp_path / "there.safetensors").read_bytes() == b"a patch"


def test_pairs_and_releases_take_nobodys_place(refused, model_file, tmp_path):
    there = pairs_file(tmp_path, 12)
    before = there.read_bytes()
    for command in (("pairs", model_file, "--teacher", "self"), ("pairs", "--from", there)):
        code, err = refused(*command, "-o", there)
        assert (code, f"{there} exists" in err, there.read_bytes() == before) == (2, True, True)
    write_patch(make_patch(), tmp_path / "p")
    for options in (("--version", "1"), ("--channel", "Beta"), ("--sequence", -1)):
        code, err = refused("release", "p", "-o", "q", *options)
        assert (code, f"{options[0]}: expected" in err) == (2, True), options


def test_no_verb_replaces_a_file_without_a_word(refused, model_file, tiny_folder, tmp_path):
    write_patch(make_patch(), tmp_path / "p")
    root = make_root(created=datetime.now(timezone.utc) - timedelta(days=2))
    (tmp_path / "root.json").write_bytes(root.to_bytes())
    (tmp_path / "root-2.json").write_bytes(rotated(root).to_bytes())
    key = tmp_path / "officer.key"
    key.write_bytes(private_pem(KEYS["officer"], None))
    key.chmod(0o600)
    commands = (
        ("sign", "p", key, "--unencrypted", "-o"),
        ("root", "sign", "root.json", key, "--unencrypted", "-o"),
        ("root", "create", "--from", "root.json", "-o"),
        ("root", "rotate", "root.json", "root-2.json", "-o"),
        ("status", "--store", tmp_path, "--html"),
        ("card", "p", "-o"),
        ("release", "p", "-o"),
        ("compose", "p", "p", "--model", tiny_folder, "--name", "both", "-o"),
        ("bundle", "create", "p", "--no-wheels", "-o"),
        ("bench", "harness", model_file, "--tasks", "own_choice", "--bare", "-o"),
        ("bench", "latency", "--model", model_file, "-o"),
        ("convert", "base", tiny_folder),
        ("convert", "seed", "p", "--model", tiny_folder, "-o"),
        ("convert", "patch", "p", "--to", "gguf"),
    )
    before = key.read_bytes()
    for command in commands:
        code, err = refused(*command, key)  # the worst that can be lost
        assert (code, f"{key} exists" in err, key.read_bytes() == before) == (2, True, True), (command, err)


def test_no_verb_replaces_a_folder_without_a_word(refused, model_file, tiny_folder, tmp_path):
    write_patch(make_patch(), tmp_path / "p")
    for name, marker in (("graph", "model.onnx"), ("sent", "manifest.json"), ("weights", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).write_text('{"files": {"patch.safetensors": ""}}')
        (tmp_path / name / "node_modules").mkdir()
    commands = (
        ("graph", "convert", "base", tiny_folder, "graph", "--to", "onnx"),
        ("graph", "convert", "baked", tiny_folder, "p", "graph"),
        ("weights", "convert", "base", model_file, "weights", "--to", "transformers"),
        ("sent", "export", "p", "--model", model_file, "-o", "sent"),
    )
    for name, *command in commands:
        code, err = refused(*command)
        assert (code, f"{name} exists" in err, "--force" in err) == (2, True, True), (command, err)
        others = [folder for folder in ("graph", "sent", "weights") if folder != name]
        for other in others:
            code, err = refused(*(other if word == name else word for word in command), "--force")
            assert (code, f"{other} exists and is not" in err) == (2, True), (command, err)
    code, err = refused(*commands[-1][1:], "--force")
    assert (code, "node_modules is not of the export" in err) == (2, True), err
    assert all((tmp_path / name / "node_modules").is_dir() for name in ("graph", "sent", "weights"))


def test_a_form_that_cannot_be_made_is_told_before_anything_is_dequantized(refused, tiny_ggufs, tmp_path):
    source, log = tiny_ggufs["Q8_0"], tmp_path / "x.log"
    for options, words in (
        (("--type", "IQ1_S"), "IQ1_S needs an importance matrix"),
        (("--type", "Q9_9"), "llama.cpp has no type Q9_9"),
        (("--to", "onnx", "--type", "Q4_K_M"), "precision: expected one of"),
        (("--to", "onnx", "--exporter", "nothing"), "exporter: expected one of"),
        (("--to", "transformers", "--type", "fp16"), "expected one of float32, bfloat16"),
    ):
        code, err = refused("convert", "base", source, "x", *options)
        assert (code, words in err, log.exists()) == (2, True, False), (options, err)


def test_a_gpu_that_is_not_there_is_one_clear_error(refused, model_file, tiny_folder, tmp_path):
    llama_cpp, torch = pytest.importorskip("llama_cpp"), pytest.importorskip("torch")
    if llama_cpp.llama_supports_gpu_offload() or torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for model in (model_file, tiny_folder):
        code, err = refused("generate", model, "--prompt", "a", "--bare", "--device", "cuda")
        assert (code, "device cuda: expected a GPU that" in err, "internal" in err) == (2, True, False), err
    pairs = pairs_file(tmp_path, 12)
    for device, words in (("cuda", "expected a GPU that PyTorch"), ("gpu", "expected cpu or cuda, found 'gpu'")):
        code, err = refused("train", tiny_folder, "--pairs", pairs, "-o", "new", "--device", device)
        assert (code, words in err) == (2, True), err


def test_fused_attention_is_llamacpps_alone(refused, model_file, tiny_folder, monkeypatch):
    code, err = refused("generate", tiny_folder, "--prompt", "a", "--bare", "--no-flash-attn")
    assert (code, "the torch runtime has no option flash_attention" in err) == (2, True), err
    given, opened = [], LlamaCppRuntime._load
    monkeypatch.setattr(LlamaCppRuntime, "_load", lambda self, *rest: given.append(rest[2]) or opened(self, *rest))
    for verb in (("chat",), ("generate", "--json")):
        for flags, is_fused in (((), True), (("--no-flash-attn",), False)):
            words = [*verb, model_file, "--prompt", "a", "--bare", "--max-new-tokens", "1", *flags]
            monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, words)])
            with pytest.raises(SystemExit) as end:
                main()
            assert (end.value.code or 0, given.pop()) == (0, is_fused), words


def test_a_missing_tokenizers_package_names_its_extra(refused, tiny_folder, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / name)
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for folder, extra in ((tmp_path, "onnx"), (tiny_folder, "train")):
        with pytest.raises(MissingExtraError, match="tokenizers is not installed") as refusal:
            FolderTokenizer(folder)
        assert f"[{extra}]" in refusal.value.hint
