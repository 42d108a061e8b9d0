import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepatch.errors import InputError, PatchFormatError
from edgepatch.seeds.anchoring import LEAST_TURN, Anchoring

ANCHORINGS = st.one_of(
    st.integers(8, 40).map(lambda block: Anchoring(block)),
    st.integers(8, 40).map(lambda block: Anchoring(block, (3,))),
    st.just(Anchoring(0, (3, 7))),
)
TEXTS = st.lists(st.integers(0, 9), min_size=1, max_size=150)


def test_blocks_are_of_equal_length():
    assert Anchoring(8).anchors(range(100, 125)) == [0] * 8 + [8] * 8 + [16] * 8 + [24]


def test_a_turn_begins_a_block():
    tokens = [3, *range(100, 120), 3, *range(100, 120)]
    anchors = Anchoring(16, (3,)).anchors(tokens)
    assert anchors[:16] == [0] * 16 and anchors[16:21] == [16] * 5
    assert anchors[21] == 21 - (21 - 16) and anchors[21] == 16, "five tokens behind an anchor a turn does not move it"
    tokens[26] = 3
    assert Anchoring(16, (3,)).anchors(tokens)[26] == 26


@given(ANCHORINGS, TEXTS, TEXTS)
def test_an_anchor_depends_on_earlier_tokens_alone(anchoring, text, other):
    assert anchoring.anchors(text + other)[: len(text)] == anchoring.anchors(text)


@given(ANCHORINGS, TEXTS, st.integers(0, 150))
def test_spans_from_anywhere_are_the_same_spans(anchoring, text, first):
    anchors = anchoring.anchors(text)
    spans = list(anchoring.spans(text, first))
    assert [span.anchor for span in spans for _ in range(span.start, span.end)] == anchors[first:]
    assert [i for span in spans for i in range(span.start, span.end)] == list(range(min(first, len(text)), len(text)))
    assert all(span.anchor <= span.start < span.end for span in spans)


@given(ANCHORINGS, TEXTS)
def test_no_token_is_far_from_its_anchor_and_no_two_anchors_are_close(anchoring, text):
    anchors = anchoring.anchors(text)
    distances = [i - anchor for i, anchor in enumerate(anchors)]
    assert min(distances) == 0 and (not anchoring.block or max(distances) < anchoring.block)
    assert min(np.diff(sorted(set(anchors))), default=LEAST_TURN) >= min(LEAST_TURN, anchoring.block or LEAST_TURN)


@settings(max_examples=20)
@given(ANCHORINGS)
def test_round_trip(anchoring):
    assert Anchoring.from_dict(anchoring.as_dict()) == anchoring


@pytest.mark.parametrize(
    "block, turn_tokens, expected",
    [
        (0, (), "expected a block length or tokens that open a turn, found neither"),
        (7, (), "expected 8 to 512 tokens, found 7"),
        (-1, (), "found -1"),
        (64, (5, 3), "in ascending order"),
        (64, (3, 3), "different ids"),
        (64, tuple(range(9)), "at most 8"),
    ],
)
def test_what_cannot_be_is_refused(block, turn_tokens, expected):
    with pytest.raises(InputError, match=expected):
        Anchoring(block, turn_tokens)


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {"block": 64},
        {"block": 64, "turn_tokens": [], "more": 1},
        {"block": "64", "turn_tokens": []},
        {"block": True, "turn_tokens": []},
        {"block": 64, "turn_tokens": [1.5]},
        {"block": 64, "turn_tokens": "3"},
        {"block": 4, "turn_tokens": []},
        {"block": 64, "turn_tokens": [-1]},
    ],
)
def test_a_damaged_manifest_is_refused(values):
    with pytest.raises(PatchFormatError):
        Anchoring.from_dict(values)
