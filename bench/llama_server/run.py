"""An unmodified llama-server, built from the sources that llama-cpp-python brings, and its answers beside ours.

``edgepatch bench llama-server`` builds it once (20 minutes on two cores), runs tests/llama_server on it and writes
bench/results/stock.json and stock.md: the same prompts through llama-server and through edgepatch, token for token.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgepatch.bench.checkout import run_tests
from edgepatch.bench.llama_server.server import FOLDER, VARIABLE, find_server
from edgepatch.bench.llama_server.transcript import document, transcribe
from edgepatch.errors import EdgepatchError
from edgepatch.files.writing import write_atomically


def run(results: Path, folder: Path = FOLDER, is_tested: bool = True) -> str:
    """Builds llama-server where it is missing, runs its tests, writes the transcript.

    Args:
        results: folder for ``stock.json`` and ``stock.md``.
        folder: for sources and build.
        is_tested: whether the tests run.

    Returns:
        The transcript as Markdown.

    Raises:
        EdgepatchError: the build or a test failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    binary = find_server(folder)
    if is_tested and run_tests("llama_server", **{VARIABLE: str(binary.resolve())}):
        raise EdgepatchError("tests of llama-server failed", hint="their output is above")
    transcript = transcribe(binary)
    write_atomically(results / "stock.json", (json.dumps(transcript, indent=2) + "\n").encode())
    write_atomically(results / "stock.md", document(transcript).encode())
    return document(transcript)
