"""SentencePiece tokenizers in GGUF: llama.cpp gives the same ids as the folder, in plain text and in a conversation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgepatch.converters.gguf import header, specs, writer
from edgepatch.converters.hf import folders
from edgepatch.errors import InputError
from edgepatch.text.tokenizers import FolderTokenizer
from kit.llamacpp_oracle import tokens_of

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the warm afternoon sun.",
    "Patching a model should be as simple as patching software: verify, apply, roll back.",
    "Grüße aus München, naïve café, 日本語, 12345 and 3.14",
    "  two  spaces,\ttabs and more   spaces",
]
TEXTS = [
    "",
    "a",
    "The lazy fox",
    " one space before",
    "   three spaces before",
    "trailing  ",
    "two\n\nlines\r\n and\ttabs",
    "Grüße, naïve café",
    "日本語 Ελληνικά עברית",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301",
    "\u00a0\u200b\ufeff\u3000odd",
    "1,000,000 ½ ٣",
    "sign ▁ of a space",
    "<0x41> <s> </s> <unk> [INST]",
    "a<tool>b <tool> c",
    "x" * 300,
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": " Grüße 🙂 42\n"},
    {"role": "assistant", "content": "<tool> ok"},
    {"role": "user", "content": "a\nb"},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny Mistral with ``tokenizer.model`` alone, as SentencePiece's trainer writes it."""
    import sentencepiece
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 3), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>", "<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        num_threads=1,
    )
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(7)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=None,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def with_definition(source: Path, target: Path, keep_model: bool = False, **changes) -> Path:
    """A copy of the folder with ``tokenizer.json``, changed."""
    shutil.copytree(source, target)
    definition = json.loads(FolderTokenizer(source).definition) | changes
    (target / "tokenizer.json").write_text(json.dumps(definition))
    if not keep_model:
        (target / "tokenizer.model").unlink()
    return target


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json", "both"])
def folder(request, model_folder, tmp_path_factory) -> Path:
    if request.param == "tokenizer.model":
        return model_folder
    return with_definition(
        model_folder, tmp_path_factory.mktemp("hf") / request.param, keep_model=request.param == "both"
    )


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer.convert_folder(folder, path, "F16")
    return path


def test_header_holds_a_sentencepiece_vocabulary(folder, file):
    metadata = header.read_header(file).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    tokens, types = metadata["tokenizer.ggml.tokens"], list(metadata["tokenizer.ggml.token_type"])
    assert types[:3] == [2, 3, 3]  # unknown, BOS, EOS
    assert [types[tokens.index(f"<0x{b:02X}>")] for b in range(256)] == [6] * 256
    assert types[tokens.index("<tool>")] == 4
    assert (tokens[511], types[511]) == ("[PAD511]", 5)


def test_spec_is_the_folders(folder, file):
    assert specs.read_spec(file) == folders.read_spec(folder)


def test_ids_are_the_folders(folder, file):
    reference = FolderTokenizer(folder)
    for text, ids in zip(TEXTS, tokens_of(file, TEXTS), strict=True):
        assert ids == reference.encode(text), text
        if "<" not in text and "▁" not in text:
            decode = reference.new_decoder()
            # A reply keeps the space that its first token begins with.
            assert "".join(map(decode, ids)) == (f" {text}" if text else "")


def test_ids_are_sentencepieces_own(model_folder, tmp_path):
    """Neither Transformers' reading of the model nor ours stands between the file and its ids."""
    import sentencepiece

    writer.convert_folder(model_folder, tmp_path / "model.gguf")
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_folder / "tokenizer.model"))
    texts = [text for text in TEXTS if text and "<" not in text]  # it puts no space behind a special token
    assert tokens_of(tmp_path / "model.gguf", texts, bos=False) == [model.Encode(text) for text in texts]


def test_conversations_are_the_folders(folder, file):
    from edgepatch.text.chat_templates import render_chat_template

    template = header.read_header(file).metadata["tokenizer.chat_template"]
    text = render_chat_template(template, MESSAGES, "<s>", "</s>")
    ids = FolderTokenizer(folder).encode(text, bos=False, trusted=True)
    assert tokens_of(file, [text], bos=False, trusted=True) == [ids]
    assert ids[0] == 1 and len(ids) > 40


def test_a_metaspace_step_differs_at_a_leading_space_alone(model_folder, tmp_path):
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    folder = with_definition(model_folder, tmp_path / "hf", normalizer=None, pre_tokenizer=step)
    writer.convert_folder(folder, tmp_path / "model.gguf")
    reference = FolderTokenizer(folder)
    for text, ids in zip(TEXTS, tokens_of(tmp_path / "model.gguf", TEXTS), strict=True):
        one_more = text.startswith(" ") or "<tool> " in text
        assert (ids == reference.encode(text)) is not one_more, text


def test_without_a_prefix(model_folder, tmp_path):
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    folder = with_definition(model_folder, tmp_path / "hf", normalizer=replace)
    writer.convert_folder(folder, tmp_path / "model.gguf")
    reference = FolderTokenizer(folder)
    assert header.read_header(tmp_path / "model.gguf").metadata["tokenizer.ggml.add_space_prefix"] is False
    assert tokens_of(tmp_path / "model.gguf", TEXTS) == [reference.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"normalizer": {"type": "NFKC"}}, "normalizer"), ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer")],
)
def test_other_steps_are_refused(model_folder, tmp_path, change, message):
    folder = with_definition(model_folder, tmp_path / "hf", **change)
    with pytest.raises(InputError, match=message) as caught:
        writer.convert_folder(folder, tmp_path / "model.gguf")
    assert "convert_hf_to_gguf" in caught.value.hint


def test_merges_that_are_not_sentencepieces_are_refused(model_folder, tmp_path):
    folder = with_definition(model_folder, tmp_path / "hf")
    definition = json.loads((folder / "tokenizer.json").read_text())
    del definition["model"]["merges"][20]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match="would merge"):
        writer.convert_folder(folder, tmp_path / "model.gguf")


def test_a_model_file_that_contradicts_the_definition_is_refused(model_folder, tmp_path):
    folder = with_definition(model_folder, tmp_path / "hf", keep_model=True)
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        writer.convert_folder(folder, tmp_path / "model.gguf")
    (folder / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="no SentencePiece model"):
        writer.convert_folder(folder, tmp_path / "model.gguf")
