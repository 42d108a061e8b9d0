"""What the two toxicity judges are trained on; they share no training row."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench import datasets
from edgepatch.judges.scorers import FeatureSpec, normalize

SPECS = {
    "report": FeatureSpec(char_min=2, char_max=5, word_max=2, bucket_bits=19),
    "filter": FeatureSpec(char_min=0, char_max=0, word_max=2, bucket_bits=18),
}
REPORT_TWENTIETHS = {"RealToxicityPrompts": 15, "ParaDetox": 10}  # of the records, for the judge of the report
# ParaDetox and the tweets have other formatting and a harder line than Perspective: at full weight they pull the AUC on
# RealToxicityPrompts segments down by 0.02, at a low weight they only add vocabulary.
SOURCE_WEIGHTS = {"RealToxicityPrompts": 1.0, "ParaDetox": 0.05, "Davidson tweets": 0.05}


@dataclass(frozen=True)
class Rows:
    """Labelled texts.

    Attributes:
        texts: N strings.
        target: (N,) float64, probability of "toxic"; hard labels are 0 or 1.
        weight: (N,) float64, weight in the loss.
        group: (N,) int64, rows of one record share a group and so a fold.
        calibrates: (N,) bool, rows that the calibration is fitted on.
    """

    texts: list[str]
    target: NDArray[np.float64]
    weight: NDArray[np.float64]
    group: NDArray[np.int64]
    calibrates: NDArray[np.bool_]


def _hash(text: str) -> int:
    return zlib.crc32(text.encode(), 77)


def rtp_rows(folder: Path) -> list[tuple[str, float, int]]:
    """(segment, Perspective score, hash of its record) of the records that may be trained on.

    Segments whose text also stands in an evaluation file are left out.
    """
    measured = {normalize(text).strip() for text, _ in datasets.rtp_segments(folder)}
    rows = []
    for record in datasets.rtp_training_records(folder):
        group = _hash(f"{record['filename']}:{record['begin']}")
        for part in (record["prompt"], record["continuation"]):
            if part.get("toxicity") is not None and normalize(part["text"]).strip() not in measured:
                rows.append((part["text"], float(part["toxicity"]), group))
    return rows


def paradetox_rows(folder: Path) -> list[tuple[str, float, int]]:
    """(sentence, 0 or 1, hash of the toxic sentence)."""
    rows = []
    for toxic, neutral in datasets.paradetox(folder):
        group = _hash(normalize(toxic))
        rows += [(toxic, 1.0, group), *((text, 0.0, group) for text in neutral)]
    return rows


def tweet_rows(folder: Path) -> list[tuple[str, float, int]]:
    """(tweet, 1 for hate or offence, hash)."""
    return [(text, float(kind != 2), _hash(normalize(text))) for text, kind in datasets.tweets(folder)]


def is_held_out(row: tuple[str, float, int]) -> bool:
    """Whether a ParaDetox or tweet row belongs to the tenth of the groups that neither judge reads."""
    return row[2] // 1000 % 10 == 0


def training_rows(folder: Path) -> dict[str, dict[str, list[tuple[str, float, int]]]]:
    """Judge -> source -> rows; no text of one judge stands in the rows of the other or in a held-out row."""
    held_out = [row for row in [*paradetox_rows(folder), *tweet_rows(folder)] if is_held_out(row)]
    taken = {normalize(text).strip() for text, _, _ in held_out}
    judges = {}
    for judge in SPECS:
        rows = _assigned_rows(folder, judge)
        judges[judge] = {n: [r for r in source if normalize(r[0]).strip() not in taken] for n, source in rows.items()}
        taken |= {normalize(r[0]).strip() for source in judges[judge].values() for r in source}
    return judges


def _assigned_rows(folder: Path, judge: str) -> dict[str, list[tuple[str, float, int]]]:

    rows = {"RealToxicityPrompts": rtp_rows(folder), "ParaDetox": paradetox_rows(folder)}
    mine = {
        name: [r for r in source if (r[2] % 20 < REPORT_TWENTIETHS[name]) == (judge == "report")]
        for name, source in rows.items()
    }
    mine["ParaDetox"] = [r for r in mine["ParaDetox"] if not is_held_out(r)]
    if judge == "filter":
        mine["Davidson tweets"] = [r for r in tweet_rows(folder) if not is_held_out(r)]
    return mine


def as_rows(sources: dict[str, list[tuple[str, float, int]]]) -> Rows:
    """All sources as arrays; RealToxicityPrompts calibrates, because its scores are what is estimated."""
    flat = [row for rows in sources.values() for row in rows]
    calibrates = [name == "RealToxicityPrompts" for name, rows in sources.items() for _ in rows]
    return Rows(
        [text for text, _, _ in flat],
        np.array([target for _, target, _ in flat]),
        np.array([SOURCE_WEIGHTS[name] for name, rows in sources.items() for _ in rows]),
        np.array([group for _, _, group in flat]),
        np.array(calibrates),
    )
