"""llama.cpp as a library: loaded once, its log kept for error messages."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from edgepatch.converters.gguf_header import read_header
from edgepatch.converters.gguf_text import GGUFTokenizer
from edgepatch.errors import EdgepatchError, InputError, MissingExtraError

_log: deque[str] = deque(maxlen=3)


def load_library() -> Any:
    """The ``llama_cpp`` module, its log kept in memory instead of printed.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        EdgepatchError: it is installed but its library cannot be loaded.
    """
    return _load_library()[0]


@cache
def _load_library() -> tuple[Any, Any]:
    """(module, log callback): llama.cpp keeps a pointer to the callback, so it must never be freed."""
    try:
        import llama_cpp
    except ImportError:
        raise MissingExtraError("llama-cpp-python", "gguf") from None
    except (OSError, RuntimeError) as error:
        raise EdgepatchError(f"llama.cpp cannot be loaded: {error}", hint="install llama-cpp-python again") from error

    def keep(level: int, text: bytes, _: Any) -> None:
        if level in (3, 4):  # warnings and errors
            _log.append(text.decode("utf-8", "replace").strip())

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, None)
    llama_cpp.llama_backend_init()
    return llama_cpp, callback


def forget_errors() -> None:
    """Starts a new record for ``library_errors``."""
    _log.clear()


def library_errors() -> str:
    """llama.cpp's last warnings and errors, for a message."""
    return "; ".join(_log) or "no reason given"


def quantization_types() -> dict[str, int]:
    """Name ("F32", "F16", "Q4_K_M") -> llama.cpp's number, for every type that the installed llama.cpp offers.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    llama_cpp = load_library()
    pattern = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
    matches = [m for m in map(pattern.fullmatch, dir(llama_cpp)) if m]
    return {m[1]: int(getattr(llama_cpp, m[0])) for m in matches}


@contextmanager
def opened_vocabulary(path: Path) -> Iterator[Callable[[str, bool, bool], list[int]]]:
    """llama.cpp's tokenizer of a GGUF file that ``gguf_header.read_header`` has found sound, without the weights.

    Returns:
        ``GGUFTokenizer.encode``: (text, whether BOS and EOS are added, whether names of special tokens are the tokens) -> token ids.

    Raises:
        InputError: llama.cpp cannot read the vocabulary.
        MissingExtraError: llama-cpp-python is not installed.
    """
    lib = load_library()
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    model = lib.llama_model_load_from_file(bytes(path), parameters)
    if not model:
        raise InputError(
            f"llama.cpp cannot read the vocabulary of {path}: {library_errors()}", hint="get the model again"
        )
    try:
        tokenizer = GGUFTokenizer(lib, lib.llama_model_get_vocab(model), read_header(path))
        try:
            yield tokenizer.encode
        finally:
            tokenizer.close()
    finally:
        lib.llama_model_free(model)
