"""Graphs of Hugging Face optimum, exported in its own environment: `edgepatch bench optimum`."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.converters.onnx import exporters
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.patch.file import Patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.onnx.runtime import OnnxRuntime
from edgepatch.tensors import SoftPrompt

ENVIRONMENT = os.environ.get("EDGEPATCH_OPTIMUM_ENV", "")
pytestmark = pytest.mark.skipif(
    not ENVIRONMENT, reason="optimum needs an environment of its own: edgepatch bench optimum"
)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
PROMPTS = ["The quick", "A", "Numbers 1234, accents, and a text that is longer than those of the other rows", "B"]
GREEDY = Sampling(max_new_tokens=24, temperature=0, ignore_end_tokens=True)
WINDOW = 40
NUM_TOKENS = 100


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tiny_folder, tmp_path_factory):
    """(architecture, Transformers folder, patch): saved by Transformers 5, with a rope theta that is not the default."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_folder / name, folder / name)
    torch.manual_seed(ARCHITECTURES.index(request.param))
    settings = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if request.param == "gemma3_text":
        settings |= {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 32,
        }
    else:
        settings |= {"rope_theta": 5e5}
    settings |= {"sliding_window": WINDOW} if request.param == "mistral" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text()), "or Transformers 4 could not be wrong"
    soft_prompt = SoftPrompt((np.random.default_rng(3).standard_normal((10, 128)) * 0.3).astype(np.float32))
    loaded = folders.load_model(folder)
    seed, canary = seeds.compute_kv_seed(loaded, soft_prompt), seeds.compute_canary(loaded, soft_prompt)
    return request.param, folder, Patch("optimum", "1.0.0", folders.read_spec(folder), soft_prompt, seed, canary=canary)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / model[0]
    agreement = onnx.export(model[1], folder, "fp32", "optimum", Path(ENVIRONMENT))
    print(f"{model[0]}: optimum's graph, seeded: max |dlogit| {agreement.max_difference:.1e}")
    return folder


def test_logits_and_text_equal_transformers(model, exported):
    architecture, folder, patch = model
    tokens = [int(t) for t in np.random.default_rng(1).integers(3, 512, NUM_TOKENS)]
    with load_runtime(folder, patch) as reference:
        expected = reference.logits(tokens)
        texts = [reference.generate(prompt, GREEDY) for prompt in PROMPTS]
    with load_runtime(exported, patch, num_threads=1) as runtime:
        assert (
            runtime.backend._graph.takes_positions is (architecture != "gemma3_text")
            and not runtime.backend._graph.shared
        )
        worst = float(np.abs(runtime.logits(tokens) - expected).max())
        print(f"{architecture}: {NUM_TOKENS} tokens behind the seed: max |dlogit| {worst:.1e}")
        assert worst <= 1e-4
        assert [runtime.generate(prompt, GREEDY) for prompt in PROMPTS] == texts
        assert runtime.generate_batch(PROMPTS, GREEDY) == texts
        runtime.swap(None)
        assert np.abs(runtime.logits(tokens) - expected).max() > 0.1


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_smaller_weights(model, exported, tmp_path, monkeypatch, precision):
    def copy(folder, target, environment):
        shutil.copyfile(exported / "model.onnx", target / "model.onnx")

    monkeypatch.setattr(onnx, "export_with_optimum", copy)
    agreement = onnx.export(model[1], tmp_path / "reduced", precision, "optimum", Path(ENVIRONMENT))
    print(f"{model[0]} {precision}: correlation of the logits {agreement.correlation:.5f}")
    with load_runtime(tmp_path / "reduced", model[2], num_threads=1) as runtime:
        assert len(runtime.generate_batch(PROMPTS, GREEDY)) == len(PROMPTS)


def test_a_folder_as_optimum_leaves_it_is_stamped(model, tmp_path):
    """What people download: optimum's own settings files, of Transformers 4, beside its graph."""
    architecture, folder, patch = model
    copy, exported = tmp_path / "copy", tmp_path / "made"
    for path in (copy, exported):
        path.mkdir()
    exporters._write_for_transformers_4(folder, copy)
    python = str(exporters.optimum_python(Path(ENVIRONMENT)))
    done = exporters._run(python, exporters.OPTIMUM, [str(copy), str(exported)])
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, exported / name)
    with pytest.raises(InputError, match="names no base model"):
        OnnxRuntime(exported)
    if architecture == "gemma3_text":  # 1 + weight is folded into nameless constants
        with pytest.raises(InputError, match="norm vectors"):
            onnx.stamp_folder(exported)
        onnx.stamp_folder(exported, folder)
    else:
        onnx.stamp_folder(exported)
    with load_runtime(exported, patch, num_threads=1) as runtime:
        assert runtime.spec == patch.base


def test_the_rope_theta_trap_is_caught(model, tmp_path, monkeypatch):
    """Given the config as Transformers 5 writes it, optimum exports another model, without a word."""
    if model[0] == "gemma3_text":
        pytest.skip("its theta is Transformers 4's default")
    monkeypatch.setattr(exporters, "rope_of_transformers_4", dict)
    with pytest.raises(InputError, match="does not compute what the model in Transformers computes"):
        onnx.export(model[1], tmp_path / "target", "fp32", "optimum", Path(ENVIRONMENT))
    assert not (tmp_path / "target").exists()
