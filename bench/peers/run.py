"""Runs a peer's tests and writes the table of their verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from edgepatch.bench.peers import server_tests, templates, vocabularies
from edgepatch.bench.peers.rows import Row, count
from edgepatch.bench.peers.sources import unpack
from edgepatch.files.writing import write_atomically
from edgepatch.progress import Progress, silent

SUITES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "vocabularies": vocabularies.rows,
    "templates": templates.rows,
    "server": server_tests.rows,
}


def run(source: Path, out: Path, work: Path, suites: Sequence[str] = (), progress: Progress = silent) -> list[Row]:
    """The rows of all suites, or of some, whose rows then take the place of the old ones.

    Args:
        source: llama-cpp-python's source archive, or llama.cpp's sources.
        out: the JSON file.
        work: where the archive is unpacked.
        suites: names; all where none is given.
        progress: told after each row.

    Raises:
        InputError: the source holds no tests of llama.cpp.
    """
    root = unpack(source, work)
    every: list[Row] = []
    for suite in suites or tuple(SUITES):
        new: list[Row] = []
        for row in SUITES[suite](root):
            new.append(row)
            progress(suite, len(new), len(new))
        every = sorted([*_kept(out, suite), *new], key=lambda row: (list(SUITES).index(row.suite), row.test))
        document = {"source": root.parents[1].name, "counts": count(every), "rows": [asdict(row) for row in every]}
        write_atomically(out, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return every


def _kept(out: Path, suite: str) -> list[Row]:
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    return [Row(**row) for row in rows if row["suite"] != suite]
