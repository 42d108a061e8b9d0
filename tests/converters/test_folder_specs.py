"""Transformers folders read without Transformers: the same spec as with it, or none; and tables of weights that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from edgepatch.converters import weight_tables
from edgepatch.converters.hf import folders, specs
from edgepatch.errors import InputError
from edgepatch.text.tokenizers import FolderTokenizer
from edgepatch.text.vocabularies import definition_tokens
from kit.tiny_folders import copy_folder, make_folder

LAB = Path(__file__).parent.parent.parent / "bench" / "lab" / "model" / "base"
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ARCHITECTURES = {
    "llama": {},
    "llama3": {"architecture": "llama", "rope_parameters": LLAMA3},
    "mistral": {},
    "qwen2": {"rope_parameters": YARN},
    "qwen3": {},
    "phi3": {},
    "gemma3_text": {},
    "olmo2": {},
    "granite": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_spec_is_that_of_transformers(name, tmp_path):
    settings = dict(ARCHITECTURES[name])
    folder = make_folder(tmp_path / "model", settings.pop("architecture", name), **settings)
    assert specs.spec_of(specs.read_folder(folder)) == folders.read_spec(folder)


def test_the_lab_models_spec_is_that_of_transformers():
    assert specs.spec_of(specs.read_folder(LAB)) == folders.read_spec(LAB)


def rewrite(folder: Path, *drop: str, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_configs_of_an_older_transformers(tmp_path):
    """Without ``rope_parameters``: the rotary settings lie at the top, and some are left to defaults."""
    folder = make_folder(tmp_path / "model", "llama")
    for drop, changes in [
        ((), {"rope_theta": 12345.0}),
        ((), {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        (("head_dim",), {"hidden_size": 64}),
    ]:
        model = copy_folder(folder, tmp_path / f"old{len(list(tmp_path.iterdir()))}")
        rewrite(model, "rope_parameters", *drop, transformers_version="4.40.0", **changes)
        assert specs.spec_of(specs.read_folder(model)) == folders.read_spec(model)


@pytest.mark.parametrize(
    ("architecture", "dropped", "named"),
    [
        ("qwen3", "head_dim", "head_dim"),
        ("mistral", "num_key_value_heads", "num_key_value_heads"),
        ("phi3", "", "phi3"),
    ],
)
def test_what_an_old_config_leaves_open_is_not_guessed(architecture, dropped, named, tmp_path):
    folder = make_folder(tmp_path / "model", architecture)
    rewrite(folder, dropped, transformers_version="4.40.0")
    with pytest.raises(InputError, match=f"leaves.*{named}.*to Transformers"):
        specs.spec_of(specs.read_folder(folder))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"{}"),
        ("config.json", b"[" * 100_000),
        ("config.json", None),
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": [[]]}}'),
        ("tokenizer.json", None),
        ("model.safetensors", None),
        ("model.safetensors", b""),
    ],
)
def test_damaged_folders_are_refused(file, content, tmp_path):
    model = copy_folder(LAB, tmp_path / "model")
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    with pytest.raises(InputError) as caught:
        specs.spec_of(specs.read_folder(model))
    assert str(model) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"hidden_size": "256"},
        {"head_dim": "x"},
        {"vocab_size": True},
        {"rope_parameters": {"rope_theta": "x"}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}},
        {"model_type": 3},
        {"text_config": []},
    ],
    ids=str,
)
def test_settings_that_no_model_has_are_refused(changes, tmp_path):
    model = copy_folder(LAB, tmp_path / "model")
    rewrite(model, **changes)
    with pytest.raises(InputError, match=r"config\.json"):
        specs.spec_of(specs.read_folder(model))


def test_tokens_are_those_of_the_tokenizers_library(tiny_folder):
    for folder in (LAB, tiny_folder):
        assert specs.read_folder(folder).tokens == FolderTokenizer(folder).vocabulary


def test_tokens_of_other_tokenizers():
    from tokenizers import AddedToken, Tokenizer, models

    for model in (
        models.Unigram([("<unk>", 0.0), ("b", -1.0), ("a", -2.0)], 0),
        models.WordPiece({"[UNK]": 0, "b": 2, "a": 1}, unk_token="[UNK]"),
        models.WordLevel({"[UNK]": 1, "a": 0}, unk_token="[UNK]"),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens([AddedToken("<new>", special=True), AddedToken("a", special=True)])
        by_id = sorted((number, token) for token, number in tokenizer.get_vocab(with_added_tokens=True).items())
        assert definition_tokens(json.loads(tokenizer.to_str())) == [token for _, token in by_id]


# Tables of weights.


def safetensors(entries: dict, data: bytes = b"", length: int | None = None) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_vectors_of_every_float_type(tmp_path):
    import torch
    from safetensors.torch import save_file

    values = torch.tensor([1.5, -2.25, 3e-5, 0.0])
    kinds = {"a": torch.float64, "b": torch.float32, "c": torch.float16, "d": torch.bfloat16}
    save_file({name: values.to(kind) for name, kind in kinds.items()}, tmp_path / "x.safetensors", {"format": "pt"})
    table = weight_tables.read_table(tmp_path / "x.safetensors")
    assert table.metadata == {"format": "pt"}
    for name, kind in kinds.items():
        assert np.array_equal(table.tensors[name].vector(), values.to(kind).float().numpy())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        safetensors({}, length=2**62),
        safetensors({}, length=3),
        safetensors({"a": entry()}, b"\0" * 7),
        safetensors({"a": entry(offsets=(0, 4))}, b"\0" * 8),
        safetensors({"a": entry(offsets=(-8, 0))}, b"\0" * 8),
        safetensors({"a": entry(offsets=(8, 0))}, b"\0" * 8),
        safetensors({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8),
        safetensors({"a": entry(shape=(-2,))}, b"\0" * 8),
        safetensors({"a": entry(shape=(2.0,))}, b"\0" * 8),
        safetensors({"a": entry(dtype="F99")}, b"\0" * 8),
        safetensors({"a": {"dtype": "F32"}}),
        safetensors({"a": 3}),
        safetensors({"a": None}),
        safetensors({"__metadata__": 3}),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        b"GGUF" + bytes(60),
    ],
)
def test_tables_that_lie_are_refused(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        weight_tables.read_table(path)
    assert str(path) in str(caught.value)


def test_weights_in_several_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors({"x": entry()}, bytes(8)))
    (tmp_path / "b.safetensors").write_bytes(safetensors({"y": entry()}, bytes(8)))
    (tmp_path / "old.safetensors").write_bytes(b"not of the model")
    index = tmp_path / weight_tables.INDEX_FILE
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert weight_tables.read_checkpoint(tmp_path).keys() == {"x", "y"}
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 are missing, the first b\.safetensors"):
        weight_tables.read_checkpoint(tmp_path)
    for damaged in ("{", "[]", '{"weight_map": {"x": "../a.safetensors"}}', '{"weight_map": {"x": 3}}'):
        index.write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            weight_tables.read_checkpoint(tmp_path)


def test_pickles_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"found the pickle pytorch_model\.bin"):
        weight_tables.read_checkpoint(tmp_path)


def test_an_adapter_among_the_weights_is_refused_by_name(tmp_path):
    """Transformers applies it without a word; identity and sketches are of the weights alone."""
    copy_folder(LAB, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for read in (folders.read_spec, folders.load_model):
        with pytest.raises(InputError, match=r"adapter_config\.json lies beside the weights"):
            read(tmp_path / "model")
