"""The peer's vocabularies with expected ids: what its own tokenizer gives here, and ours, built from the same file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgepatch.bench.peers.rows import Row
from edgepatch.converters.gguf import vocabularies
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import EdgepatchError
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
        model = str(read_header(file).metadata.get("tokenizer.ggml.model"))
        yield _row(f"{name}, run", model, lambda file=file, cases=cases: _wrong_in_library(file, cases))  # type: ignore[misc]
        yield _row(f"{name}, trained on", model, lambda file=file, cases=cases: _wrong_in_folder(file, cases))  # type: ignore[misc]


def _row(test: str, model: str, wrong: object) -> Row:
    assert callable(wrong)
    try:
        reason = wrong()
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
