"""Quick ways say what the slow ones say: strings and tokens at once."""

from __future__ import annotations

import random
import struct

import pytest

from edgepatch.converters.gguf import library, vocabulary
from edgepatch.converters.gguf.header import parse_header


def file_of(strings: list[bytes]) -> bytes:
    """A header with nothing but its architecture and a list of strings."""
    name, key = b"general.architecture", b"tokenizer.ggml.tokens"
    fields = [b"GGUF", struct.pack("<IQQ", 3, 0, 2), struct.pack("<Q", len(name)), name, struct.pack("<IQ", 8, 1), b"x"]
    fields += [struct.pack("<Q", len(key)), key, struct.pack("<IIQ", 9, 8, len(strings))]
    return b"".join([*fields, *(struct.pack("<Q", len(one)) + one for one in strings), b" " * 32])


def test_strings_are_what_each_of_them_is_by_itself(tmp_path):
    """One that is cut within a character, or has a NUL, spoils no other and is not saved by its neighbour."""
    rng = random.Random(3)
    parts = [b"", b"a", "é".encode(), "中🙂".encode(), b" " * 300, b"\xc3", b"\xa9", b"\0", b"\xed\xa0\x80"]
    for _ in range(2000):
        strings = [
            b"".join(rng.choices(parts, [9, 9, 9, 9, 1, 1, 1, 1, 1], k=rng.randint(0, 3)))
            for _ in range(rng.randint(0, 4))
        ]
        try:
            expected = [one.decode("utf-8") for one in strings]
        except UnicodeDecodeError:
            expected = None
        if expected is None or any("\0" in one for one in expected):
            with pytest.raises(ValueError):
                parse_header(tmp_path, file_of(strings))
        else:
            assert parse_header(tmp_path, file_of(strings)).metadata["tokenizer.ggml.tokens"] == expected


def test_tokens_are_asked_at_once_and_answer_as_one_by_one(tiny_ggufs):
    lib = library.load_library()
    with vocabulary.Vocabulary(tiny_ggufs["F32"]) as read:
        facts = vocabulary.read_token_facts(lib, read._vocab)
        kinds = read.attributes()
        special = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        assert facts.size == read.size and facts.end_token_ids == frozenset(read.end_token_ids())
        assert facts.special == tuple(read.text(i) for i, kind in enumerate(kinds) if kind & special) != ()
        assert facts.special_ids == {read.text(i): i for i, kind in enumerate(kinds) if kind & special}
        assert facts.ends == tuple(map(read.text, read.end_token_ids()))
