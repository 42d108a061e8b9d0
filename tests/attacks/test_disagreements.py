"""Our parsers and the libraries that they guard read the same of a file, or one of them refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attacks import disagreements
from edgepatch.converters.gguf.header import read_any_header
from edgepatch.errors import InputError


def test_what_is_taken_is_read_as_the_library_reads_it():
    """The whole number of files is in `edgepatch bench security --only F18`."""
    for tally in disagreements.tallies(300):
        assert tally.inputs == 300 and tally.taken and not tally.disagreements, tally


def test_a_reader_that_differs_is_counted():
    tally = disagreements.compare(
        "any", b"abcdef", lambda data: {"size": len(data)}, lambda data: {"size": min(len(data), 6)}, 200
    )
    assert 0 < tally.disagreements < 200 and tally.taken == 200


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (b"general.flag", b"general\0flag"),
        (b"token_embd.weight", b"token_embd\0weight"),
        (b"llama", b"llam\0"),
        (b"\x02\0\0\0\0\0\0\0\xc3\xbc", b"\x02\0\0\0\0\0\0\0x\0"),
    ],
    ids=["key", "tensor", "value", "token"],
)
def test_text_that_ggml_would_cut_off_is_refused(tmp_path: Path, text: bytes, changed: bytes):
    """ggml reads a name as far as a NUL: "tokenizer.chat_template\\0" would be a template for the library, and none for us."""
    data = disagreements.gguf_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(data.replace(text, changed, 1))
    with pytest.raises(InputError, match="a NUL in"):
        read_any_header(path)
