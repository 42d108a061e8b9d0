"""One ``ModelSpec`` for a Transformers folder and for every GGUF file of it, whoever converted it."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.parity import models as parity_models
from edgepatch.converters import architectures, rope, rope_parameters
from edgepatch.converters.gguf import header as gguf_header
from edgepatch.converters.gguf import specs
from edgepatch.converters.hf import folders
from edgepatch.errors import InputError
from edgepatch.tensors import weight_fingerprint
from kit import tiny_gguf
from kit.tiny_folders import make_folder

H = 64
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FACTORS = {
    "short_factor": [round(1 + i * 0.0123, 4) for i in range(32)],
    "long_factor": [round(1 + i * 0.31, 4) for i in range(32)],
}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3_moe", "qwen3moe"),
        ("gemma3_text", "gemma3"),
        ("phi3", "phi3"),
        ("lfm2", "lfm2"),
        ("qwen3_5_text", "qwen35"),
        ("cohere", "command-r"),
        ("nemotron_h", "nemotron_h"),
    ],
)
def test_architectures_have_gguf_names(model_type, expected):
    assert architectures.gguf_name(model_type) == expected


def header_of(tmp_path, architecture: str, settings: dict, vectors: dict) -> gguf_header.GGUFHeader:
    """A header as llama.cpp's converter writes it, its vectors in a file."""
    path, tensors, data = tmp_path / "vectors", {}, b""
    for name, values in vectors.items():
        tensors[name] = gguf_header.TensorInfo((len(values),), 0, len(data))
        data += np.asarray(values, np.float32).tobytes()
    path.write_bytes(data)
    metadata = {f"{architecture}.{key}": value for key, value in settings.items()}
    return gguf_header.GGUFHeader(path, {"general.architecture": architecture, **metadata}, tensors)


def single(value: float) -> float:
    """What a GGUF reader gets for a number: GGUF holds float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


@pytest.mark.parametrize(
    ("model_type", "config", "settings", "vectors", "scaling"),
    [
        ("llama", {}, {"rope.freq_base": 1e4, "rope.dimension_count": H}, {}, {}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 12345.6, "factor": 2.4}},
            {"rope.freq_base": single(12345.6), "rope.scaling.type": "linear", "rope.scaling.factor": single(2.4)},
            {},
            {"rope_type": "linear", "factor": 2.4},
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3},
            {"rope.freq_base": 5e5},
            {"rope_freqs.weight": rope.llama3_divisors(5e5, H, LLAMA3)},
            {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 5.0}},
            {"rope.freq_base": 5e5},
            {"rope_freqs.weight": rope.llama3_divisors(5e5, H, LLAMA3 | {"high_freq_factor": 5.0})},
            None,
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                }
            },
            {
                "rope.freq_base": 1e6,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32768,
                "rope.scaling.yarn_beta_fast": 32.0,
                "rope.scaling.yarn_beta_slow": 1.0,
            },
            {},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 4096,
                    **FACTORS,
                }
            },
            {
                "rope.freq_base": 1e4,
                "rope.dimension_count": H,
                "rope.scaling.original_context_length": 4096,
                "rope.scaling.attn_factor": 1.19,
            },
            {"rope_factors_long.weight": FACTORS["long_factor"], "rope_factors_short.weight": FACTORS["short_factor"]},
            {"rope_type": "longrope", "original_max_position_embeddings": 4096, **FACTORS},
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
            {"rope.freq_base": 1e4, "rope.dimension_count": 48, "rope.scaling.original_context_length": 4096},
            {},
            {"partial_rotary_factor": 0.75},
        ),
        ("stablelm", {}, {"rope.dimension_count": 16}, {}, {"partial_rotary_factor": 0.25}),
        ("gemma3_text", {}, {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4}, {}, {}),
        ("gemma3_text", {}, {"rope.freq_base": 1e6}, {}, {}),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
                }
            },
            {
                "rope.freq_base": 1e6,
                "rope.freq_base_swa": 2e4,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
            {},
            {"local_rope_theta": 20000.0, "rope_type": "linear", "factor": 8.0},
        ),
        (
            "qwen3_5_text",
            {},
            {"rope.freq_base": 1e4, "rope.dimension_count": 16, "rope.dimension_sections": np.array([11, 11, 10, 0])},
            {},
            {"partial_rotary_factor": 0.25},
        ),
    ],
)
def test_rotary_embeddings_have_one_spelling(model_type, config, settings, vectors, scaling, tmp_path):
    from transformers import AutoConfig

    shape = {"hidden_size": 4 * H, "num_attention_heads": 4, "head_dim": H, "max_position_embeddings": 131072}
    full = AutoConfig.for_model(model_type, **(shape | config)).to_dict()
    name = architectures.gguf_name(model_type)
    theta, actual = rope_parameters.of_config(full, name, H)
    assert rope_parameters.of_header(header_of(tmp_path, name, settings, vectors), H) == (theta, actual)
    if scaling is None:
        assert actual["rope_type"] == "divisors" and len(actual["divisors"]) == H // 2
    else:
        assert actual == pytest.approx(scaling) if "factor" in scaling else actual == scaling


def test_an_attention_factor_that_llama_cpp_does_not_apply_makes_another_model(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    usual = rope_parameters.of_config({"rope_parameters": yarn | {"attention_factor": 1.1386294361119891}}, "llama", H)
    assert usual == rope_parameters.of_config({"rope_parameters": yarn}, "llama", H)
    assert rope_parameters.of_config({"rope_parameters": yarn | {"attention_factor": 1.3}}, "llama", H) != usual


def test_gemma_norms_get_one_added_and_qwens_linear_attention_does_not():
    assert architectures.norm_shift("gemma3", "model.norm.weight") == 1
    assert architectures.norm_shift("llama", "model.norm.weight") == 0
    assert architectures.norm_shift("qwen35", "model.layers.0.input_layernorm.weight") == 1
    assert architectures.norm_shift("qwen35", "model.layers.0.linear_attn.norm.weight") == 0


def test_norms_of_multimodal_folders_are_the_language_models():
    names = [
        "model.language_model.layers.0.input_layernorm.weight",
        "model.language_model.norm.weight",
        "model.vision_tower.layers.0.norm1.weight",
        "model.visual.merger.norm.weight",
    ]
    assert architectures.norm_names("gemma3", 1, names) == {
        names[0]: "blk.0.attn_norm.weight",
        names[1]: "output_norm.weight",
    }
    with pytest.raises(InputError, match="strange_norm"):
        architectures.norm_names("llama", 1, ["model.strange_norm.weight"])


def test_gemma_folder(tmp_path):
    """The fingerprint is that of the sums, and config.json may nest the language model's settings."""
    import json

    from safetensors.numpy import load_file

    folder = make_folder(tmp_path / "hf", "gemma3_text", num_hidden_layers=1, layer_types=["full_attention"])
    spec = folders.read_spec(folder)
    weights = load_file(folder / "model.safetensors")
    mapped = architectures.norm_names("gemma3", 1, list(weights))
    assert spec.weight_fingerprint == weight_fingerprint(
        {target: weights[source] + 1 for source, target in mapped.items()}
    )
    assert spec.model_type == "gemma3" and spec.rope_theta == 1e6
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    assert folders.read_spec(folder) == spec


def test_hybrid_files_tell_their_attention_layers(tmp_path):
    tiny_gguf.write_lfm2(tmp_path / "lfm2.gguf")
    spec = specs.read_spec(tmp_path / "lfm2.gguf")
    assert (spec.model_type, spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim) == ("lfm2", 3, 2, 64)
    tiny_gguf.write_gemma3(tmp_path / "gemma3.gguf")
    assert specs.read_spec(tmp_path / "gemma3.gguf").num_key_value_heads == 2


def test_a_file_that_does_not_name_its_quantization_gets_its_commonest_type(tmp_path):
    tiny_gguf.write_llama(tmp_path / "llama.gguf")
    header = gguf_header.read_header(tmp_path / "llama.gguf")
    for value in (None, 9999, "Q4_0"):
        assert specs.quantization(replace(header, metadata=header.metadata | {"general.file_type": value})) == "F32"
    assert specs.quantization(replace(header, metadata=header.metadata | {"general.file_type": 1024 + 0})) == "F32"


@pytest.mark.parametrize("claimed", [2, 10, 15, 19, 30])
def test_a_name_for_coarser_weights_than_are_there_is_none(tmp_path, claimed):
    """Nobody signs the name, and it decides how far a patch's effect may deviate."""
    tiny_gguf.write_llama(tmp_path / "m.gguf")
    header = gguf_header.read_header(tmp_path / "m.gguf")
    assert specs.quantization(replace(header, metadata=header.metadata | {"general.file_type": claimed})) == "F32"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 3),
        ("block_count", 0),
        ("block_count", 2**31),
        ("embedding_length", 128),
        ("attention.head_count", 0),
        ("attention.head_count", 8),
        ("attention.head_count", -1),
        ("attention.head_count_kv", 4),
        ("attention.head_count_kv", 0),
        ("attention.head_count_kv", np.array([2])),
        ("attention.head_count_kv", np.array([2, -2])),
        ("attention.head_count_kv", np.array([0, 0])),
        ("attention.key_length", 32),
        ("attention.key_length", float("nan")),
        ("rope.freq_base", float("inf")),
        ("rope.freq_base", -1.0),
        ("rope.dimension_count", 0),
        ("rope.scaling.factor", "two"),
        ("rope.freq_base_swa", "x"),
        ("attention.layer_norm_rms_epsilon", -1.0),
        ("attention.layer_norm_rms_epsilon", float("nan")),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(key, value, tmp_path):
    tiny_gguf.write_llama(tmp_path / "llama.gguf")
    header = gguf_header.read_header(tmp_path / "llama.gguf")
    specs.spec_of(header)
    linear = {"llama.rope.scaling.type": "linear"}
    with pytest.raises(InputError) as caught:
        specs.spec_of(replace(header, metadata=header.metadata | linear | {f"llama.{key}": value}))
    assert caught.value.hint


def test_what_llama_cpp_cannot_compute_with_is_refused(tmp_path):
    """Both end the process there, one at loading and one at the first token."""
    tiny_gguf.write_gemma3(tmp_path / "gemma3.gguf")
    header = gguf_header.read_header(tmp_path / "gemma3.gguf")
    with pytest.raises(InputError, match="sliding_window_pattern"):
        specs.spec_of(replace(header, metadata=header.metadata | {"gemma3.attention.sliding_window_pattern": 1}))
    rounded = replace(header.tensors["output_norm.weight"], ggml_type=1)
    with pytest.raises(InputError, match="output_norm"):
        specs.spec_of(replace(header, tensors=header.tensors | {"output_norm.weight": rounded}))


SOURCE = os.environ.get("EDGEPATCH_LLAMA_CPP", "")


@pytest.mark.skipif(not SOURCE, reason="EDGEPATCH_LLAMA_CPP names llama.cpp's source tree")
@pytest.mark.parametrize("name", [a.name for a in parity_models.ARCHITECTURES])
def test_llama_cpps_own_converter_gives_the_folders_spec(name, tmp_path):
    architecture = parity_models.architecture(name)
    parity_models.build_folder(architecture, tmp_path / "hf")
    # Transformers takes every Qwen2 folder for one with Qwen2's own tokens, for which the tiny vocabulary has no room.
    foreign = replace(architecture, own_converter=name == "qwen2")
    parity_models.convert(foreign, tmp_path / "hf", tmp_path / "model.gguf", "F16", Path(SOURCE))
    assert specs.read_spec(tmp_path / "model.gguf") == folders.read_spec(tmp_path / "hf")


@pytest.mark.skipif(not SOURCE, reason="EDGEPATCH_LLAMA_CPP names llama.cpp's source tree")
@pytest.mark.parametrize("name", [a.name for a in parity_models.ARCHITECTURES])
def test_llama_cpps_own_files_become_the_folder_again(name, tmp_path):
    """Every weight, and the same logits; what Transformers has no place for is refused."""
    import torch

    from edgepatch.converters.dequantization import dequantize

    architecture = parity_models.architecture(name)
    parity_models.build_folder(architecture, tmp_path / "hf")
    foreign = replace(architecture, own_converter=name == "qwen2")
    parity_models.convert(foreign, tmp_path / "hf", tmp_path / "model.gguf", "F32", Path(SOURCE))
    if name == "qwen3_5":
        with pytest.raises(InputError, match="finds no weights"):
            dequantize(tmp_path / "model.gguf", tmp_path / "again")
        return
    dequantize(tmp_path / "model.gguf", tmp_path / "again")
    old, new = (folders.load_model(tmp_path / folder) for folder in ("hf", "again"))
    weights = new.state_dict()
    assert all(torch.allclose(weights[n], value, rtol=0, atol=1e-7) for n, value in old.state_dict().items())
    with torch.inference_mode():
        logits = [model(torch.arange(20, 60)[None]).logits for model in (old, new)]
    assert torch.equal(*logits)
