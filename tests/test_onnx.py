"""The ONNX export and runtime against Transformers fed ``inputs_embeds``."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.converters import hf
from edgepatch.converters import onnx as converter
from edgepatch.errors import InactivePatchError, InputError, MismatchError, MissingExtraError
from edgepatch.runtimes.onnx import OnnxRuntime
from edgepatch.runtimes.reference import TorchRuntime
from edgepatch.sampling import Sampling
from edgepatch.tensors import KVSeed

for package in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(package)

PROMPT = "The quick brown fox jumps over"
GREEDY = Sampling(max_new_tokens=16, temperature=0)


@pytest.fixture(scope="session")
def onnx_folders(tiny_folder, tmp_path_factory):
    """precision -> ONNX folder of the tiny model."""
    root = tmp_path_factory.mktemp("onnx")
    for precision in converter.QUANTIZATIONS:
        converter.export(tiny_folder, root / precision, precision)
    assert sorted(p.name for p in root.iterdir()) == sorted(converter.QUANTIZATIONS)
    return {precision: root / precision for precision in converter.QUANTIZATIONS}


@pytest.fixture(scope="module")
def runtime(onnx_folders, tiny_patch):
    with OnnxRuntime(onnx_folders["fp32"], tiny_patch, num_threads=1) as loaded:
        yield loaded


@pytest.fixture
def copied(onnx_folders, tmp_path):
    """A copy of the fp32 folder, to be damaged."""
    return shutil.copytree(onnx_folders["fp32"], tmp_path / "copy")


def divergence(expected, found):
    """Mean KL divergence of the next-token distributions, in nats."""
    shifted = [x.astype(np.float64) - x.max(-1, keepdims=True) for x in (expected, found)]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in shifted)
    return (np.exp(p) * (p - q)).sum(-1).mean()


def seed_is_intact(runtime):
    seed = runtime.patch.kv_seed
    cells = runtime._graph.cells(seed.num_virtual_tokens)
    return all(
        np.array_equal(key, seed.keys[layer]) and np.array_equal(value, seed.values[layer])
        for layer, (key, value) in enumerate(cells)
    )


# Parity.


def test_fp32_logits_equal_inputs_embeds(runtime, onnx_folders, oracle, tiny_patch):
    tokens = runtime.tokens(PROMPT)
    expected = oracle(tokens, tiny_patch.soft_prompt)
    assert np.abs(runtime.logits(PROMPT) - expected).max() <= 1e-4
    bare = oracle(tokens, None)
    assert np.abs(bare - expected).max() > 0.1, "the patch must matter, or this test cannot fail"
    with OnnxRuntime(onnx_folders["fp32"], num_threads=1) as unpatched:
        assert np.abs(unpatched.logits(PROMPT) - bare).max() <= 1e-4


def test_a_prefill_in_chunks_equals_one_forward_pass(runtime, oracle, tiny_patch, monkeypatch):
    monkeypatch.setattr("edgepatch.runtimes.onnx.PREFILL_TOKENS", 3)
    tokens = runtime.tokens(PROMPT)
    assert np.abs(runtime.logits(PROMPT) - oracle(tokens, tiny_patch.soft_prompt)).max() <= 1e-4


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_logits_are_close_to_the_patched_model(onnx_folders, oracle, tiny_patch, precision):
    with OnnxRuntime(onnx_folders[precision], tiny_patch, num_threads=1) as runtime:
        assert runtime.quantization == precision
        tokens = runtime.tokens(PROMPT)
        logits = runtime.logits(PROMPT)
    assert np.isfinite(logits).all()
    patched = divergence(oracle(tokens, tiny_patch.soft_prompt), logits)
    assert patched < {"int8": 0.01, "int4": 0.2}[precision]
    assert patched < divergence(oracle(tokens, None), logits) / 5


def test_text_equals_that_of_torch(runtime, tiny_folder, tiny_patch):
    sampling = Sampling(max_new_tokens=12, top_p=0.9, rng_seed=5)
    with TorchRuntime(tiny_folder, tiny_patch) as reference:
        assert runtime.end_token_ids == reference.end_token_ids
        assert runtime.generate(PROMPT, GREEDY) == reference.generate(PROMPT, GREEDY)
        assert runtime.generate_many(PROMPT, sampling, 6) == reference.generate_many(PROMPT, sampling, 6)


def test_batched_and_single_generation_are_the_same(runtime, monkeypatch):
    monkeypatch.setattr("edgepatch.runtimes.onnx.BATCH_ROWS", 4)
    sampling = Sampling(max_new_tokens=12, top_p=0.9, rng_seed=5)
    singles = super(OnnxRuntime, runtime).generate_many(PROMPT, sampling, 6)
    assert runtime.generate_many(PROMPT, sampling, 6) == singles
    assert runtime.generate(PROMPT, GREEDY) == runtime.generate(PROMPT, GREEDY)


# The seed.


def test_prompt_reuse_does_not_change_the_answer(runtime):
    runtime.reset()
    fresh = runtime.generate(PROMPT, GREEDY)
    runtime.generate(PROMPT + " the lazy cat and", GREEDY)
    assert runtime.generate(PROMPT, GREEDY) == fresh


def test_the_seed_survives_everything(onnx_folders, tiny_patch):
    with OnnxRuntime(onnx_folders["fp32"], tiny_patch, context_length=30, num_threads=1) as runtime:
        before = runtime.logits(PROMPT)
        runtime.reset()
        runtime.generate("accents é à ü and emoji 🙂", GREEDY)
        pieces = list(runtime.stream([7] * 18, Sampling(max_new_tokens=50, rng_seed=1)))
        assert pieces[-1].finish_reason in ("length", "stop") and len(pieces) <= 3
        runtime.logits([9] * runtime.context_length)
        with pytest.raises(InputError, match="context holds"):
            runtime.logits([7] * 21)
        runtime.generate_many(PROMPT, Sampling(max_new_tokens=50, rng_seed=1), 3)
        assert seed_is_intact(runtime)
        assert np.array_equal(runtime.logits(PROMPT), before)


def test_a_zeroed_seed_changes_the_logits(runtime, onnx_folders, tiny_patch):
    keys, values = (
        tuple(np.zeros_like(t) for t in tensors) for tensors in (tiny_patch.kv_seed.keys, tiny_patch.kv_seed.values)
    )
    with OnnxRuntime(onnx_folders["fp32"], replace(tiny_patch, kv_seed=KVSeed(keys, values)), num_threads=1) as zeroed:
        assert np.abs(zeroed.logits(PROMPT) - runtime.logits(PROMPT)).max() > 0.1


def test_a_graph_that_overwrites_the_seed_is_refused(onnx_folders, tiny_patch, monkeypatch):
    run = OnnxRuntime._forward

    def damage(self, tokens, every):
        self._graph._buffers[1][0][0, 1, 3, 7] += 1
        return run(self, tokens, every)

    monkeypatch.setattr(OnnxRuntime, "_forward", damage)
    with pytest.raises(InactivePatchError, match="layer 0"):
        OnnxRuntime(onnx_folders["fp32"], tiny_patch)


# What is refused.


def test_a_patch_for_another_model_names_every_difference(onnx_folders, tiny_patch):
    other = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5, tokenizer_digest="0" * 64))
    with pytest.raises(MismatchError) as caught:
        OnnxRuntime(onnx_folders["fp32"], other)
    assert set(caught.value.differences) == {"rope_theta", "tokenizer_digest"}


def test_a_patch_without_a_seed_is_refused(onnx_folders, tiny_patch):
    with pytest.raises(InputError, match="no KV seed") as caught:
        OnnxRuntime(onnx_folders["fp32"], replace(tiny_patch, kv_seed=None))
    assert "convert seed" in caught.value.hint


@pytest.mark.parametrize("length", [0, 1, 5000, -1])
def test_a_truncated_model_is_refused(copied, length):
    model = copied / "model.onnx"
    model.write_bytes(model.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.onnx"):
        OnnxRuntime(copied)


def test_truncated_or_missing_weights_are_refused(copied):
    data = copied / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:10_000])
    with pytest.raises(InputError, match="damaged"):
        OnnxRuntime(copied)
    data.unlink()
    with pytest.raises(InputError, match="damaged"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "tokenizer_config.json", "genai_config.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(InputError, match=name):
        OnnxRuntime(copied)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json"])
def test_links_are_refused(copied, tmp_path, link, name):
    (copied / name).rename(tmp_path / name)
    link(tmp_path / name, copied / name)
    with pytest.raises(InputError, match=r"is a link|not a regular file"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("location", ["../elsewhere.data", "{parent}/elsewhere.data"])
def test_weights_outside_the_folder_are_refused(copied, location):
    import onnx

    (copied / "model.onnx.data").rename(copied.parent / "elsewhere.data")
    model = onnx.load(copied / "model.onnx", load_external_data=False)
    for entry in (e for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"):
        entry.value = location.format(parent=copied.parent)
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(InputError, match="xternal data"):
        OnnxRuntime(copied)


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({}, "not converted by edgepatch"),
        ({converter.SPEC_KEY: "{", converter.QUANTIZATION_KEY: "F32"}, "metadata is damaged"),
        ({converter.SPEC_KEY: "[]", converter.QUANTIZATION_KEY: "F32"}, "metadata is damaged"),
        ({converter.SPEC_KEY: "{}", converter.QUANTIZATION_KEY: "int2"}, "not converted by edgepatch"),
    ],
)
def test_a_model_of_unknown_origin_is_refused(copied, properties, message):
    import onnx

    model = onnx.load(copied / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(InputError, match=message):
        OnnxRuntime(copied)


def test_a_graph_of_another_kind_is_refused(copied):
    import onnx

    model = onnx.load(copied / "model.onnx", load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["B", "T"]))
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(InputError, match="position_ids"):
        OnnxRuntime(copied)


def test_another_tokenizer_is_refused(copied):
    tokenizer = json.loads((copied / "tokenizer.json").read_text(encoding="utf-8"))
    first, second = list(tokenizer["model"]["vocab"])[-2:]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("length", [0, -5, 10, 513, 10**9])
def test_an_impossible_context_length_is_refused(onnx_folders, tiny_patch, length):
    with pytest.raises(InputError, match="context length"):
        OnnxRuntime(onnx_folders["fp32"], tiny_patch, context_length=length)


def test_an_unknown_provider_is_refused(onnx_folders):
    with pytest.raises(InputError, match="provider"):
        OnnxRuntime(onnx_folders["fp32"], provider="npu")


# The export.


def test_the_folder_knows_its_model(onnx_folders, tiny_folder):
    import onnxruntime

    for precision, folder in onnx_folders.items():
        with OnnxRuntime(folder) as runtime:
            assert runtime.spec == hf.read_spec(tiny_folder)
            assert runtime.quantization == converter.QUANTIZATIONS[precision]
            assert runtime.context_length == 512
    stored = onnxruntime.InferenceSession(onnx_folders["int4"] / "model.onnx").get_modelmeta().custom_metadata_map
    assert set(stored) == {converter.SPEC_KEY, converter.QUANTIZATION_KEY}


def test_half_precision_weights_give_the_same_graph(tiny_folder, onnx_folders, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    half = shutil.copytree(tiny_folder, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16).save_pretrained(half)
    converter.export(half, tmp_path / "onnx", "fp32")
    # Element types, shapes and offsets of all weights, and the spec: norms are compared as float16.
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == (onnx_folders["fp32"] / "model.onnx").read_bytes()
    with OnnxRuntime(tmp_path / "onnx") as runtime, TorchRuntime(half) as reference:
        assert np.abs(runtime.logits(PROMPT) - reference.logits(PROMPT)).max() <= 1e-4


def test_a_graph_whose_logits_miss_the_last_layer_is_refused(tiny_folder, onnx_folders):
    """The builder takes an MLP as wide as the vocabulary for the LM head; every parity test here covers the way around it."""
    import onnx

    config = hf.read_config(tiny_folder)
    assert config["intermediate_size"] == config["vocab_size"], "or the parity tests do not cover it"
    spec = hf.read_spec(tiny_folder)
    graph = onnx.load(onnx_folders["fp32"] / "model.onnx", load_external_data=False).graph
    converter._require_sound(graph, spec)
    head = next(node for node in graph.node if "logits" in node.output)
    head.input[0] = next(node.output[0] for node in graph.node if "LayerNormalization" in node.op_type)
    with pytest.raises(InputError, match="not from the final norm"):
        converter._require_sound(graph, spec)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_what_was_there(tiny_folder, tmp_path, monkeypatch, error, existing):
    target = tmp_path / "target"
    if existing:
        target.mkdir()
        (target / "model.onnx").write_text("old")

    def interrupt(command, **options):
        raise error

    monkeypatch.setattr("subprocess.run", interrupt)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else InputError):
        converter.export(tiny_folder, target, "fp32")
    assert [p.name for p in tmp_path.iterdir()] == (["target"] if existing else [])
    assert not existing or (target / "model.onnx").read_text() == "old"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "sliding_window": None}, 512),
        ({"model_type": "qwen2", "sliding_window": 16, "layer_types": ["full_attention"]}, 512),
        ({"model_type": "gemma2", "sliding_window": 4096, "layer_types": ["sliding_attention"]}, 512),
    ],
)
def test_the_context_ends_before_a_window_forgets_the_seed(copied, config, expected):
    converter._keep_within_window(copied / "genai_config.json", config)
    with OnnxRuntime(copied) as runtime:
        assert runtime.context_length == expected


def test_an_older_export_is_replaced(tiny_folder, onnx_folders, tmp_path, monkeypatch):
    def copy(folder, target, precision):
        shutil.copytree(onnx_folders["fp32"], target, dirs_exist_ok=True)

    monkeypatch.setattr(converter, "_build", copy)
    target = tmp_path / "target"
    target.mkdir()
    (target / "model.onnx").write_text("old")
    (target / "stale.data").write_text("old")
    converter.export(tiny_folder, target, "fp32")
    assert {p.name for p in target.iterdir()} == {p.name for p in onnx_folders["fp32"].iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_target_that_is_no_export_is_left_alone(tiny_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not an ONNX model folder"):
        converter.export(tiny_folder, tmp_path, "fp32")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unknown_architecture_is_named(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = hf.read_config(folder) | {"architectures": ["StableLmForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="StableLmForCausalLM") as caught:
        converter.export(folder, tmp_path / "target", "int4")
    assert "GGUF" in caught.value.hint
    assert not (tmp_path / "target").exists()


def test_an_unknown_precision_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="precision"):
        converter.export(tiny_folder, tmp_path / "target", "int3")


def test_a_missing_package_names_its_extra(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(converter.PACKAGES, "no_such_package", ("no-such-package", "convert"))
    with pytest.raises(MissingExtraError, match="no-such-package") as caught:
        converter.export(tiny_folder, tmp_path / "target", "fp32")
    assert "edgepatch[convert]" in caught.value.hint
