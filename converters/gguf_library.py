"""llama.cpp as a library: loaded once, its log kept for error messages."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from edgepatch.errors import EdgepatchError, InputError, MissingExtraError
from edgepatch.interrupts import called_from_c
from edgepatch.progress import Progress, silent

_log: deque[str] = deque(maxlen=3)
_on_tensor: list[Callable[[int, int], None]] = []
TENSOR = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")
"""What begins llama.cpp's line about a tensor that it is about to quantize: "[  12/ 201]"."""


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

    @called_from_c
    def keep(level: int, text: bytes, _: Any) -> None:
        if level in (3, 4):  # warnings and errors
            _log.append(text.decode("utf-8", "replace").strip())
        elif _on_tensor and (tensor := TENSOR.match(text)):
            _on_tensor[-1](int(tensor[1]), int(tensor[2]))

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


@contextmanager
def quantizing(progress: Progress = silent) -> Iterator[None]:
    """Within it llama.cpp's log tells of every tensor that it quantizes."""
    total = 1

    def tell(number: int, count: int) -> None:
        nonlocal total
        total = count
        progress("quantize", number - 1, count)

    progress("quantize", 0, total)
    _on_tensor.append(tell)
    try:
        yield
    finally:
        _on_tensor.pop()
    progress("quantize", total, total)


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
        A function (text, whether BOS and EOS are added, whether names of special tokens are the tokens) -> token ids.

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
    vocabulary = lib.llama_model_get_vocab(model)

    def tokenize(text: str, ends: bool, trusted: bool) -> list[int]:
        data = text.encode("utf-8")
        ids = (lib.llama_token * (len(data) + 8))()
        return list(ids[: lib.llama_tokenize(vocabulary, data, len(data), ids, len(ids), ends, trusted)])

    try:
        yield tokenize
    finally:
        lib.llama_model_free(model)
