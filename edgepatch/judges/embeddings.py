"""Frozen sentence embeddings, all-MiniLM-L6-v2 (Reimers and Gurevych 2019; Wang et al. 2020), run with torch.

The weights come with the Python package that ``edgepatch/known_models.py`` names "minilm": one zip file, whose bytes are pinned. Nothing is
unpacked on the disk, and no code of the package is run.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError, MissingExtraError
from edgepatch.known_models import KNOWN_MODELS, find

MAX_TOKENS = 256
"""As in its ``sentence_bert_config.json``: what is behind them is not read."""

BATCH_TEXTS = 64
UNUSED_WEIGHTS = ("embeddings.position_ids", "pooler.")
"""The sentence embedding is a mean over tokens: BERT's pooler has no part in it."""


class SentenceEmbedder:
    """The embedding model, on the CPU, with as many threads as torch has.

    Args:
        path: the zip file with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    Attributes:
        dim: D, of a sentence embedding (384).
        num_features: F, of ``features``.

    Raises:
        InputError: the file lacks a part.
        MissingExtraError: torch, transformers or tokenizers is not installed.
    """

    def __init__(self, path: Path) -> None:
        parts = _read_parts(path)
        self._model = _load_model(parts)
        self._tokenizer = _load_tokenizer(parts)
        self.dim: int = self._model.config.hidden_size
        self.num_layers: int = self._model.config.num_hidden_layers + 1
        self.num_features = 2 * self.num_layers * self.dim

    def features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """What the heads read: the mean and the maximum over a text's tokens, of every layer.

        The mean of the last layer is the sentence embedding. The layers below keep more of the words themselves, and a maximum keeps
        what a single token says, which a mean over a long text washes out.

        Args:
            texts: N strings; of one with more than 256 word pieces, the rest is not read.

        Returns:
            (N, F) float32: layer 0 (the word embeddings) first; of each layer the D means, then the D maxima.
        """
        features = np.zeros((len(texts), self.num_features), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # of like length, so that little is padding
        for start in range(0, len(order), BATCH_TEXTS):
            rows = order[start : start + BATCH_TEXTS]
            features[rows] = self._pooled([texts[i] for i in rows])
        return features

    def _pooled(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        encoded = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([row.ids for row in encoded])
        mask = torch.tensor([row.attention_mask for row in encoded])
        with torch.inference_mode():
            layers = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            hidden, present = torch.stack(layers, dim=1), mask[:, None, :, None].bool()
            mean = (hidden * present).sum(dim=2) / present.sum(dim=2)
            peak = hidden.masked_fill(~present, -torch.inf).amax(dim=2)
            pooled: NDArray[np.float32] = torch.stack((mean, peak), dim=2).flatten(start_dim=1).numpy()
        return pooled

    def sentence_embeddings(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, D) float32, of length 1: the model's sentence embeddings, from (N, F) ``features``."""
        mean = features[:, -2 * self.dim : -self.dim]
        unit: NDArray[np.float32] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit


@cache
def shared_embedder() -> SentenceEmbedder:
    """The embedding model of the installed package, read once a process (a second, 100 MB).

    Raises:
        InputError: its package is not installed, or does not hold the pinned bytes.
        MissingExtraError: torch, transformers or tokenizers is not installed.
    """
    return SentenceEmbedder(find("minilm"))


def embedding_digest() -> str:
    """SHA-256 of the only embedding model that the heads were trained on."""
    return KNOWN_MODELS["minilm"].sha256


def _read_parts(path: Path) -> dict[str, bytes]:
    names = ("config.json", "model.safetensors", "tokenizer.json")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in names}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"embedding model {path}: expected a zip file with {', '.join(names)}: {error}",
            hint="install its package again",
        ) from None


def _load_model(parts: dict[str, bytes]) -> Any:
    try:
        import safetensors.torch
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise MissingExtraError(error.name or "transformers", "train") from None
    model = BertModel(BertConfig(**json.loads(parts["config.json"])), add_pooling_layer=False)
    weights = safetensors.torch.load(parts["model.safetensors"])
    model.load_state_dict({name: w for name, w in weights.items() if not name.startswith(UNUSED_WEIGHTS)})
    return model.eval()


def _load_tokenizer(parts: dict[str, bytes]) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError(error.name or "tokenizers", "train") from None
    tokenizer = Tokenizer.from_str(parts["tokenizer.json"].decode("utf-8"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer
