"""Conversations on disk: their token ids, with the model and the patch they were held under.

Not the cache's bytes. Those carry no identity, hold the patch's own cells, and depend on library version and cache type: a file
could bring another seed with it. Loading evaluates the tokens behind the seed that is active, which costs a prefill.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.runtimes.base import Runtime

FORMAT = "edgepatch-conversation-1"
MAX_FILE_BYTES = 64 * 1024 * 1024


def save_conversation(runtime: Runtime, path: Path, sequence: int = 0) -> None:
    """Writes what a sequence has evaluated.

    Raises:
        InputError: the sequence is empty, or the file cannot be written.
    """
    tokens = runtime.evaluated(sequence)
    if not tokens:
        raise InputError(f"sequence {sequence} holds no conversation yet")
    content = {"format": FORMAT, "system_fingerprint": runtime.system_fingerprint, "tokens": tokens}
    write_atomically(path, json.dumps(content).encode())


def load_conversation(runtime: Runtime, path: Path, sequence: int = 0) -> list[int]:
    """Evaluates a saved conversation in a sequence, behind the active seed.

    Returns:
        Its token ids, to be continued.

    Raises:
        InputError: the file cannot be read, is damaged, too long for the context, or was held with another model or patch.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {path.stat().st_size}")
        content = json.loads(path.read_text(encoding="utf-8"))
        known, held = content["format"], content["system_fingerprint"]
        tokens = [int(t) for t in content["tokens"]]
    except OSError as error:
        raise InputError(f"cannot read conversation {path}: {error.strerror}", hint="check the path") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is no saved conversation, or is damaged") from None
    if known != FORMAT:
        raise InputError(f"{path}: expected the format {FORMAT}, found {known!r}")
    if held != runtime.system_fingerprint:
        raise InputError(
            f"{path}: the conversation was held with {held}, active is {runtime.system_fingerprint}",
            hint="load the model and the patch that it was held with",
        )
    runtime.logits_of_last(tokens, sequence)
    return tokens
