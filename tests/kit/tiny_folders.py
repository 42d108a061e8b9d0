"""Tiny random Transformers folders of several architectures."""

from __future__ import annotations

from pathlib import Path


def make_folder(target, architecture, **changes):
    """A random model of another architecture with the lab's kind of tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgepatch.bench.lab.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words to merge, some more words"] * 3, context_length=128, vocab_size=300)
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(5)
    config = AutoConfig.for_model(architecture, **(settings | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (target / path.name).symlink_to(path)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return target
