"""Heads on frozen embeddings: a logistic model over the features of a text, numpy only, in one safetensors file without code.

The file holds ``weights`` (F, C), ``bias`` (C,), and in its metadata, under ``edgepatch-judge-head``, JSON with exactly the keys
``format_version``, ``name``, ``classes`` (C names), ``embedding`` (SHA-256 of the embedding model that the features must come from) and
``sha256`` (of each tensor). One class is a probability by the sigmoid, several exclude each other by the softmax.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from edgepatch.errors import InputError, PatchFormatError
from edgepatch.files import strict_json
from edgepatch.files.reading import read_bounded
from edgepatch.judges.scorers import tensor_digests

METADATA_KEY = "edgepatch-judge-head"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 4 << 20
KEYS = ("classes", "embedding", "format_version", "name", "sha256")
MOST_CLASSES = 16


@dataclass(frozen=True, eq=False)
class Head:
    """A logistic model.

    Attributes:
        name: "toxicity-report", ...
        classes: C names, in the order of the columns.
        embedding: SHA-256 of the embedding model.
        weights: (F, C) float32.
        bias: (C,) float32.
    """

    name: str
    classes: tuple[str, ...]
    embedding: str
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __post_init__(self) -> None:
        columns = len(self.classes)
        if not 1 <= columns <= MOST_CLASSES or len(set(self.classes)) < columns:
            raise PatchFormatError(f"judge head: expected 1 to {MOST_CLASSES} different classes, found {self.classes}")
        if self.weights.ndim != 2 or self.weights.shape[1] != columns or self.bias.shape != (columns,):
            raise PatchFormatError(
                f"judge head: expected weights (F, {columns}) and bias ({columns},), found {self.weights.shape} and {self.bias.shape}"
            )
        for tensor in (self.weights, self.bias):
            if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
                raise PatchFormatError(f"judge head: expected finite float32 numbers, found {tensor.dtype} or NaN")

    def probabilities(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, C) float32 in 0..1, from (N, F) features.

        Raises:
            InputError: there are not F features.
        """
        if features.ndim != 2 or features.shape[1] != len(self.weights):
            raise InputError(
                f"judge head {self.name}: expected (N, {len(self.weights)}) features, found {features.shape}"
            )
        logits = np.clip(features.astype(np.float64) @ self.weights + self.bias, -50, 50)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True)) if len(self.classes) > 1 else np.exp(logits)
        total = odds.sum(axis=1, keepdims=True) if len(self.classes) > 1 else 1 + odds
        probabilities: NDArray[np.float32] = (odds / total).astype(np.float32)
        return probabilities


def head_bytes(head: Head) -> bytes:
    """The head's file; the same head gives the same bytes."""
    tensors: dict[str, NDArray[Any]] = {
        "weights": np.ascontiguousarray(head.weights),
        "bias": np.ascontiguousarray(head.bias),
    }
    manifest = {
        "classes": list(head.classes),
        "embedding": head.embedding,
        "format_version": FORMAT_VERSION,
        "name": head.name,
        "sha256": tensor_digests(tensors),
    }
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return safetensors.numpy.save(tensors, metadata={METADATA_KEY: text})


def read_head(path: Path) -> Head:
    """Reads a head's file.

    Raises:
        InputError: the file is missing, cannot be read, or is larger than any head.
        PatchFormatError: it is no head's file, a tensor does not match its digest, or it holds another tensor, key, type or shape, or
            a number that is not finite.
    """
    data = read_bounded(path, MAX_FILE_BYTES, "judge head", hint="reinstall, or rebuild it: edgepatch/judges/README.md")
    try:
        tensors = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = strict_json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        manifest = strict_json.loads(str(metadata.get(METADATA_KEY, "")).encode())
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise PatchFormatError(f"judge head {path}: not a readable safetensors file of a head ({error})") from None
    if set(metadata) != {METADATA_KEY} or set(tensors) != {"weights", "bias"}:
        raise PatchFormatError(
            f"judge head {path}: unknown or missing keys: {sorted(metadata)}, {sorted(tensors)}; expected weights and bias"
        )
    return _checked(path, manifest, tensors)


def _checked(path: Path, manifest: Any, tensors: dict[str, NDArray[Any]]) -> Head:
    if not isinstance(manifest, dict) or set(manifest) != set(KEYS) or manifest["format_version"] != FORMAT_VERSION:
        raise PatchFormatError(f"judge head {path}: expected version {FORMAT_VERSION} with exactly the keys {KEYS}")
    classes, texts = manifest["classes"], (manifest["name"], manifest["embedding"])
    if not isinstance(classes, list) or not all(isinstance(text, str) for text in (*classes, *texts)):
        raise PatchFormatError(f"judge head {path}: expected names as text, found {classes!r} and {texts!r}")
    if tensor_digests(tensors) != manifest["sha256"]:
        raise PatchFormatError(f"judge head {path}: a tensor does not match the SHA-256 in the manifest")
    return Head(manifest["name"], tuple(classes), manifest["embedding"], **tensors)
