"""A GGUF file as a Transformers model in memory: dequantized weights, the config that its header describes, and its tokenizer.

Nothing in the file may be left over, and the tokenizer gives llama.cpp's ids, or the file is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepatch.converters.gguf import vocabularies, weights
from edgepatch.converters.gguf.configs import HINT, config_of, is_plain, special_tokens
from edgepatch.converters.gguf.header import GGUFHeader, read_header
from edgepatch.converters.gguf.specs import spec_of
from edgepatch.decoding import defaults
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.files.pretrained import load_pretrained_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _require_whole(model: Any, loading: dict[str, Any], header: GGUFHeader) -> None:
    """Every weight of the model came from the file, and every weight in the file went into the model."""
    missing = sorted({str(key) for name in ("missing_keys", "mismatched_keys") for key in loading.get(name) or ()})
    if missing:
        raise InputError(f"{header.path}: Transformers finds no weights for {', '.join(missing[:4])}", hint=HINT)
    have = sum(p.numel() for p in model.parameters())
    want = sum(prod(info.shape) for name, info in header.tensors.items() if name not in weights.BESIDE_WEIGHTS)
    if have != want:
        raise InputError(f"{header.path}: expected {want} weights in the model, Transformers takes {have}", hint=HINT)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keeps Transformers' table of missing weights from the terminal: it becomes an error of ours."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_model(path: Path) -> PreTrainedModel:
    """The causal LM in a GGUF file, dequantized to float32.

    Raises:
        InputError: the file is damaged, or Transformers cannot hold its architecture faithfully.
        MissingExtraError: torch, transformers or gguf is not installed.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train") from None
    header = read_header(path)
    spec = spec_of(header)
    weights.require_readable(header)
    config = config_of(header, spec)
    if is_plain(header):
        folder: Path | None = None
        source: dict[str, Any] = {"state_dict": weights.state_dict(header, weights.plan(header, spec, config))}
    else:
        folder, source = path.parent.resolve(), {"gguf_file": path.name}
    with _errors_only():
        try:
            model, loading = load_pretrained_model(
                weights.model_class(config),
                folder,
                **source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"Transformers cannot load {path} ({header.architecture}): {reason}", hint=HINT) from None
    _require_whole(model, loading, header)
    return model


@contextmanager
def tokenizer_folder(path: Path) -> Iterator[Path]:
    """A temporary folder with the tokenizer of a GGUF file, as a Transformers folder holds it.

    Raises:
        InputError: the file is damaged, or its tokenizer is of a kind that is not read here.
        MissingExtraError: tokenizers or llama-cpp-python is not installed.
    """
    header = read_header(path)
    with tempfile.TemporaryDirectory(prefix="edgepatch-") as name:
        ends = vocabularies.write_tokenizer(header, Path(name))
        write_generation_config(header, ends, Path(name))
        yield Path(name)


def write_generation_config(header: GGUFHeader, ends: list[int], folder: Path) -> None:
    """Writes ``generation_config.json``: every token that ends a reply in llama.cpp, what begins and fills one up, and how to draw."""
    special = special_tokens(header)
    settings = {"bos_token_id": special["bos"], "eos_token_id": ends, "pad_token_id": special["pad"]}
    settings |= defaults.of_gguf(header.metadata).generation_config
    text = json.dumps({name: value for name, value in settings.items() if value is not None}, indent=2)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
