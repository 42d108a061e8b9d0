"""Canonical JSON: the examples of RFC 8785, what is refused, and that nothing canonical reads as anything else."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepatch.errors import PatchFormatError, UntrustedError
from edgepatch.files.canonical import MAX_DEPTH, MAX_WHOLE, canonical_json, parse_canonical, parse_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_WHOLE, MAX_WHOLE)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ("0000000000000000", "0"),
        ("8000000000000000", "0"),
        ("0000000000000001", "5e-324"),
        ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"),
        ("ffefffffffffffff", "-1.7976931348623157e+308"),
        ("4340000000000000", "9007199254740992"),
        ("c340000000000000", "-9007199254740992"),
        ("4430000000000000", "295147905179352830000"),
        ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"),
        ("44b52d02c7e14af7", "1.0000000000000001e+23"),
        ("444b1ae4d6e2ef4e", "999999999999999700000"),
        ("444b1ae4d6e2ef4f", "999999999999999900000"),
        ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
        ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"),
        ("41b3de4355555554", "333333333.33333325"),
        ("41b3de4355555555", "333333333.3333333"),
        ("41b3de4355555556", "333333333.3333334"),
        ("41b3de4355555557", "333333333.33333343"),
        ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)
def test_numbers_of_rfc_8785_appendix_b(bits, text):
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical_json(value) == text.encode()
    assert parse_json(text.encode(), "x") == value


def test_example_of_rfc_8785():
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": '€$\u000f\u000aA\'B"\\\\"/',
        "literals": [None, True, False],
    }
    assert canonical_json(value).decode() == (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )


def test_keys_are_sorted_by_utf_16_as_in_rfc_8785():
    """A sign beyond U+FFFF begins with a surrogate and so comes before U+FB33."""
    keys = ["€", "\r", "\ufb33", "1", "\U0001f600", "\x80", "ö"]
    assert list(json.loads(canonical_json(dict.fromkeys(keys)))) == [
        "\r",
        "1",
        "\x80",
        "ö",
        "€",
        "\U0001f600",
        "\ufb33",
    ]


@given(JSON)
def test_round_trip(value):
    data = canonical_json(value)
    assert parse_json(data, "x") == value
    assert canonical_json(parse_json(data, "x")) == data
    assert parse_canonical(data, "x") == value
    assert json.loads(data, parse_int=float) == value


def test_tuples_are_lists_and_whole_floats_have_no_point():
    assert canonical_json((1, 2.0, 10.0**20)) == b"[1,2,100000000000000000000]"
    assert parse_json(b"[2.0,100000000000000000000]", "x") == [2, 1e20]


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (2**53, "whole numbers"),
        (-(10**500), "whole numbers"),
        ("\ud800", "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        ({1: 2}, "texts as keys"),
        ({1, 2}, "texts"),
        (b"x", "texts"),
        (nested(MAX_DEPTH + 1), "levels"),
    ],
)
def test_what_json_cannot_say_is_refused(value, match):
    with pytest.raises(PatchFormatError, match=match):
        canonical_json(value)


def test_the_deepest_nesting_is_accepted():
    assert parse_json(canonical_json(nested(MAX_DEPTH)), "x") == nested(MAX_DEPTH)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "no readable JSON"),
        (b"{", "no readable JSON"),
        (b"[1]x", "no readable JSON"),
        (b'"\xff"', "no readable JSON"),
        (b"\xef\xbb\xbf1", "no readable JSON"),
        ("1".encode("utf-16"), "no readable JSON"),
        (b"[" * 10**6, "no readable JSON"),
        (b'{"a":1,"a":1}', "twice"),
        (b"NaN", "finite"),
        (b"-Infinity", "finite"),
        (b"1e999", "finite"),
        (b"9" * 400, "finite"),
        (b"[" * 17 + b"]" * 17, "levels"),
        (b'{"a":' * 17 + b"1" + b"}" * 17, "levels"),
        (b"[" * 900 + b"]" * 900, "levels|no readable"),
    ],
)
def test_what_is_not_read(data, match):
    with pytest.raises(PatchFormatError, match=match):
        parse_json(data, "it")


# --- documents that must be in canonical form


@pytest.mark.parametrize(
    ("data", "actual"),
    [
        (b'{"a":1,"a":1}', "a key appears twice"),
        (b'{"a": 1}', "another form at byte 5"),
        (b'{"b":1,"a":1}', "another form at byte 2"),
        (b'{"a":1}\n', "another form at byte 7"),
        (b' {"a":1}', "another form at byte 0"),
        (b'"\\u0041"', "another form at byte 1"),
        (b'"\\/"', "another form at byte 1"),
        (b"1.0e0", "another form at byte 1"),
        (b"1.0", "another form at byte 1"),
        (b"1e-07", "another form at byte 3"),
        (b"9007199254740993", "another form at byte 15"),
        (b"[1,]", "line 1 column"),
        (b"", "line 1 column"),
        (b"NaN", "finite"),
        (b"-Infinity", "finite"),
        (b"1e999", "finite"),
        (b'"\\ud800"', "surrogate"),
        (b"\xff", "can't decode"),
        (b"\xef\xbb\xbf1", "BOM"),
        (b"[" * 100_000, "levels of nesting"),
        (b"1" * 5000, "finite"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_canonical_is_refused(data, actual):
    with pytest.raises(UntrustedError, match=f"the file: expected canonical JSON.*found.*{actual}"):
        parse_canonical(data, "the file")


# --- the rule that trust roots and the store went by before format 2 of the store's state


def by_the_old_rule(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


ASCII_KEYS = st.text(st.characters(max_codepoint=0x7F))
SIGNED = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_WHOLE, MAX_WHOLE) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ASCII_KEYS, inner, max_size=4),
    max_leaves=12,
)
"""Of what trust roots, trust states and the history are made: texts, whole numbers, and keys in ASCII."""


@given(SIGNED)
def test_both_rules_agree_on_what_trust_roots_and_the_history_are_made_of(value):
    assert canonical_json(value) == by_the_old_rule(value)


@given(JSON)
def test_the_rules_differ_in_numbers_with_a_point_and_in_the_order_of_keys_alone(value):
    """What is read back is the same value, so nothing is lost on the way from one to the other."""
    assert parse_json(by_the_old_rule(value), "x") == parse_json(canonical_json(value), "x")


@pytest.mark.parametrize(
    ("value", "old", "new"),
    [
        (10000.0, b"10000.0", b"10000"),
        (1e16, b"1e+16", b"10000000000000000"),
        (1e-7, b"1e-07", b"1e-7"),
        (-0.0, b"-0.0", b"0"),
        (
            {"\ufb33": 1, "\U0001f642": 2},
            '{"\ufb33":1,"\U0001f642":2}'.encode(),
            '{"\U0001f642":2,"\ufb33":1}'.encode(),
        ),
    ],
)
def test_where_the_rules_differ(value, old, new):
    assert (by_the_old_rule(value), canonical_json(value)) == (old, new)
