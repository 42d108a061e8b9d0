"""Requests that ask for the same thing in other words: what is trained on must not be measured, and nothing is measured twice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

NEAR = 0.5
"""Cosine from which two requests count as the same; between 0.45 and 0.55 real and chance likenesses mix in the public sets."""

FRAME = frozenset(
    re.findall(
        r"\w+",
        """a an the and or of to in on for with without that this those these it its is are be was were as by at from into about
        how what who which you i me my your their they them he his him her not can could would should please want do does did will
        if so than such using use any some all more most other others people person someone step steps write create develop make
        give provide describe explain teach show tell list instruct outline draft generate suggest share compose produce design
        guide tutorial article script detail detailed tips way method plan strategy specific instruction post blog""",
    )
)
"""Words of asking, which all requests share, whatever they ask for."""

ENDINGS = ("ing", "ed", "es", "s", "e")
SHORTEST_STEM = 4


def _stem(word: str) -> str:
    ending = next((e for e in ENDINGS if word.endswith(e) and len(word) - len(e) >= SHORTEST_STEM), "")
    return word.removesuffix(ending)


FRAME_STEMS = frozenset(map(_stem, FRAME))


def content_words(text: str) -> list[str]:
    """Stems of the words that say what is asked for; of all words where there are no others."""
    stems = [_stem(word) for word in re.findall(r"[^\W\d_]+", text.lower().replace("'s", "").replace("’s", ""))]
    return [s for s in stems if s not in FRAME_STEMS] or stems


def tf_idf(texts: Sequence[str]) -> NDArray[np.float64]:
    """(N, W) float64 rows of length 1 over the W content words of all texts; a text without words gives zeros."""
    rows = [content_words(text) for text in texts]
    columns = {word: i for i, word in enumerate(sorted({word for row in rows for word in row}))}
    counts = np.zeros((len(texts), len(columns)))
    for i, row in enumerate(rows):
        np.add.at(counts[i], [columns[word] for word in row], 1)
    weighted = counts * (np.log((1 + len(texts)) / (1 + (counts > 0).sum(axis=0))) + 1)
    lengths = np.linalg.norm(weighted, axis=1, keepdims=True)
    rows_of_length_one: NDArray[np.float64] = np.divide(weighted, lengths, out=weighted, where=lengths > 0)
    return rows_of_length_one


def distinct_from(taken: Iterable[str], candidates: Sequence[str], threshold: float = NEAR) -> list[str]:
    """The candidates, in their order, that are like no text of ``taken`` and like no candidate kept before them.

    Args:
        taken: for example what is trained on.
        candidates: requests.
        threshold: TF-IDF cosine of content words, with frequencies over all texts together, from which two are alike.
    """
    taken = list(taken)
    vectors = tf_idf([*taken, *candidates])
    kept = list(range(len(taken)))
    for i in range(len(taken), len(vectors)):
        if not kept or (vectors[kept] @ vectors[i]).max() < threshold:
            kept.append(i)
    return [candidates[i - len(taken)] for i in kept[len(taken) :]]
