"""The bounded reader, and the strict reader of JSON that others wrote."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepatch.errors import InputError, PatchFormatError, UntrustedError
from edgepatch.files.reading import read_bounded
from edgepatch.files.strict_json import MAX_DEPTH, loads, read_json


def test_read_bounded(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5, "file") == b"12345"
    with pytest.raises(InputError, match="at most 4 bytes, found 5"):
        read_bounded(file, 4, "file")


def test_files_that_are_none(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "no regular file"),
        (tmp_path / "none", "No such file"),
        (Path("/dev/zero"), "no regular file"),
    ):
        with pytest.raises(InputError, match=message):
            read_bounded(path, 5, "trust root")


def test_no_descriptor_is_left_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(InputError):
            read_bounded(tmp_path, 5, "file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_endless_data_is_refused_at_once(tmp_path: Path):
    file = tmp_path / "sparse"
    with file.open("wb") as handle:
        handle.truncate(10 * 2**30)
    start = time.perf_counter()
    with pytest.raises(InputError, match="at most 1000 bytes"):
        read_bounded(file, 1000, "trust root")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_private_files_that_others_have_rights_to(tmp_path: Path, mode: int):
    file = tmp_path / "file"
    file.write_bytes(b"secret")
    file.chmod(mode)
    with pytest.raises(UntrustedError, match=f"found {mode:04o}") as caught:
        read_bounded(file, 10, "key", private=True)
    assert caught.value.hint == f"chmod 600 {file}" and caught.value.exit_code == 3
    assert read_bounded(file, 10, "key") == b"secret"
    for own in (0o600, 0o400):
        file.chmod(own)
        assert read_bounded(file, 10, "key", private=True) == b"secret"


@pytest.mark.parametrize("kind", [InputError, PatchFormatError, UntrustedError])
def test_a_large_file_is_refused_as_its_reader_says(tmp_path: Path, kind: type[InputError]):
    (tmp_path / "file").write_bytes(bytes(6))
    with pytest.raises(kind, match="expected at most 5 bytes, found 6") as caught:
        read_bounded(tmp_path / "file", 5, "card", oversize=kind)
    assert type(caught.value) is kind and str(tmp_path / "file") in str(caught.value) and "card" in caught.value.hint


def test_files_of_the_kernel_have_no_size_and_are_read():
    assert read_bounded(Path("/proc/self/stat"), 2**16, "file").startswith(str(os.getpid()).encode())
    with pytest.raises(InputError, match="at most 3 bytes"):
        read_bounded(Path("/proc/self/stat"), 3, "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_what_is_sound_reads_as_json_reads_it(value: object):
    assert loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged, or no JSON: Expecting value: line 1 column 1"),
        (b'{"a":\n [1,}', "line 2 column 5"),
        (b'{"a":1}{', "Extra data: line 1 column 8"),
        (b'{"x":{"name":1,"name":1}}', "a key appears twice: 'name'"),
        (b'{"a":NaN}', "finite numbers, found NaN"),
        (b'{"a":-Infinity}', "finite numbers, found -Infinity"),
        (b'{"a":1e999}', "finite numbers, found 1e999"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"at most {MAX_DEPTH} levels"),
        (b"[" * 10**5, f"at most {MAX_DEPTH} levels"),
        (b'{"a":"\xff"}', "can't decode byte 0xff in position 6"),
        ('{"a":1}'.encode("utf-16"), "can't decode"),
        (b"[1]", "expected a JSON object, found list"),
        (b"{" + b" " * 2**17 + b"}", "expected at most 100000 bytes"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_not_sound_is_refused_with_its_file_and_place(tmp_path: Path, data: bytes, words: str):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "config.json", 100_000)
    assert words in str(caught.value) and str(tmp_path / "config.json") in str(caught.value) and caught.value.hint


def test_what_transformers_and_editors_write(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"limits":[0.0,Infinity],"length":1000000000000000019884624838656}')
    assert read_json(file, infinite=True) == {"limits": [0.0, float("inf")], "length": int(1e30)}
    with pytest.raises(InputError, match="finite"):
        read_json(file)
    with pytest.raises(InputError, match="cannot read config"):
        read_json(tmp_path / "none.json", what="config")
