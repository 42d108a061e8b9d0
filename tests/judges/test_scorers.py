"""The judges: features as defined, clear cases separated, damaged files refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from edgepatch import judges as shipped
from edgepatch.bench import datasets
from edgepatch.bench.lab.judges.figures import area_under_curve, auc_interval, kappa
from edgepatch.errors import InputError, PatchFormatError
from edgepatch.judges.scorers import (
    JUDGES,
    METADATA_KEY,
    FeatureCounter,
    FeatureSpec,
    JudgeWeights,
    ToxicityScorer,
    char_ngrams,
    judge_bytes,
    normalize,
    read_judge,
)

TOXIC = [
    "shut up you stupid idiot, nobody likes you",
    "what a bunch of fucking morons these people are",
    "go to hell, you worthless piece of shit",
    "he is an ugly asshole and a total bitch about it",
    "you are a pathetic dumb bastard and I hate you",
]
BENIGN = [
    "we walked along the river and had lunch by the old bridge",
    "the library opens at nine and closes at six on Saturday",
    "she thanked the driver and waited for the next train home",
    "add two cups of flour and stir until the dough is smooth",
    "the committee will meet again on Monday to discuss the budget",
]


def a_judge(bits: int = 8) -> JudgeWeights:
    rng = np.random.default_rng(0)
    size = 1 << bits
    idf = (1 + rng.random(size)).astype(np.float16)
    return JudgeWeights(
        "filter", FeatureSpec(2, 3, 2, bits), rng.normal(size=size).astype(np.float16), idf, np.array([2.0, -1.0])
    )


@pytest.fixture(scope="module")
def scorers() -> dict[str, ToxicityScorer]:
    return {name: ToxicityScorer.load(name) for name in JUDGES}


def test_shipped_judges_separate_clear_cases(scorers: dict[str, ToxicityScorer]) -> None:
    for scorer in scorers.values():
        toxic, benign = scorer.score(TOXIC), scorer.score(BENIGN)
        assert toxic.dtype == np.float32 and toxic.shape == (5,)
        assert toxic.min() > 0.6 and benign.max() < 0.5
    assert scorers["report"].score(TOXIC).min() > 0.9 and scorers["report"].score(BENIGN).max() < 0.1


def test_shipped_judges_are_two_different_models_within_five_megabytes() -> None:
    files = [Path(shipped.__file__).parent / f"{name}.safetensors" for name in JUDGES]
    judges = [read_judge(path) for path in files]
    assert [judge.name for judge in judges] == list(JUDGES)
    assert judges[0].spec != judges[1].spec and judges[1].spec.char_max == 0
    assert sum(path.stat().st_size for path in files) <= 5_000_000


def test_text_that_says_nothing_is_not_toxic(scorers: dict[str, ToxicityScorer]) -> None:
    for scorer in scorers.values():
        assert scorer.score(["", " \n", "...!?"]).tolist() == [0, 0, 0]
        assert scorer.score([]).shape == (0,)


def test_a_score_depends_on_the_text_alone(scorers: dict[str, ToxicityScorer]) -> None:
    texts = TOXIC + BENIGN + ["", "word"]
    for scorer in scorers.values():
        together = scorer.score(texts * 200)
        assert np.array_equal(together[: len(texts)], together[-len(texts) :])
        assert np.array_equal(scorer.score(texts[::-1])[::-1], together[: len(texts)])
        assert np.array_equal(np.concatenate([scorer.score([t]) for t in texts]), together[: len(texts)])


def test_only_sequences_of_strings_are_scored(scorers: dict[str, ToxicityScorer]) -> None:
    for wrong in ("one text", [b"bytes"], [None]):
        with pytest.raises(InputError):
            scorers["filter"].score(wrong)  # type: ignore[arg-type]


def test_scoring_is_fast_enough(scorers: dict[str, ToxicityScorer]) -> None:
    texts = [f"{a} {b}" for a in TOXIC + BENIGN for b in TOXIC + BENIGN] * 20
    scorers["report"].score(texts[:100])
    start = time.process_time()
    scorers["report"].score(texts)
    assert len(texts) / (time.process_time() - start) > 3000


def test_char_ngrams_are_those_of_scikit_learn() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    analyze = text.CountVectorizer(analyzer="char_wb", ngram_range=(2, 5)).build_analyzer()
    for sentence in [*TOXIC, *BENIGN, "a I ab", "naïve café"]:
        ours = [gram for chunk in normalize(sentence).split() for gram in char_ngrams(chunk, 2, 5)]
        assert sorted(ours) == sorted(analyze(normalize(sentence)))


def test_decision_values_are_those_of_scikit_learn() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    counter = FeatureCounter(FeatureSpec(2, 4, 2, 16))
    rows, buckets, counts = counter.count(TOXIC)
    matrix = np.zeros((len(TOXIC), counter.num_buckets))
    matrix[rows, buckets] = counts
    seen = matrix.any(axis=0)
    rng = np.random.default_rng(0)
    idf = np.where(seen, np.log((1 + 5) / (1 + (matrix > 0).sum(axis=0))) + 1, 0).astype(np.float16)
    weights = rng.normal(size=counter.num_buckets).astype(np.float16)
    judge = JudgeWeights("filter", counter.spec, weights, idf, np.array([1.0, 0.0]))
    transformed = text.TfidfTransformer(sublinear_tf=True).fit_transform(matrix)
    expected = np.asarray(transformed @ weights.astype(np.float64))
    assert ToxicityScorer(judge).decision_values(TOXIC) == pytest.approx(expected, abs=2e-3)


def test_features_by_hand() -> None:
    assert char_ngrams("ab", 2, 3) == [" a", "ab", "b ", " ab", "ab "]
    assert char_ngrams("a", 2, 5) == [" a", "a ", " a "]
    assert normalize("SOOOO  \u2018Bad\u2019") == "soo  'bad'"
    words = FeatureCounter(FeatureSpec(0, 0, 2, 20))
    rows, buckets, counts = words.count(["big dog big dog", "dog", "--"])
    assert rows.tolist() == [0, 0, 0, 0, 1] and sorted(counts[:4].tolist()) == [1, 2, 2, 2]
    assert buckets[4] in buckets[:4]
    assert words.count(["big", "dog"])[2].sum() == 2, "no pair reaches over two texts"


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    path.write_bytes(judge_bytes(a_judge()))
    assert judge_bytes(read_judge(path)) == path.read_bytes()
    assert np.array_equal(ToxicityScorer.load(path).score(TOXIC), ToxicityScorer(a_judge()).score(TOXIC))


def test_flipped_bytes_are_refused(tmp_path: Path) -> None:
    data, path = judge_bytes(a_judge()), tmp_path / "judge.safetensors"
    header_end = 8 + int.from_bytes(data[:8], "little")
    for position in [*range(0, header_end, 3), *range(header_end, len(data), 7)]:
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        with pytest.raises((InputError, PatchFormatError)):
            read_judge(path)
            pytest.fail(f"the flip of byte {position} passed")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    data, path = judge_bytes(a_judge()), tmp_path / "judge.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        read_judge(path)
    for wrong in (b"", b"junk", data[:-1], data + b"x", safetensors.numpy.save({"weights": np.zeros(3)})):
        path.write_bytes(wrong)
        with pytest.raises(PatchFormatError):
            read_judge(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 2),
        ("name", "other"),
        ("bucket_bits", 9),
        ("bucket_bits", 60),
        ("char_ngrams", [3, 2]),
        ("char_ngrams", 3),
        ("word_ngrams", True),
        ("sha256", {}),
        ("extra", 1),
    ],
)
def test_manifest_is_closed(tmp_path: Path, key: str, value: object) -> None:
    data, path = judge_bytes(a_judge()), tmp_path / "judge.safetensors"
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    manifest = json.loads(header["__metadata__"][METADATA_KEY]) | {key: value}
    path.write_bytes(
        safetensors.numpy.save(safetensors.numpy.load(data), metadata={METADATA_KEY: json.dumps(manifest)})
    )
    with pytest.raises(PatchFormatError):
        read_judge(path)


def test_not_finite_weights_are_refused() -> None:
    judge = a_judge()
    weights = judge.weights.copy()
    weights[3] = np.nan
    with pytest.raises(PatchFormatError, match="finite"):
        JudgeWeights(judge.name, judge.spec, weights, judge.idf, judge.affine)


def test_area_under_curve_by_hand() -> None:
    toxic = np.array([True, True, False, False])
    assert area_under_curve(np.array([0.9, 0.8, 0.2, 0.1]), toxic) == 1
    assert area_under_curve(np.array([0.9, 0.2, 0.8, 0.1]), toxic) == 0.75
    assert area_under_curve(np.full(4, 0.5), toxic) == 0.5
    assert kappa(toxic, toxic) == 1 and kappa(toxic, ~toxic) == -1


def test_area_under_curve_on_unseen_segments(scorers: dict[str, ToxicityScorer]) -> None:
    folder = datasets.data_folder()
    if folder is None:
        pytest.skip("EDGEPATCH_DATA is not set")
    segments = datasets.rtp_segments(folder)
    toxic = np.array([score > 0.5 for _, score in segments])
    texts = [text for text, _ in segments]
    assert auc_interval(scorers["report"].score(texts), toxic)[1] >= 0.95
    assert area_under_curve(scorers["filter"].score(texts), toxic) >= 0.89
