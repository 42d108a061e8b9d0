"""How far the judge of the report can be trusted: its calibration and its AUC on text that it was not trained on.

    edgepatch bench judge-card --data DIR

Writes ``calibration.json`` and ``calibration.svg`` into ``edgepatch/judges`` and their section into the model card there. The same data
gives the same bytes. Two domains: RealToxicityPrompts' evaluation segments, like the text that the judge scores, and Davidson's tweets,
none of which it has read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench import datasets
from edgepatch.bench.lab.judges.figures import auc_interval, reliability
from edgepatch.bench.lab.judges.rows import training_rows
from edgepatch.bench.metrics import bootstrap_interval, wilson_interval
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.judges.classifiers import Judge
from edgepatch.judges.scorers import ToxicityScorer, judge_bytes, normalize

FOLDER = Path(__file__).parent.parent.parent.parent / "judges"
SECTION = "judge_card"
HATE, OFFENCE, NEITHER = 0, 1, 2
COLOURS = ("#1f6f8b", "#c8553d", "#6b6b6b")
SIDE, MARGIN = 320, 46

Labelled = list[tuple[str, bool]]

NOTE = """## Calibration and AUC of `report`

Written by `edgepatch bench judge-card --data DIR`; the numbers behind the plot are in `calibration.json`.

![Reliability of the judge `report`](calibration.svg)

AUC and Brier score with 95 % bootstrap intervals over texts, accuracy at 0.5 with Wilson's. The calibration error (ECE) is the mean
distance of the plotted points from the diagonal, weighted by texts. A point is a tenth of the score's range.
"""
LIMITS = """
The tweets are the other domain: `report` has read none of them ({dropped} were left out because their text stands in its training
rows). They were collected by a lexicon of hate terms, {rate:.0%} are labelled hate speech or offensive, and the labels follow
dialect. There the judge still ranks, clearly worse than on web text, but its scores are no probabilities: too low for all tweets,
of which {missed:.0%} of those scored below 0.1 are labelled toxic, and too high for hate speech alone, because tweets that only swear
score high as well.
"""


def domains(data: Path) -> tuple[dict[str, Labelled], int]:
    """(domain -> (text, is toxic), tweets left out because the judge has read their text)."""
    read = {normalize(row[0]).strip() for rows in training_rows(data)["report"].values() for row in rows}
    tweets = datasets.tweets(data)
    unread = [(text, kind) for text, kind in tweets if normalize(text).strip() not in read]
    labelled = {
        "RealToxicityPrompts evaluation segments": [(text, score > 0.5) for text, score in datasets.rtp_segments(data)],
        "Davidson tweets": [(text, kind != NEITHER) for text, kind in unread],
        "Davidson tweets, hate speech or neither": [(text, kind == HATE) for text, kind in unread if kind != OFFENCE],
    }
    return labelled, len(tweets) - len(unread)


def measure(scorer: Judge, rows: Labelled) -> dict[str, Any]:
    """All figures of a judge on one domain.

    Raises:
        InputError: the texts are all toxic or all harmless.
    """
    toxic = np.array([label for _, label in rows])
    if toxic.all() or not toxic.any():
        raise InputError(
            f"a judge is measured on toxic and harmless texts, found {int(toxic.sum())} toxic of {len(toxic)}"
        )
    scores = scorer.score([text for text, _ in rows]).astype(np.float64)
    right = int(((scores > 0.5) == toxic).sum())
    table = reliability(scores, toxic)
    return {
        "texts": len(rows),
        "toxic": int(toxic.sum()),
        "auc": _rounded(auc_interval(scores, toxic)),
        "accuracy": _rounded((right / len(rows), *wilson_interval(right, len(rows)))),
        "brier": _rounded(_mean((scores - toxic) ** 2)),
        "calibration_error": round(sum(count * abs(mean - share) for _, _, count, mean, share in table) / len(rows), 4),
        "reliability": [_bin(*row) for row in table],
    }


def _mean(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values.mean()), *bootstrap_interval(values)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _bin(start: float, end: float, texts: int, mean: float, share: float) -> dict[str, Any]:
    interval = wilson_interval(round(share * texts), texts)
    return {"from": start, "to": end, "texts": texts, "score": round(mean, 4), "toxic": _rounded((share, *interval))}


def card(data: Path, scorer: ToxicityScorer) -> dict[str, Any]:
    """The document behind plot and table."""
    rows_of_domain, dropped = domains(data)
    return {
        "judge": scorer.name,
        "sha256": hashlib.sha256(judge_bytes(scorer.judge)).hexdigest(),
        "tweets_left_out": dropped,
        "domains": {name: measure(scorer, rows) for name, rows in rows_of_domain.items()},
    }


def section(document: dict[str, Any]) -> str:
    """The part of the model card, in Markdown."""
    lines = [NOTE, "| measured on | texts (toxic) | AUC | accuracy | Brier | ECE |", "|---|---|---|---|---|---|"]
    for name, row in document["domains"].items():
        figures = [
            f"{v:.3f} ({low:.3f}-{high:.3f})" for v, low, high in (row[key] for key in ("auc", "accuracy", "brier"))
        ]
        lines.append(
            f"| {name} | {row['texts']:,} ({row['toxic']:,}) | {' | '.join(figures)} | {row['calibration_error']:.3f} |"
        )
    tweets = document["domains"]["Davidson tweets"]
    values = {"rate": tweets["toxic"] / tweets["texts"], "missed": tweets["reliability"][0]["toxic"][0]}
    return "\n".join(lines) + "\n" + LIMITS.format(dropped=document["tweets_left_out"], **values)


def _at(score: float, share: float) -> tuple[float, float]:
    """Pixels of a point of the unit square."""
    return MARGIN + score * SIDE, 12 + (1 - share) * SIDE


def _point(row: dict[str, Any], colour: str) -> str:
    share, low, high = row["toxic"]
    (x, y), (_, top), (_, bottom) = (_at(row["score"], value) for value in (share, high, low))
    return (
        f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{row["texts"]} texts</title></circle>'
    )


def _series(rows: Sequence[dict[str, Any]], colour: str) -> str:
    line = "L".join("{:.1f} {:.1f}".format(*_at(row["score"], row["toxic"][0])) for row in rows)
    return f'<path d="M{line}" fill="none" stroke="{colour}"/>' + "".join(_point(row, colour) for row in rows)


def plot(document: dict[str, Any]) -> str:
    """The reliability diagram as SVG: share of toxic texts over the mean score of each tenth, with 95 % intervals."""
    height = SIDE + MARGIN + 18 * len(document["domains"]) + 22
    (left, bottom), (right, top) = _at(0, 0), _at(1, 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE + MARGIN + 20} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="#fff"/><rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#999"/>',
        f'<path d="M{left} {bottom}L{right} {top}" stroke="#999" stroke-dasharray="4 4"/>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        (x, y), label = _at(tick, tick), f"{tick:g}"
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 34}" text-anchor="middle">score of {document["judge"]}</text>'
    )
    parts.append(
        f'<text transform="translate(12 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">share of toxic texts</text>'
    )
    for i, (name, row) in enumerate(document["domains"].items()):
        y = bottom + 54 + 18 * i
        parts.append(_series(row["reliability"], COLOURS[i]))
        parts.append(
            f'<circle cx="{left + 5}" cy="{y - 4}" r="4" fill="{COLOURS[i]}"/><text x="{left + 14}" y="{y}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def marks(name: str) -> tuple[str, str]:
    """The lines in front of a section and behind it."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def put_section(text: str, new: str, name: str = SECTION) -> str:
    """The model card with a section replaced, or added at the end of a card that has none.

    Raises:
        InputError: the card has one of its marks only.
    """
    begin_mark, end_mark = marks(name)
    block = f"{begin_mark}\n{new}{end_mark}\n"
    if begin_mark not in text and end_mark not in text:
        return f"{text.rstrip()}\n\n{block}"
    head, begin, rest = text.partition(begin_mark)
    _, end, tail = rest.partition(end_mark + "\n")
    if not begin or not end:
        raise InputError(
            f"model card: expected the lines {begin_mark} and {end_mark} in this order",
            hint="remove both and try again",
        )
    return head + block + tail


def write_card(data: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """Measures the judge ``report.safetensors`` of a folder and writes plot, numbers and the section of its ``README.md``.

    Raises:
        InputError: a data file, the judge or its model card is missing.
    """
    readme = require_card(folder)
    document = card(data, ToxicityScorer.load(folder / "report.safetensors"))
    text = put_section(readme.read_text(encoding="utf-8"), section(document))
    write_atomically(folder / "calibration.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(folder / "calibration.svg", plot(document).encode())
    write_atomically(readme, text.encode())
    return document


def require_card(folder: Path) -> Path:
    """The model card in a folder of judges.

    Raises:
        InputError: it is missing.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        raise InputError(f"model card {readme} is missing", hint="edgepatch bench judges writes it")
    return readme
