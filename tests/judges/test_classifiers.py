"""Local text-classification folders as judges, on tiny random models of real architectures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepatch.errors import InputError
from edgepatch.judges import scorers
from edgepatch.judges.classifiers import TransformersClassifier, load_judge
from edgepatch.judges.scorers import ToxicityScorer
from kit.tiny_folders import make_folder

TEXTS = ["some words", "", "?!", "more words and some more words to merge", "words"]
DETOXIFY = ["toxicity", "insult", "threat"]


def make_classifier(folder: Path, labels: list[str], architecture: str = "bert", **changes: object) -> Path:
    """A random classification model beside the lab's kind of tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from edgepatch.bench.lab.tokenizer import train_tokenizer

    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.5,
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    torch.manual_seed(3)
    config = AutoConfig.for_model(architecture, **(settings | changes))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    train_tokenizer(["some words to merge, some more words"] * 3, context_length=128, vocab_size=300).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def detoxify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "detoxify"
    return make_classifier(folder, DETOXIFY, problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def two_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("judges") / "two-way", ["safe", "unsafe"])


def chances(folder: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(sigmoid, softmax) over labels by Transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0]
    return logits.sigmoid().numpy(), logits.softmax(-1).numpy()


def test_independent_labels_give_the_highest_sigmoid(detoxify: Path) -> None:
    score = TransformersClassifier(detoxify, ["toxicity", "threat"], batch_size=2).score(TEXTS)
    assert score.dtype == np.float32
    assert score[1] == score[2] == 0
    for i in (0, 3, 4):
        assert score[i] == pytest.approx(chances(detoxify, TEXTS[i])[0][[0, 2]].max(), abs=1e-5)
    assert len(set(score[[0, 3, 4]].tolist())) == 3


def test_labels_that_exclude_each_other_give_the_softmax(two_way: Path) -> None:
    unsafe, safe = (TransformersClassifier(two_way, [label]).score(TEXTS) for label in ("unsafe", "safe"))
    np.testing.assert_allclose((unsafe + safe)[[0, 3, 4]], 1, atol=1e-6)
    assert unsafe[0] == pytest.approx(chances(two_way, TEXTS[0])[1][1], abs=1e-5)


def test_one_label_needs_no_name(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "single", ["toxic"])
    assert TransformersClassifier(folder).score(TEXTS)[0] == pytest.approx(chances(folder, TEXTS[0])[0][0], abs=1e-5)


def test_a_text_longer_than_the_model_is_cut(two_way: Path) -> None:
    judge = TransformersClassifier(two_way, ["unsafe"])
    long = "some more words " * 100
    assert judge.score([long]) == judge.score([long + "quite other ending"])
    short = TransformersClassifier(two_way, ["unsafe"], max_tokens=3)
    assert short.score(["some words to merge"]) == short.score(["some words to put together"])
    assert judge.score(["some words to merge"]) != judge.score(["some words to put together"])


def test_a_judge_without_padding_takes_texts_one_by_one(tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "llama", ["safe", "unsafe"], "llama", num_key_value_heads=2, pad_token_id=None)
    together = TransformersClassifier(folder, ["unsafe"]).score(TEXTS)
    assert together[3] == pytest.approx(chances(folder, TEXTS[3])[1][1], abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "message", "hint"),
    [
        (["hate"], "unknown label hate", "safe, unsafe"),
        ([], "not said", "safe, unsafe"),
        (["safe", "unsafe"], "every label", "leave out"),
    ],
)
def test_labels_are_checked(two_way: Path, labels: list[str], message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        TransformersClassifier(two_way, labels)
    assert hint in caught.value.hint


def test_a_language_model_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no trained classification head.*score"):
        TransformersClassifier(make_folder(tmp_path / "causal", "llama"), ["LABEL_1"])


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load a classification model"):
        TransformersClassifier(tmp_path)
    folder = make_classifier(tmp_path / "bare", ["toxic"])
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        TransformersClassifier(folder)


def test_bad_arguments(two_way: Path) -> None:
    with pytest.raises(InputError, match="sequence of strings"):
        TransformersClassifier(two_way, ["unsafe"]).score("one text")
    with pytest.raises(InputError, match="at least 1"):
        TransformersClassifier(two_way, ["unsafe"], max_tokens=0)


def test_judges_load_by_name_file_or_folder(two_way: Path) -> None:
    report = load_judge("report")
    file = Path(scorers.__file__).parent / "report.safetensors"
    assert (
        report.score(["you idiot"])
        == load_judge(file).score(["you idiot"])
        == ToxicityScorer.load("report").score(["you idiot"])
    )
    assert load_judge(two_way, ["unsafe"]).name == "two-way"
    with pytest.raises(InputError, match="no judge nobody"):
        load_judge("nobody")
    with pytest.raises(InputError, match="no labels to choose from"):
        load_judge("report", ["unsafe"])


def test_a_judge_serves_one_purpose() -> None:
    """Whatever its file is called."""
    folder = Path(scorers.__file__).parent
    assert load_judge("filter", purpose="filter").name == load_judge(folder / "filter.safetensors", (), "filter").name
    for judge in ("report", folder / "report.safetensors"):
        with pytest.raises(InputError, match="must not filter") as caught:
            load_judge(judge, purpose="filter")
        assert "take filter, semantic" in caught.value.hint
    with pytest.raises(InputError, match="must not report"):
        load_judge("filter")
