"""Judges by name or place: those that ship with edgepatch, or any local Transformers text-classification folder (Detoxify-like)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError, MissingExtraError
from edgepatch.files.pretrained import load_pretrained, load_pretrained_model
from edgepatch.judges.scorers import JUDGES, ToxicityScorer, require_texts
from edgepatch.judges.semantic import SEMANTIC, Purpose, SemanticToxicity

MAX_TOKENS = 512
BATCH_SIZE = 16
UNBOUNDED = 1_000_000
"""Tokenizers that know no limit name a number far above this."""


class Judge(Protocol):
    """What gives texts a score from 0 (safe) to 1 (unsafe)."""

    name: str

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N,) float32 in 0..1; a text without a letter or digit scores 0."""


class TransformersClassifier:
    """A sequence-classification model on the CPU or a GPU.

    Labels of a multi-label model (``problem_type`` "multi_label_classification", or a single label) are independent: the score is the
    highest sigmoid among the unsafe labels. Otherwise labels exclude each other: the score is their summed softmax.

    Args:
        folder: config, safetensors weights and tokenizer; code in it is never run.
        unsafe_labels: names from the model's ``id2label`` that count as unsafe; none needed where there is one label only.
        max_tokens: longer texts are cut at the end; never more than model and tokenizer allow.
        batch_size: texts a forward pass; a tokenizer without a padding token takes them one by one.
        device: "cpu" or "cuda".

    Raises:
        InputError: the folder holds no classification model or no tokenizer, or a label is unknown.
        MissingExtraError: torch or transformers is not installed.
    """

    def __init__(
        self,
        folder: Path,
        unsafe_labels: Sequence[str] = (),
        max_tokens: int = MAX_TOKENS,
        batch_size: int = BATCH_SIZE,
        device: str = "cpu",
    ) -> None:
        if max_tokens < 1 or batch_size < 1:
            raise InputError(
                f"judge: max_tokens and batch_size must be at least 1, found {max_tokens} and {batch_size}"
            )
        self.name, self._device = folder.name, device
        self._model = _load_model(folder).to(device).eval()
        self._tokenizer = _load_tokenizer(folder)
        config = self._model.config
        self._unsafe = _label_ids(folder, dict(config.id2label), unsafe_labels)
        self._is_multi_label = config.problem_type == "multi_label_classification" or config.num_labels == 1
        if not self._is_multi_label and len(set(self._unsafe)) == config.num_labels:
            raise InputError(
                f"judge {folder}: every label counts as unsafe, so every text would", hint="leave out the safe ones"
            )
        limits = (max_tokens, self._tokenizer.model_max_length, _num_positions(config))
        self._max_tokens = min(limit for limit in limits if limit < UNBOUNDED)
        self._batch_size = batch_size if _can_pad(self._tokenizer, config) else 1

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Scores texts.

        Args:
            texts: N strings.

        Returns:
            (N,) float32 in 0..1. A text without a letter or digit scores 0, as with ``ToxicityScorer``.

        Raises:
            InputError: ``texts`` is one string, or holds something that is not a string; or the model gives NaN.
        """
        require_texts(texts)
        scores = np.zeros(len(texts), dtype=np.float32)
        speaking = [i for i, text in enumerate(texts) if any(map(str.isalnum, text))]
        speaking.sort(key=lambda i: len(texts[i]))  # texts of like length share a batch, so that little is padding
        for start in range(0, len(speaking), self._batch_size):
            rows = speaking[start : start + self._batch_size]
            scores[rows] = self._score_batch([texts[i] for i in rows])
        if np.isnan(scores).any():
            raise InputError(f"judge {self.name}: the model gave NaN", hint="check its weights")
        return scores

    def _score_batch(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        settings = {"truncation": True, "max_length": self._max_tokens, "return_tensors": "pt"}
        inputs = self._tokenizer(texts, padding=len(texts) > 1, **settings).to(self._device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        chances = logits.sigmoid() if self._is_multi_label else logits.softmax(dim=-1)
        unsafe = chances[:, self._unsafe]
        joined = unsafe.amax(dim=-1) if self._is_multi_label else unsafe.sum(dim=-1).clamp(max=1)
        scores: NDArray[np.float32] = joined.cpu().numpy()
        return scores


def load_judge(
    name_or_path: str | Path, unsafe_labels: Sequence[str] = (), purpose: Purpose = "report"
) -> ToxicityScorer | SemanticToxicity | TransformersClassifier:
    """A judge by name or place.

    Args:
        name_or_path: "report" or "filter" (shipped, of words), "semantic" (shipped, of meaning: the head of the purpose), a judge file, or
            a Transformers text-classification folder.
        unsafe_labels: of a folder, as in ``TransformersClassifier``.
        purpose: what the scores are for. What filters training data must not report on the result: of the shipped judges, each is for
            one purpose, and loads for no other.

    Raises:
        InputError: there is no such judge, it cannot be used, or it is for the other purpose.
        PatchFormatError: a judge file breaks its format.
        MissingExtraError: a folder, or the embedding model, needs torch and transformers.
    """
    path, is_shipped = Path(name_or_path), name_or_path in (*JUDGES, SEMANTIC)
    if not is_shipped and path.is_dir():
        return TransformersClassifier(path, unsafe_labels)
    if not is_shipped and not path.is_file():
        raise InputError(
            f"no judge {name_or_path}",
            hint=f"{', '.join((*JUDGES, SEMANTIC))}, a judge file, or a text-classification folder",
        )
    if unsafe_labels:
        raise InputError(
            f"judge {name_or_path} has no labels to choose from, found {', '.join(unsafe_labels)}",
            hint="leave them out",
        )
    return SemanticToxicity.load(purpose) if name_or_path == SEMANTIC else _lexical(name_or_path, purpose)


def _lexical(name_or_path: str | Path, purpose: Purpose) -> ToxicityScorer:
    scorer = ToxicityScorer.load(name_or_path)
    if scorer.name != purpose:
        raise InputError(
            f"judge {name_or_path}: the judge of reports must not filter what is trained on"
            if purpose == "filter"
            else f"judge {name_or_path}: the judge that filters what is trained on must not report",
            hint=f"take {purpose}, {SEMANTIC}, or a classifier of yours",
        )
    return scorer


def _load_model(folder: Path) -> Any:
    try:
        import torch
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtraError(error.name or "transformers", "train") from None
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a head that is missing is refused below, in our words
    try:
        model, loading_info = load_pretrained_model(
            AutoModelForSequenceClassification, folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load a classification model from {folder}: {error}") from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise InputError(
            f"{folder} holds no trained classification head: {', '.join(missing[:4])} missing of its weights",
            hint="name a text-classification model, not a language model",
        )
    return model


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
    ):
        raise InputError(f"no tokenizer in {folder}", hint="copy the files of the model's tokenizer beside its weights")
    try:
        return load_pretrained(AutoTokenizer, folder)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the tokenizer in {folder}: {error}") from None


def _label_ids(folder: Path, names: dict[int, str], unsafe_labels: Sequence[str]) -> list[int]:
    """Ids of the unsafe labels; the only one where there is no choice."""
    ids = {name: number for number, name in names.items()}
    unknown = [name for name in unsafe_labels if name not in ids]
    if unknown or (not unsafe_labels and len(ids) > 1):
        reason = f"unknown label {', '.join(unknown)}" if unknown else "which labels are unsafe was not said"
        raise InputError(f"judge {folder}: {reason}", hint=f"name some of {', '.join(ids)}")
    return [ids[name] for name in unsafe_labels] or list(names)


def _num_positions(config: Any) -> int:
    """The most tokens of a text; RoBERTa's kind counts positions from behind its padding id."""
    positions = int(getattr(config, "max_position_embeddings", UNBOUNDED) or UNBOUNDED)
    return positions - 2 if "roberta" in config.model_type else positions


def _can_pad(tokenizer: Any, config: Any) -> bool:
    return tokenizer.pad_token_id is not None and config.pad_token_id is not None
