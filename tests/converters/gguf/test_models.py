"""A GGUF file alone: loaded into Transformers it computes what llama.cpp computes, and patches are trained on it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from edgepatch.converters import tokenizer_probes
from edgepatch.converters.gguf import specs, writer
from edgepatch.converters.hf import folders, seeds
from edgepatch.errors import InputError
from edgepatch.patch.file import read_patch
from edgepatch.text.tokenizers import FolderTokenizer
from kit import tiny_gguf
from kit.llamacpp_oracle import logits_of, tokens_of
from kit.tiny_folders import make_folder

TOKENS = list(range(20, 60))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def loaded_logits(path) -> np.ndarray:
    with torch.inference_mode():
        return folders.load_model(path)(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"head_dim": 16}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_the_loaded_model_is_llama_cpps(architecture, changes, tmp_path):
    folder, path = make_folder(tmp_path / "hf", architecture, **changes), tmp_path / "model.gguf"
    writer.convert_folder(folder, path, "F32")
    logits = loaded_logits(path)
    assert np.abs(logits - logits_of(path, TOKENS)).max() <= 5e-5
    assert np.abs(logits - loaded_logits(folder)).max() <= 1e-5
    assert folders.read_spec(path) == folders.read_spec(folder)


@pytest.mark.parametrize(("write", "bound"), [(tiny_gguf.write_gemma3, 5e-3), (tiny_gguf.write_lfm2, 3e-4)])
def test_sliding_and_recurrent_layers_load(write, bound, tmp_path):
    """Gemma's window, its layers and its attention scale are not Transformers' defaults; LFM2's logits are as large as 40."""
    write(tmp_path / "model.gguf")
    assert np.abs(loaded_logits(tmp_path / "model.gguf") - logits_of(tmp_path / "model.gguf", TOKENS)).max() <= bound


def test_quantized_weights_are_dequantized(tiny_ggufs):
    exact, rounded = loaded_logits(tiny_ggufs["F16"]), loaded_logits(tiny_ggufs["Q4_0"])
    there = logits_of(tiny_ggufs["Q4_0"], TOKENS)  # llama.cpp also rounds the activations
    assert np.abs(rounded - there).mean() < 0.3 * np.abs(exact - there).mean()


def test_an_architecture_that_transformers_cannot_load_is_an_error(tmp_path):
    path = rewritten(tmp_path, lambda data: data.replace(b"lfm2", b"lfm9"), tiny_gguf.write_lfm2)
    with pytest.raises(InputError, match="lfm9") as caught:
        folders.load_model(path)
    assert "Transformers folder" in caught.value.hint


def test_weights_that_transformers_would_leave_out_are_an_error(tiny_ggufs, tmp_path):
    data = tiny_ggufs["F32"].read_bytes()
    (tmp_path / "model.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(InputError, match=r"finds no weights|no place for"):
        folders.load_model(tmp_path / "model.gguf")


def rewritten(tmp_path, change, write):
    write(tmp_path / "whole.gguf")
    (tmp_path / "model.gguf").write_bytes(change((tmp_path / "whole.gguf").read_bytes()))
    return tmp_path / "model.gguf"


def test_the_tokenizer_is_the_files(tiny_folder, tiny_ggufs):
    path = tiny_ggufs["F16"]
    texts = [*tokenizer_probes.TEXTS, "<|im_start|>user\nx<|im_end|>"]
    reference = FolderTokenizer(tiny_folder)
    with folders.tokenizer_folder(path) as folder:
        tokenizer = FolderTokenizer(folder)
        assert tokenizer.digest == reference.digest == folders.read_spec(path).tokenizer_digest
        assert [tokenizer.encode(t) for t in texts] == [reference.encode(t) for t in texts] == tokens_of(path, texts)
        messages = [{"role": "user", "content": "Grüße 🙂"}]
        assert tokenizer.encode_chat(messages) == reference.encode_chat(messages)
    assert not folder.exists()
    with folders.tokenizer_folder(tiny_folder) as folder:
        assert folder == tiny_folder


def run(monkeypatch, capfd, *arguments) -> dict:
    import sys

    from edgepatch import cli

    monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capfd.readouterr()
    assert not caught.value.code, output.err
    return json.loads(output.out)


def test_train_and_seed_from_a_quantized_file_alone(tiny_folder, tiny_ggufs, tmp_path, monkeypatch, capfd):
    path, pairs = tiny_ggufs["Q8_0"], tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"The fox {i}", "chosen": " sleeps in the sun", "rejected": " jumps over the dog"} for i in range(12)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "benign.txt").write_text("The quick brown fox sleeps.\n")
    run(
        monkeypatch,
        capfd,
        "train",
        path,
        "--pairs",
        pairs,
        "-o",
        tmp_path / "p.safetensors",
        "--benign",
        tmp_path / "benign.txt",
        "--num-virtual-tokens",
        4,
        "--sft-steps",
        3,
        "--dpo-steps",
        2,
    )
    patch = read_patch(tmp_path / "p.safetensors")
    assert patch.base == specs.read_spec(path) == folders.read_spec(tiny_folder)
    assert patch.kv_seed is not None and patch.kv_seed.num_virtual_tokens == 4
    run(
        monkeypatch,
        capfd,
        "convert",
        "seed",
        tmp_path / "p.safetensors",
        "--model",
        path,
        "-o",
        tmp_path / "q.safetensors",
    )
    again = read_patch(tmp_path / "q.safetensors")
    assert all(np.array_equal(a, b) for a, b in zip(again.kv_seed.keys, patch.kv_seed.keys, strict=True))
    other = seeds.compute_kv_seed(folders.load_model(tiny_folder), patch.soft_prompt, np.float16)
    assert not np.array_equal(other.keys[-1], again.kv_seed.keys[-1]), "the seed is not that of the dequantized weights"
    assert max(np.abs(a - b).max() for a, b in zip(other.keys, again.kv_seed.keys, strict=True)) < 0.2
