"""What a Transformers folder says of itself, read without Transformers, PyTorch or the tokenizers library.

``hf.read_spec`` asks Transformers, which knows what an architecture means where its config is silent. Here a silent config is
refused, so that the answer is the same or there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgepatch.converters import architectures, rope_parameters
from edgepatch.converters.hf.folders import read_norms
from edgepatch.converters.weight_tables import StoredTensor, read_checkpoint
from edgepatch.errors import InputError
from edgepatch.files import strict_json
from edgepatch.tensors import ModelSpec, tokenizer_digest, weight_fingerprint
from edgepatch.text.vocabularies import definition_tokens

PLAIN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose configs are understood whichever Transformers wrote them."""

EXPLICIT_SINCE = 5
"""From this version on Transformers writes every setting of an architecture into the config."""

HINT = "download the model again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size; empty where there is no such file.

    Raises:
        InputError: it cannot be read, is too large, or no JSON object.
    """
    try:
        is_there = path.is_file()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", HINT) from error
    return strict_json.read_json(path, hint=HINT, infinite=True) if is_there else {}


@dataclass(frozen=True)
class FolderHeader:
    """The settings of a model folder.

    Attributes:
        path: the folder.
        whole_config: ``config.json``.
    """

    path: Path
    whole_config: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the language model."""
        text = self.whole_config.get("text_config")
        return text if isinstance(text, dict) else self.whole_config

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All weights, by their names in the checkpoint."""
        return read_checkpoint(self.path)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """``tokenizer_config.json``."""
        return read_json(self.path / "tokenizer_config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """``generation_config.json``."""
        return read_json(self.path / "generation_config.json")

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """``tokenizer.json``."""
        return read_json(self.path / "tokenizer.json")

    @cached_property
    def tokens(self) -> list[str]:
        """The vocabulary in order of its ids.

        Raises:
            InputError: the folder has no ``tokenizer.json``, or a damaged one.
        """
        if not self.tokenizer:
            raise InputError(f"{self.path} has no tokenizer.json", hint="save the tokenizer as tokenizer.json")
        try:
            return definition_tokens(self.tokenizer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{self.path / 'tokenizer.json'} is damaged: {error!r}", HINT) from None

    def setting(self, name: str) -> int:
        """A positive whole number of the language model.

        Raises:
            InputError: it is missing, or something else.
        """
        value = self.config.get(name)
        if type(value) is not int or value < 1:
            raise InputError(
                f"{self.path / 'config.json'}: {name}: expected a positive whole number, found {value!r:.60}", HINT
            )
        return value


def read_folder(folder: Path) -> FolderHeader:
    """The settings of a Transformers folder.

    Raises:
        InputError: it has no ``config.json``, or a damaged one.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    if not isinstance(text, dict) or not isinstance(text.get("model_type"), str):
        raise InputError(f"{folder / 'config.json'}: expected a model_type, found none", HINT)
    return FolderHeader(folder, config)


def spec_of(folder: FolderHeader) -> ModelSpec:
    """The model of a folder; equal to ``hf.read_spec``.

    Raises:
        InputError: a file is missing or damaged, or the config leaves a setting to Transformers' defaults.
        MissingExtraError: the gguf package, which knows the names of tensors, is not installed.
    """
    try:
        return _read(folder)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"{folder.path / 'config.json'} is damaged: {error!r}", HINT) from None


def _read(folder: FolderHeader) -> ModelSpec:
    config = _completed(folder)
    architecture = architectures.gguf_name(config["model_type"])
    heads, layers = folder.setting("num_attention_heads"), folder.setting("num_hidden_layers")
    head_dim = int(config.get("head_dim") or folder.setting("hidden_size") // heads)
    theta, scaling = rope_parameters.of_config(config, architecture, head_dim)
    return ModelSpec(
        model_type=architecture,
        hidden_size=folder.setting("hidden_size"),
        num_hidden_layers=layers,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocab_size=folder.setting("vocab_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        tokenizer_digest=tokenizer_digest(folder.tokens),
        weight_fingerprint=weight_fingerprint(read_norms(folder.path, architecture, layers)),
    )


def _completed(folder: FolderHeader) -> dict[str, Any]:
    """The config of the language model with its rotary settings where Transformers 5 has them.

    Raises:
        InputError: it leaves a setting to the defaults of its architecture.
    """
    config = dict(folder.config)
    kind, rope = config["model_type"], config.get("rope_parameters")
    version = str(folder.whole_config.get("transformers_version", "0")).split(".")[0]
    if version.isdigit() and int(version) >= EXPLICIT_SINCE and isinstance(rope, dict):
        return config
    silent = [name for name in _needed(kind, isinstance(rope, dict)) if config.get(name) is None]
    if kind not in PLAIN_TYPES or silent:
        what = ", ".join(silent) or f"what a {kind} is"
        raise InputError(
            f"{folder.path / 'config.json'} leaves {what} to Transformers",
            hint="`edgepatch show --all` asks Transformers",
        )
    if not isinstance(rope, dict):
        scaling = config.get("rope_scaling") or {}
        config["rope_parameters"] = {**scaling, "rope_theta": config.get("rope_theta") or 10000.0}
    return config


def _needed(kind: str, has_rope: bool) -> list[str]:
    """Settings whose defaults differ between architectures."""
    if kind == "llama":  # the oldest ones have none of these
        return []
    return ["num_key_value_heads", *["rope_theta"] * (not has_rope), *["head_dim"] * (kind == "qwen3")]
