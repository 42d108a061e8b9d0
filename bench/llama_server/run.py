"""An unmodified llama-server, built from the sources that llama-cpp-python brings, and its answers beside ours.

``make stock`` builds it once (20 minutes on two cores), runs tests/llama_server on it and writes bench/results/stock.json and stock.md:
the same prompts through llama-server and through edgepatch, token for token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from edgepatch.bench.llama_server.server import ROOT, VARIABLE, find_server, run_command


def main() -> None:
    """Builds llama-server, runs its tests, writes the transcript."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "stock", help="folder for sources and build")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="folder for stock.json and stock.md"
    )
    parser.add_argument("--no-tests", action="store_true", help="only write the transcript")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    binary = find_server(arguments.out)
    os.environ[VARIABLE] = str(binary.resolve())
    if not arguments.no_tests:
        run_command([sys.executable, "-m", "pytest", ROOT / "tests" / "llama_server"])
    from edgepatch.bench.llama_server.transcript import document, transcribe  # it runs the server with this module

    result = transcribe(binary)
    (arguments.results / "stock.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (arguments.results / "stock.md").write_text(document(result), encoding="utf-8")
    print(document(result))
