"""Exports through onnxruntime-genai's builder: what they hold, and what is refused. Also how optimum is called, short of running it."""

import json
import shutil
import sys

import numpy as np
import pytest

from edgepatch.converters.hf import folders
from edgepatch.converters.onnx import conversion as converter
from edgepatch.converters.onnx import exporters
from edgepatch.converters.onnx.identity import QUANTIZATION_KEY, SPEC_KEY
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.runtimes import load_runtime

for package in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(package)

PROMPT = "The quick brown fox jumps over"


def test_the_folder_knows_its_model(onnx_folders, tiny_folder):
    import onnxruntime

    for precision, folder in onnx_folders.items():
        with load_runtime(folder, None) as runtime:
            assert runtime.spec == folders.read_spec(tiny_folder)
            assert runtime.quantization == converter.QUANTIZATIONS[precision]
            assert runtime.context_length == 512
    stored = onnxruntime.InferenceSession(onnx_folders["int4"] / "model.onnx").get_modelmeta().custom_metadata_map
    assert set(stored) == {SPEC_KEY, QUANTIZATION_KEY}


def test_half_precision_weights_give_the_same_graph(tiny_folder, onnx_folders, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    half = shutil.copytree(tiny_folder, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16).save_pretrained(half)
    converter.export(half, tmp_path / "onnx", "fp32")
    # Element types, shapes and offsets of all weights, and the spec: norms are compared as float16.
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == (onnx_folders["fp32"] / "model.onnx").read_bytes()
    with load_runtime(tmp_path / "onnx", None) as runtime, load_runtime(half, None) as reference:
        assert np.abs(runtime.logits(PROMPT) - reference.logits(PROMPT)).max() <= 1e-4


def test_a_graph_whose_logits_miss_the_last_layer_is_refused(tiny_folder, onnx_folders, tmp_path):
    """The builder takes an MLP as wide as the vocabulary for the LM head; every parity test here covers the way around it."""
    import onnx

    config = folders.read_config(tiny_folder)
    assert config["intermediate_size"] == config["vocab_size"], "or the parity tests do not cover it"
    spec = folders.read_spec(tiny_folder)
    model = onnx.load(onnx_folders["fp32"] / "model.onnx", load_external_data=False)
    onnx.save(model, tmp_path / "model.onnx")
    converter._require_sound(tmp_path / "model.onnx", spec)
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.input[0] = next(node.output[0] for node in model.graph.node if "LayerNormalization" in node.op_type)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="not from the final norm"):
        converter._require_sound(tmp_path / "model.onnx", spec)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_what_was_there(tiny_folder, tmp_path, monkeypatch, error, existing):
    target = tmp_path / "target"
    if existing:
        target.mkdir()
        (target / "model.onnx").write_text("old")

    def interrupt(command, **options):
        raise error

    monkeypatch.setattr("edgepatch.converters.onnx.exporters.run_program", interrupt)
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
def test_the_context_ends_before_a_window_forgets_the_seed(onnx_folders, tmp_path, config, expected):
    copied = shutil.copytree(onnx_folders["fp32"], tmp_path / "copy")
    converter._keep_within_window(copied / "genai_config.json", config)
    with load_runtime(copied, None) as runtime:
        assert runtime.context_length == expected


def test_an_older_export_is_replaced(tiny_folder, onnx_folders, tmp_path, monkeypatch):
    def copy(folder, target, precision, adapter):
        shutil.copytree(onnx_folders["fp32"], target, dirs_exist_ok=True)

    monkeypatch.setattr(converter, "build", copy)
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
    config = folders.read_config(folder) | {"architectures": ["StableLmForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="StableLmForCausalLM") as caught:
        converter.export(folder, tmp_path / "target", "int4")
    assert "--exporter transformers" in caught.value.hint and "GGUF" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left"


def test_an_unknown_precision_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="precision"):
        converter.export(tiny_folder, tmp_path / "target", "int3")
    with pytest.raises(InputError, match="exporter: expected one of"):
        converter.export(tiny_folder, tmp_path / "target", "fp32", "olive")
    with pytest.raises(InputError, match="environment of its own"):
        converter.export(tiny_folder, tmp_path / "target", "fp32", "optimum")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a virtual environment"):
        converter.export(tiny_folder, tmp_path / "target", "fp32", "optimum", tmp_path / "thesis")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_an_environment_without_optimum_is_refused(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(InputError, match="optimum's ONNX exporter cannot be used there") as caught:
        exporters.optimum_python(tmp_path)
    assert "pip install optimum-onnx" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_theta": 1e6, "rope_scaling": None}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                }
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
    ],
)
def test_transformers_4_is_told_the_rotary_settings(config, expected):
    """It knows no ``rope_parameters``, and would take 10000 for the base."""
    assert exporters.rope_of_transformers_4(config) == expected


def test_a_missing_package_names_its_extra(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(exporters.PACKAGES["all"], "no_such_package", ("no-such-package", "convert"))
    with pytest.raises(MissingExtraError, match="no-such-package") as caught:
        converter.export(tiny_folder, tmp_path / "target", "fp32")
    assert "[convert]" in caught.value.hint
