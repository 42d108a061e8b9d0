"""What a child tries with an ONNX graph before the ONNX runtime opens it: the runtime's own session and caches, on few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.converters.first_contact import Report
from edgepatch.converters.onnx.files import read_graph_file
from edgepatch.converters.onnx.graphs import recognise
from edgepatch.converters.onnx.sessions import PROMPT_TOKENS, TRIAL_WINDOW, new_session, require_finite, spec_of_session
from edgepatch.runtimes.onnx.caches import new_cache

TRIAL = f"{__name__}:try_session"
ROWS = 2


def try_session(paths: Sequence[Path], settings: dict[str, Any], report: Report) -> dict[str, Any]:
    """In a child: a token, a prompt, a token behind it, and a token of several rows at once.

    Raises:
        InputError: the graph cannot be opened or seeded.
        UnfitModelError: logits are not finite.
    """
    file = read_graph_file(paths[0])
    report("opening a session")
    session = new_session(paths[0], settings["num_threads"], settings["provider"])
    spec = spec_of_session(session, file, settings["spec"])
    graph = recognise(session, file, spec)
    for rows, counts in ((1, (1, PROMPT_TOKENS, 1)), (ROWS, (1,))):
        positions = sum(counts) + 1
        cache = new_cache(session, graph, spec, TRIAL_WINDOW, settings["provider"], positions=positions, rows=rows)
        cache.fill([[]] * rows)
        for count in counts:
            report(f"evaluating {rows} x {count} tokens")
            row = np.arange(count, dtype=np.int64) * spec.vocab_size // count
            require_finite(cache.evaluate(np.repeat(row[None], rows, axis=0)))
    return {}
