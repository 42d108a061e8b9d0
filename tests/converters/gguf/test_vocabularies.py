"""Tokenizers in both directions: whatever way llama.cpp splits a text, the folder gives its ids."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from edgepatch.converters import tokenizer_probes
from edgepatch.converters.gguf import tokenizers, vocabularies
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.converters.pre_tokenizers import GPT2, PRE_TOKENIZERS, name_of, split_steps
from edgepatch.errors import InputError
from edgepatch.text.tokenizers import FolderTokenizer
from kit.llamacpp_oracle import tokens_of
from kit.real_model import smollm2_file

CORPUS = [
    "The quick brown fox isn't lazy: it's JUMPING over 12 dogs, 1234 cats and 1234567 birds!",
    "  two  spaces,\ttabs and more   spaces\n\n\nlines\r\n and   33  44 4444",
    "Grüße, naïve café, Cửa Việt, görmek, культуры и Ελληνικά, עברית العربية ١٢٣",
    "日本語の文章、カタカナ。中文测试 한국어 हिन्दी ภาษาไทย 🙂👩‍👩‍👧‍👦",
    "def f(x):\n    return x**2 + y_z  # code, HTTPServer camelCase https://a.b/c?d=e",
]
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_end|>"]
NAMES = list({pre_tokenizer: name for name, pre_tokenizer in reversed(PRE_TOKENIZERS.items())}.values())
BYTE_LEVEL = [name for name in NAMES if PRE_TOKENIZERS[name].is_byte_level]


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of another origin than the probes that the conversion itself tries."""
    draw = random.Random(seed)
    blocks = [(32, 126), (32, 126), (0xA0, 0x24F), (0x300, 0x5FF), (0x900, 0x97F), (0x1E00, 0x20CF), (0x3000, 0x30FF)]
    blocks += [(0x4E00, 0x4FFF), (0xAC00, 0xACFF), (0x1F300, 0x1F6FF), (9, 13)]

    def word() -> str:
        first, last = draw.choice(blocks)
        return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 6)))

    joints = ["", " ", " ", "  ", "\n", "   ", "'s ", "1", "42", "\t"]
    return ["".join(word() + draw.choice(joints) for _ in range(draw.randint(1, 10))) for _ in range(count)]


def write_folder(folder: Path, tokenizer: Tokenizer, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|bos|>", "pad_token": "<|pad|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level(name: str, steps: list | None = None) -> Tokenizer:
    """A tiny tokenizer that splits as llama.cpp does under this name, trained a moment ago."""
    scheme = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=scheme.ignores_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=steps is not None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*(split_steps(scheme) if steps is None else steps), last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return tokenizer


def write_vocabulary(folder: Path, path: Path, size: int) -> Path:
    """A GGUF file that holds the folder's tokenizer and an embedding of one column."""
    writer = gguf.GGUFWriter(path, "llama")
    tokenizers.add_tokenizer(writer, folder, size)
    writer.add_tensor("token_embd.weight", np.zeros((size, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_back(path: Path, folder: Path) -> FolderTokenizer:
    folder.mkdir()
    vocabularies.write_tokenizer(read_header(path), folder)
    return FolderTokenizer(folder)


def require_llama_cpps(path: Path, reader: FolderTokenizer, texts: list[str]) -> None:
    for trusted in (False, True):
        ids = tokens_of(path, texts, trusted=trusted)
        for text, expected in zip(texts, ids, strict=True):
            assert reader.encode(text, trusted=trusted) == expected, (text, trusted)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_every_way_to_split_in_both_directions(name, tmp_path):
    folder = write_folder(tmp_path / "folder", byte_level(name))
    file = write_vocabulary(folder, tmp_path / "a.gguf", 704)
    tokenizers.require_same_tokenizer(folder, file)
    assert read_header(file).metadata["tokenizer.ggml.pre"] == name
    texts = [*random_texts(60, 1), "a <tool>b<|im_end|> <|bos|>c <tool> "]
    require_llama_cpps(file, FolderTokenizer(folder), texts)
    reader = read_back(file, tmp_path / "again")
    require_llama_cpps(file, reader, texts)
    assert reader.digest == FolderTokenizer(folder).digest
    again = write_vocabulary(tmp_path / "again", tmp_path / "b.gguf", 704)
    assert read_header(again).metadata["tokenizer.ggml.pre"] == name
    assert tokens_of(again, texts) == tokens_of(file, texts)


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe"])
def test_a_probe_gives_the_ids_that_llama_cpp_gives_each_time(name, tmp_path):
    file = write_vocabulary(write_folder(tmp_path / "folder", byte_level(name)), tmp_path / "a.gguf", 704)
    texts = [*random_texts(40, 3), "a <tool>b", "a<|im_end|> b", "<|im_end|", "<|bos|>", "", "x", "x", "<|pad|>x"]
    plain, trusted = tokens_of(file, texts), tokens_of(file, texts, trusted=True)
    assert plain != trusted
    with Vocabulary(file) as vocabulary:
        probe = vocabulary.probe()
        assert [(probe(text, False), probe(text, True)) for text in texts] == [*zip(plain, trusted, strict=True)]
        assert [probe(text, True) for text in texts] == trusted
        assert [probe(text, False) for text in texts] == plain


def test_every_name_of_llama_cpps_is_known():
    """Each is read by the library itself, with the same tokens under each name."""
    assert len(PRE_TOKENIZERS) > 70 and len(NAMES) > 25
    assert {"smollm", "gpt-2", "llama-bpe", "qwen2", "deepseek-v3", "gpt-4o", "default"} <= set(NAMES)


def test_smollms_own_definition_is_recognised(tmp_path):
    """As it is published: every digit on its own, then GPT-2's way with the regular expression of the step itself."""
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    folder = write_folder(tmp_path / "folder", byte_level("smollm", steps))
    file = write_vocabulary(folder, tmp_path / "a.gguf", 704)
    assert read_header(file).metadata["tokenizer.ggml.pre"] == "smollm"
    tokenizers.require_same_tokenizer(folder, file)
    require_llama_cpps(file, FolderTokenizer(folder), ["a  4", "4 ½", "3333", *random_texts(100, 2)])


@pytest.mark.parametrize(
    ("patterns", "ignores_merges", "name"),
    [
        ([GPT2 + r"|\s+"], False, "gpt-2"),
        (
            [
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ],
            True,
            "llama-bpe",
        ),
        (
            [
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ],
            False,
            "qwen2",
        ),
        ([r"\p{L}+|\p{N}+"], False, None),
        ([], False, None),
    ],
)
def test_published_patterns_have_names(patterns, ignores_merges, name):
    assert name_of(patterns, ignores_merges) == name


def test_an_unknown_way_to_split_is_refused_by_name(tmp_path):
    folder = write_folder(tmp_path / "folder", byte_level("gpt-2"))
    file = write_vocabulary(folder, tmp_path / "a.gguf", 704)
    data = file.read_bytes()
    at = data.index(b"tokenizer.ggml.pre") + len("tokenizer.ggml.pre") + 4 + 8
    assert data[at : at + 5] == b"gpt-2"
    (tmp_path / "b.gguf").write_bytes(data[:at] + b"gpt-9" + data[at + 5 :])
    with pytest.raises(InputError, match="gpt-9"):
        read_back(tmp_path / "b.gguf", tmp_path / "again")


@pytest.mark.parametrize(("model", "word"), [("bert", "bert"), ("t5", "t5"), ("rwkv", "rwkv"), ("plamo2", "plamo2")])
def test_vocabularies_of_other_kinds_are_refused_by_name(model, word, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    writer.add_tensor("token_embd.weight", np.zeros((2, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=word) as caught:
        read_back(tmp_path / "a.gguf", tmp_path / "folder")
    assert caught.value.hint


def test_a_token_that_llama_cpp_takes_for_an_end_is_one_in_the_folder(tmp_path):
    """Qwen2's vocabulary has a plain token "</s>": llama.cpp makes it special, and ends replies at it."""
    tokenizer = byte_level("qwen2")
    definition = json.loads(tokenizer.to_str())
    definition["model"]["vocab"]["</s>"] = 701
    folder = write_folder(tmp_path / "folder", Tokenizer.from_str(json.dumps(definition)))
    file = write_vocabulary(folder, tmp_path / "a.gguf", 704)
    tokenizers.require_same_tokenizer(folder, file)
    assert list(read_header(file).metadata["tokenizer.ggml.token_type"])[701] == 1
    assert FolderTokenizer(folder).encode("a</s>", trusted=True) != tokens_of(file, ["a</s>"], trusted=True)[0]
    reader = read_back(file, tmp_path / "again")
    require_llama_cpps(file, reader, ["a</s>", "</s>", " </s> b", *random_texts(50, 3)])


def test_a_difference_is_told_with_text_and_ids(tmp_path):
    folder = write_folder(tmp_path / "folder", byte_level("gpt-2"))
    other = write_folder(tmp_path / "other", byte_level("smollm"))
    file = write_vocabulary(folder, tmp_path / "a.gguf", 704)
    with pytest.raises(
        InputError, match=r"is not llama\.cpp's: text '.*': llama\.cpp has \[.*\d.*\], the folder \["
    ) as caught:
        tokenizers.require_same_tokenizer(other, file)
    assert "convert_hf_to_gguf" in caught.value.hint


def test_probes_hold_what_readers_are_known_to_differ_in():
    texts = list(tokenizer_probes.texts(lambda ids: "", 100, ["<s>"]))
    assert {"a  4", "4 ½", "3333", "\n =", "Cửa Việt"} <= set(texts)
    assert texts == list(tokenizer_probes.texts(lambda ids: "", 100, ["<s>"]))
    assert sum("<s>" in text for text in texts) > 1


# End tokens and chat templates.


def test_three_end_tokens_survive_both_ways(tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.add_special_tokens(["<stop one>", "<stop two>", "<stop three>"])
    folder = write_folder(tmp_path / "folder", tokenizer)
    ids = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<stop one>", "<stop two>", "<stop three>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[:3]}))
    file = write_vocabulary(folder, tmp_path / "a.gguf", 710)
    tokenizers.require_same_tokenizer(folder, file)
    (tmp_path / "again").mkdir()
    assert set(vocabularies.write_tokenizer(read_header(file), tmp_path / "again")) == set(ids[:3])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    file = write_vocabulary(folder, tmp_path / "b.gguf", 710)
    with pytest.raises(InputError, match="end a reply"):
        tokenizers.require_same_tokenizer(folder, file)


def test_named_chat_templates_survive_both_ways(tmp_path):
    named = [{"name": "tool_use", "template": "tools: {{ x }}"}, {"name": "default", "template": "plain: {{ x }}"}]
    folder = write_folder(tmp_path / "folder", byte_level("gpt-2"), chat_template=named)
    file = write_vocabulary(folder, tmp_path / "a.gguf", 704)
    metadata = read_header(file).metadata
    assert metadata["tokenizer.chat_template"] == "plain: {{ x }}"
    assert metadata["tokenizer.chat_template.tool_use"] == "tools: {{ x }}"
    read_back(file, tmp_path / "again")
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert {e["name"]: e["template"] for e in settings["chat_template"]} == {e["name"]: e["template"] for e in named}
    write_folder(folder, byte_level("gpt-2"))
    (folder / "chat_template.jinja").write_text("from a file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag from a file")
    metadata = read_header(write_vocabulary(folder, tmp_path / "b.gguf", 704)).metadata
    assert metadata["tokenizer.chat_template"] == "from a file"
    assert metadata["tokenizer.chat_template.rag"] == "rag from a file"


# A real vocabulary.


def test_smollm2_in_both_directions(tmp_path):
    """Over 1,000 texts: the file, the folder made of it, and the file made of the folder give the same ids."""
    file = smollm2_file()
    reader = read_back(file, tmp_path / "folder")
    texts = ["a  4", "4 ½", "3333", *random_texts(1000, 4), *CORPUS, *_data_lines(500)]
    require_llama_cpps(file, reader, texts)
    again = write_vocabulary(tmp_path / "folder", tmp_path / "b.gguf", 49152)
    assert read_header(again).metadata["tokenizer.ggml.pre"] == "smollm"
    tokenizers.require_same_tokenizer(tmp_path / "folder", again)
    assert tokens_of(again, texts) == tokens_of(file, texts)
    assert reader.digest == read_back(again, tmp_path / "again").digest


def _data_lines(count: int) -> list[str]:
    folder = os.environ.get("EDGEPATCH_DATA")
    if not folder:
        return []
    files = sorted(file for suffix in ("*.txt", "*.jsonl") for file in Path(folder).rglob(suffix))
    lines = [line for file in files for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return random.Random(0).sample(lines, min(count, len(lines)))
