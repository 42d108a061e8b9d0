"""GGUF base models: what is read back equals the folder, whatever the quantization; damaged files are refused."""

import os
import struct

import numpy as np
import pytest

from edgepatch.converters import rope
from edgepatch.converters.gguf import header as gguf_header
from edgepatch.converters.gguf import library, specs, writer
from edgepatch.converters.hf import folders
from edgepatch.errors import InputError
from edgepatch.text.tokenizers import FolderTokenizer
from kit.tiny_folders import copy_folder, make_folder

TEXTS = [
    "",
    "a",
    "Hello, world! It's 12345 o'clock; we'll SEE.",
    "  leading,   double  and trailing spaces  ",
    "tabs\tand\n\nnew\r\nlines \n",
    "Grüße, naïve café, 日本語, Ελληνικά, עברית, हिन्दी",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 and combining e\u0301",
    "3.14159 1,000,000 ½ ٣",
    "def f(x):\n    return x**2  # code",
    "\u00a0\u200b\ufeff\u3000odd spaces",
]


@pytest.fixture(scope="module")
def files(tiny_ggufs):
    """Quantization -> GGUF file of the tiny model."""
    return tiny_ggufs


def test_spec_is_the_folders_whatever_the_quantization(files, tiny_folder):
    expected = folders.read_spec(tiny_folder)
    for name, path in files.items():
        assert specs.read_spec(path) == expected, name
        assert specs.quantization(gguf_header.read_header(path)) == name


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True, "head_dim": 16}),
        ("qwen3", {"rope_theta": 1e6}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_other_architectures_match_transformers(architecture, changes, tmp_path):
    import torch

    from edgepatch.runtimes import load_runtime

    folder = make_folder(tmp_path / "hf", architecture, **changes)
    path = tmp_path / "model.gguf"
    assert writer.convert_folder(folder, path, "F32") == folders.read_spec(folder) == specs.read_spec(path)
    tokens = list(range(20, 60))
    with torch.inference_mode():
        expected = folders.load_model(folder)(torch.tensor([tokens])).logits[0].numpy()
    with load_runtime(path, None, kv_type="f32", flash_attention=False, num_threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - expected).max() <= 5e-5


def test_tokens_are_the_folders(files, tiny_folder):
    from edgepatch.runtimes import load_runtime

    reference = FolderTokenizer(tiny_folder)
    messages = [
        {"role": "user", "content": "Grüße 🙂 42"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "a\nb"},
    ]
    with load_runtime(files["Q8_0"], None, num_threads=1) as runtime:
        for text in TEXTS:
            assert runtime.encode(text) == reference.encode(text), text
            decode, expected = runtime.backend.new_decoder(), reference.new_decoder()
            tokens = reference.encode(text)
            assert "".join(map(decode, tokens)) == "".join(map(expected, tokens)) == text
        assert runtime.encode_chat(messages) == reference.encode_chat(messages)
        assert runtime.end_token_ids == reference.end_token_ids
        spelled = "<|im_start|>user\nx<|im_end|>"
        assert runtime.encode(spelled) == reference.encode(spelled)
        assert runtime.end_token_ids.isdisjoint(runtime.encode(spelled)), "plain text must not end a turn"


def test_key_layout_by_hand_for_one_head():
    key = np.arange(8.0)[None, None]  # (K, P, H)
    assert rope.interleave(key).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    weight = np.arange(16.0)[:, None].repeat(3, axis=1)  # two heads of 8
    assert rope.projection_to_llamacpp(weight, 2, "llama")[:, 0].tolist() == [
        0,
        4,
        1,
        5,
        2,
        6,
        3,
        7,
        8,
        12,
        9,
        13,
        10,
        14,
        11,
        15,
    ]
    assert np.array_equal(rope.projection_to_llamacpp(weight, 2, "qwen2"), weight)
    assert np.array_equal(rope.projection_from_llamacpp(rope.projection_to_llamacpp(weight, 2, "llama"), 2), weight)
    with pytest.raises(InputError, match="cohere"):
        rope.projection_to_llamacpp(weight, 2, "cohere")


def test_truncated_and_damaged_files_are_refused(files, tmp_path):
    data = files["Q4_0"].read_bytes()
    path = tmp_path / "damaged.gguf"
    for length in [0, 3, 4, 20, 100, 5000, len(data) // 2, len(data) - 40]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError) as caught:
            specs.read_spec(path)
        assert caught.value.hint
        with pytest.raises(InputError):
            writer.quantize(path, tmp_path / "target.gguf", "Q8_0")
    for position in range(0, 3000, 37):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x80]) + data[position + 1 :])
        try:
            specs.read_spec(path)
        except InputError:
            continue
    assert not (tmp_path / "target.gguf").exists()


def test_a_length_that_lies_is_refused_at_once(tmp_path):
    path = tmp_path / "liar.gguf"
    key = b"general.alignment"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    for value in [struct.pack("<IIQ", 9, 0, 2**60), struct.pack("<IIQ", 9, 8, 2**60), struct.pack("<IQ", 8, 2**63)]:
        path.write_bytes(header + value)
        with pytest.raises(InputError, match="ends at"):
            gguf_header.read_header(path)


def test_unknown_types_and_sources_are_refused(files, tmp_path):
    target = tmp_path / "new.gguf"
    with pytest.raises(InputError, match="Q9_9"):
        writer.quantize(files["F16"], target, "Q9_9")
    with pytest.raises(InputError, match="requantizing"):
        writer.quantize(files["Q8_0"], target, "Q4_0")
    with pytest.raises(InputError, match="cannot read"):
        writer.quantize(tmp_path / "absent.gguf", target, "Q8_0")
    with pytest.raises(InputError, match="expected F32 or F16"):
        writer.convert_folder(tmp_path, target, "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_every_type_of_llama_cpp_works_or_says_what_it_needs(files, tmp_path):
    refused = {}
    for name in library.quantization_types():
        path = tmp_path / f"{name}.gguf"
        try:
            assert writer.quantize(files["F16"], path, name, num_threads=1) == specs.read_spec(files["F16"])
            # Without experts there is nothing to store as MXFP4: the name is that of the weights.
            stored = "Q8_0" if name == "MXFP4_MOE" else name
            assert specs.quantization(gguf_header.read_header(path)) == stored
        except InputError as error:
            refused[name] = str(error)
    for name, message in refused.items():
        assert "importance matrix" in message or "cannot quantize to it" in message, message
        assert not (tmp_path / f"{name}.gguf").exists()
    assert {"IQ1_S", "IQ2_XXS"} <= set(refused)
    assert set(refused).isdisjoint({"Q4_0", "Q8_0", "Q2_K", "Q3_K_M", "Q5_K_S", "Q6_K", "IQ4_XS", "BF16", "TQ1_0"})


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tiny_folder, tmp_path, monkeypatch, fault):
    import gguf as package

    def fail(self, tensor):
        raise fault

    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    monkeypatch.setattr(package.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(InputError if isinstance(fault, OSError) else KeyboardInterrupt):
        writer.convert_folder(tiny_folder, target)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3_text"}, "convert_hf_to_gguf"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope"),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(tiny_folder, tmp_path, change, message):
    import json

    folder = copy_folder(tiny_folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError) as caught:
        writer.convert_folder(folder, tmp_path / "model.gguf")
    assert message in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "model.gguf").exists()


def test_unknown_pre_tokenizers_are_refused(tiny_folder, tmp_path):
    import json

    folder = copy_folder(tiny_folder, tmp_path / "hf")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, tokenizer["pre_tokenizer"]],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="pre-tokenizer"):
        writer.convert_folder(folder, tmp_path / "model.gguf")
