"""Transformers' own exporter, and graphs that others have exported; the builder is tested in test_onnx_builder.py."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.onnx import conversion as converter
from edgepatch.converters.onnx import precision as onnx_precision
from edgepatch.converters.onnx.baked import bake_seed
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError, MismatchError
from edgepatch.patch.file import Patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.onnx.runtime import OnnxRuntime
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.tensors import SoftPrompt

for package in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "onnxscript"):
    pytest.importorskip(package)

PROMPT = "The quick brown fox jumps over"
PROMPTS = ["The quick", "A", "Numbers 1234, accents, and a text that is longer than those of the other rows"]
GREEDY = Sampling(max_new_tokens=16, temperature=0)
WINDOW = 24


@pytest.fixture(scope="module")
def gemma_folder(tiny_folder, tmp_path_factory):
    """A random Gemma 3 (a layer with a sliding window, a layer without), which the builder cannot export."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("gemma")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_folder / name, folder / name)
    torch.manual_seed(12)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        max_position_embeddings=256,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma_patch(gemma_folder):
    spec, model = folders.read_spec(gemma_folder), folders.load_model(gemma_folder)
    soft_prompt = SoftPrompt((np.random.default_rng(4).standard_normal((10, 64)) * 2).astype(np.float32))
    seed, canary = seeds.compute_kv_seed(model, soft_prompt), seeds.compute_canary(model, soft_prompt)
    return Patch("gemma", "1.0.0", spec, soft_prompt, seed, canary=canary)


@pytest.fixture(scope="module")
def gemma_onnx(gemma_folder, tmp_path_factory):
    """Transformers' own export: the one kind of graph that carries the window through its memory."""
    folder = tmp_path_factory.mktemp("gemma_onnx") / "fp32"
    agreement = converter.export(gemma_folder, folder, "fp32", "transformers")
    assert agreement.max_difference <= 1e-4
    return folder


# Transformers' exporter.


def test_a_growing_past_equals_inputs_embeds_beyond_the_window(gemma_folder, gemma_onnx, gemma_patch):
    tokens = [int(t) for t in np.random.default_rng(1).integers(3, 512, 3 * WINDOW)]
    with load_runtime(gemma_folder, gemma_patch) as reference:
        expected = reference.logits(tokens)
        texts = [reference.generate(prompt, GREEDY) for prompt in PROMPTS]
    with load_runtime(gemma_folder, None) as bare:
        assert np.abs(bare.logits(tokens) - expected).max() > 0.1, "the patch must matter, or this test cannot fail"
    with load_runtime(gemma_onnx, gemma_patch, num_threads=1, num_sequences=2) as runtime:
        assert runtime.backend._graph.windows and not runtime.backend._graph.shared
        assert np.abs(runtime.logits(tokens) - expected).max() <= 1e-4
        steps = np.stack([runtime.logits_of_last(tokens[: i + 1], sequence=1) for i in range(len(tokens))])
        assert np.abs(steps - expected).max() <= 1e-4
        assert [runtime.generate(prompt, GREEDY) for prompt in PROMPTS] == texts
        assert runtime.generate_batch(PROMPTS, GREEDY) == texts


def test_a_graph_with_windows_refuses_what_moves_and_runs_it_pinned(gemma_folder, gemma_onnx, gemma_patch):
    model = folders.load_model(gemma_folder)
    moving = seeds.complete(replace(seeds.complete(gemma_patch, model), anchoring=Anchoring(16)), model)
    with pytest.raises(InputError, match="count cells") as caught:
        load_runtime(gemma_onnx, moving, num_threads=1)
    assert "--pinned" in caught.value.hint
    with load_runtime(gemma_onnx, moving, num_threads=1, pinned=True) as session:
        assert session.slot.is_pinned and session.system_fingerprint.endswith("-pinned")


def test_a_growing_past_is_cut_and_kept(gemma_onnx, gemma_patch):
    seed = gemma_patch.kv_seed
    with load_runtime(gemma_onnx, gemma_patch, num_threads=1) as runtime:
        fresh = runtime.generate(PROMPT, GREEDY)
        first = runtime.backend._caches[0]._past
        runtime.generate(PROMPT + " the lazy cat and", GREEDY)
        assert runtime.backend._caches[0]._past is not first
        assert runtime.generate(PROMPT, GREEDY) == fresh
        runtime.reset()
        runtime.swap(None)
        bare = runtime.logits(PROMPT)
        runtime.swap(gemma_patch)
        assert np.abs(runtime.logits(PROMPT) - bare).max() > 0.1 and runtime.generate(PROMPT, GREEDY) == fresh
        for layer, (key, value) in enumerate(runtime.backend._caches[0].cells(10)):
            assert np.array_equal(key, seed.keys[layer]) and np.array_equal(value, seed.values[layer])


def test_names_of_another_exporter_are_recognised(gemma_onnx, gemma_patch, tmp_path):
    """The same graph under optimum's names for the past. `edgepatch bench optimum` tests a graph of optimum itself."""
    import onnx

    folder = shutil.copytree(gemma_onnx, tmp_path / "renamed")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    text = {}
    for layer in range(2):
        for kind in ("key", "value"):
            text[f"input.past_key_values.layers.{layer}.{kind}s"] = f"past_key_values.{layer}.{kind}"
            text[f"output.past_key_values.layers.{layer}.{kind}s"] = f"present.{layer}.{kind}"
    for node in model.graph.node:
        node.input[:] = [text.get(name, name) for name in node.input]
        node.output[:] = [text.get(name, name) for name in node.output]
    for value in [*model.graph.input, *model.graph.output]:
        value.name = text.get(value.name, value.name)
    onnx.save(model, folder / "model.onnx")
    with (
        load_runtime(gemma_onnx, gemma_patch, num_threads=1) as original,
        load_runtime(folder, gemma_patch, num_threads=1) as renamed,
    ):
        assert np.array_equal(original.logits(PROMPT), renamed.logits(PROMPT))


def test_a_window_that_nobody_states_is_refused(gemma_onnx, tmp_path):
    folder = shutil.copytree(gemma_onnx, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="sliding_window"):
        OnnxRuntime(folder)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_float32_graph_is_reduced(gemma_onnx, gemma_folder, gemma_patch, tmp_path, monkeypatch, precision):
    """Without exporting again: what ``reduce`` makes of the graph, stamped and loaded."""

    def copy(folder, target):
        for file in gemma_onnx.glob("model.onnx*"):
            shutil.copyfile(file, target / file.name)

    monkeypatch.setattr(converter, "export_with_transformers", copy)
    agreement = converter.export(gemma_folder, tmp_path / "reduced", precision, "transformers")
    assert agreement.correlation > {"fp16": 0.9999, "int8": 0.99, "int4": 0.9}[precision]
    with load_runtime(tmp_path / "reduced", gemma_patch, num_threads=1) as runtime:
        assert (runtime.quantization, runtime.kv_type) == {"fp16": ("F16", "f16")}.get(precision, (precision, "f32"))
        assert len(runtime.generate_batch(PROMPTS, GREEDY)) == 3
        if precision == "fp16":
            assert _divergence_by_thirds(runtime, gemma_folder, gemma_patch).max() < 5e-6


def _divergence_by_thirds(runtime, folder, patch):
    """(3,) mean KL from full precision at the first, middle and last third of a long text: rounded angles grow with position."""
    tokens = [int(t) for t in np.random.default_rng(2).integers(3, 512, 240)]
    with load_runtime(folder, patch) as reference:
        expected = reference.logits(tokens).astype(np.float64)
    p, q = (
        x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (expected, runtime.logits(tokens).astype(np.float64))
    )
    return (np.exp(p) * (p - q)).sum(axis=1).reshape(3, -1).mean(axis=1)


def test_sizes_that_4_bits_cannot_take_are_named(tmp_path):
    import onnx

    weights = onnx.numpy_helper.from_array(np.ones((96, 64), dtype=np.float32), "w")
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["T", n])
        for name, n in (("x", 96), ("logits", 64))
    )
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["logits"], name="odd")], "g", [x], [y], [weights]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="odd: expected a multiple of 64 inputs for 4 bits, found 96"):
        onnx_precision.reduce(tmp_path / "model.onnx", "int4")


# Graphs of others.


def unstamped(source, target):
    import onnx

    shutil.copytree(source, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, target / "model.onnx")
    return target


def test_a_graph_proves_to_be_its_base_model(gemma_folder, gemma_onnx, gemma_patch, tmp_path):
    folder = unstamped(gemma_onnx, tmp_path / "foreign")
    with pytest.raises(InputError, match="names no base model") as caught:
        OnnxRuntime(folder)
    assert f"convert stamp {folder}" in caught.value.hint
    with pytest.raises(InputError, match=r"expected the norm vectors of 2 layers"):
        converter.stamp_folder(folder)  # Gemma computes with 1 + weight, so its norms have no names in the graph
    converter.stamp_folder(folder, gemma_folder)
    with load_runtime(folder, gemma_patch) as runtime:
        assert runtime.spec == folders.read_spec(gemma_folder) and runtime.quantization == "F32"


def test_another_base_model_is_refused(gemma_folder, gemma_onnx, tmp_path):
    from transformers import Gemma3ForCausalLM

    folder, other = unstamped(gemma_onnx, tmp_path / "foreign"), shutil.copytree(gemma_folder, tmp_path / "other")
    model = Gemma3ForCausalLM.from_pretrained(other)
    model.model.layers[0].mlp.up_proj.weight.data += 0.01
    model.save_pretrained(other)
    before = (folder / "model.onnx").read_bytes()
    with pytest.raises(InputError, match="does not compute what the model in Transformers computes"):
        converter.stamp_folder(folder, other)
    assert (folder / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_norms_by_name_tell_the_model(onnx_folders, tiny_folder, tmp_path, precision):
    """A builder's graph names its final norm otherwise; renamed, it is one that keeps the checkpoint's names."""
    import onnx

    folder = unstamped(onnx_folders[precision], tmp_path / "foreign")
    with pytest.raises(InputError, match=r"and model\.norm\.weight, found"):
        converter.stamp_folder(folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    old, new = "model.layers.2.final_norm_layernorm.weight", "model.norm.weight"
    for tensor in model.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    del model.graph.value_info[:]
    onnx.save(model, folder / "model.onnx")
    assert converter.stamp_folder(folder) is None
    with load_runtime(folder, None) as runtime:
        assert runtime.spec == folders.read_spec(tiny_folder)
        assert runtime.quantization == {"fp16": "F16", "int4": "int4"}[precision]


def test_only_the_builders_graphs_are_baked(gemma_onnx, gemma_patch, onnx_folders, tmp_path):
    with pytest.raises(InputError, match="no graph of onnxruntime-genai's builder"):
        bake_seed(gemma_onnx, gemma_patch, tmp_path / "baked")
    with pytest.raises(MismatchError):
        bake_seed(onnx_folders["fp32"], gemma_patch, tmp_path / "baked")
