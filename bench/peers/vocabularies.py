"""The peer's vocabularies with expected ids: what its own tokenizer gives here, and ours, built from the same file."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from edgepatch.bench.peers.rows import Row
from edgepatch.converters.gguf import vocabularies
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import EdgepatchError, InputError, UnfitModelError
from edgepatch.text.tokenizers import FolderTokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"
OTHER_KINDS = {"bert": "WordPiece, of models that embed texts; no causal language model has it"}


def rows(root: Path) -> Iterator[Row]:
    """Two rows a vocabulary: llama.cpp's tokenizer behind our guards, and the folder that training reads.

    Args:
        root: of llama.cpp's sources.
    """
    for expected in sorted((root / "models").glob("ggml-vocab-*.gguf.out")):
        file = expected.with_suffix("")
        name = file.stem.removeprefix("ggml-vocab-")
        texts = Path(f"{file}.inp").read_text(encoding="utf-8").split(SEPARATOR)
        ids = [[int(word) for word in line.split()] for line in expected.read_text().splitlines()]
        cases = list(zip(texts, ids, strict=False))
        with tempfile.TemporaryDirectory() as folder:
            whole = with_weights(file, Path(folder) / file.name)
            model = str(read_header(whole).metadata.get("tokenizer.ggml.model"))
            yield from _rows_of(name, model, whole, cases)


def _rows_of(name: str, model: str, file: Path, cases: list[tuple[str, list[int]]]) -> Iterator[Row]:
    yield _row(f"{name}, run", model, lambda: _wrong_in_library(file, cases))
    yield _row(f"{name}, trained on", model, lambda: _wrong_in_folder(file, cases))


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
TOKENS = b"tokenizer.ggml.tokens"


def with_weights(vocabulary: Path, whole: Path) -> Path:
    """A file of a vocabulary alone, with an embedding of one column behind it: files without weights are no models here.

    Args:
        vocabulary: a GGUF file (version 3) without tensors.
        whole: the new file.
    """
    data = vocabulary.read_bytes()
    version, num_tensors, num_fields = struct.unpack_from("<IQQ", data, 4)
    if (version, num_tensors) != (3, 0):
        raise InputError(f"{vocabulary}: expected GGUF 3 without tensors, found version {version} with {num_tensors}")
    place, num_tokens = 24, 0
    for _ in range(num_fields):
        (length,) = struct.unpack_from("<Q", data, place)
        key, place = data[place + 8 : place + 8 + length], place + 8 + length
        (kind,) = struct.unpack_from("<I", data, place)
        if key == TOKENS:
            (num_tokens,) = struct.unpack_from("<Q", data, place + 8)
        place = _behind_value(data, place + 4, kind)
    name = b"token_embd.weight"
    info = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 1, num_tokens, 0, 0)
    head = data[:8] + struct.pack("<Q", 1) + data[16:place] + info
    whole.write_bytes(head + bytes(-len(head) % 32) + bytes(4 * num_tokens))
    return whole


def _behind_value(data: bytes, place: int, kind: int) -> int:
    if kind == STRING:
        return place + 8 + int(struct.unpack_from("<Q", data, place)[0])
    if kind != ARRAY:
        return place + SIZES[kind]
    kind, count = struct.unpack_from("<IQ", data, place)
    place += 12
    if kind in SIZES:
        return place + int(count) * SIZES[kind]
    for _ in range(count):
        place = _behind_value(data, place, kind)
    return place


def _row(test: str, model: str, wrong: Callable[[], str]) -> Row:
    try:
        reason = wrong()
    except UnfitModelError:
        raise  # says something of this machine, not of the vocabulary
    except EdgepatchError as error:
        known = OTHER_KINDS.get(model)
        return Row("vocabularies", test, "not_applicable" if known else "refused", known or str(error)[:300])
    return Row("vocabularies", test, "fail" if reason else "pass", reason)


def _wrong_in_library(file: Path, cases: list[tuple[str, list[int]]]) -> str:
    with Vocabulary(file) as vocabulary:
        return _first_wrong(cases, [vocabulary.tokenize(text, special=False) for text, _ in cases])


def _wrong_in_folder(file: Path, cases: list[tuple[str, list[int]]]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        vocabularies.write_tokenizer(read_header(file), Path(folder))
        tokenizer = FolderTokenizer(Path(folder))
        return _first_wrong(cases, [tokenizer.encode(text, bos=False) for text, _ in cases])


def _first_wrong(cases: list[tuple[str, list[int]]], actual: list[list[int]]) -> str:
    wrong = [(text, want, have) for (text, want), have in zip(cases, actual, strict=True) if want != have]
    if not wrong:
        return ""
    text, want, have = wrong[0]
    return f"{len(wrong)} of {len(cases)} texts, the first {text[:40]!r}: expected {want[:8]}, found {have[:8]}"
