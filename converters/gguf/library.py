"""llama.cpp as a library: loaded once, its log kept for error messages."""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from edgepatch.converters.first_contact import Report, require_library
from edgepatch.converters.machine_identity import library_files
from edgepatch.errors import EdgepatchError, MissingExtraError, no_gpu_error
from edgepatch.interrupts import called_from_c
from edgepatch.progress import Progress, silent

PACKAGE = "llama_cpp"
_log: deque[str] = deque(maxlen=3)
_on_tensor: list[Callable[[int, int], None]] = []
TENSOR = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")
"""What begins llama.cpp's line about a tensor that it is about to quantize: "[  12/ 201]"."""


def require_installed() -> None:
    """Looks for the library without loading it.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    if not library_files(PACKAGE):
        raise MissingExtraError("llama-cpp-python", "gguf")


def load_library() -> Any:
    """The ``llama_cpp`` module, its log kept in memory instead of printed; a child has loaded it on this CPU before.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        UnfitModelError: loading it ends a process on this CPU.
        EdgepatchError: it is installed but its library cannot be loaded.
    """
    return _load_library()[0]


@cache
def _load_library() -> tuple[Any, Any]:
    """(module, log callback): llama.cpp keeps a pointer to the callback, so it must never be freed."""
    require_installed()
    require_library(PACKAGE, f"{__name__}:try_library")
    try:
        llama_cpp = _import_package()
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


def _import_package() -> Any:
    """``llama_cpp`` with the library's functions. The package's own classes, which edgepatch does not use, take five times as long to
    import, and come when somebody asks for one.

    Raises:
        ImportError, OSError, RuntimeError: it cannot be imported.
    """
    classes = f"{PACKAGE}.llama"
    if PACKAGE in sys.modules:
        return import_module(PACKAGE)
    sys.modules[classes] = ModuleType(classes)  # what the package imports in its place
    try:
        package = import_module(PACKAGE)
    finally:
        del sys.modules[classes]

    with suppress(ImportError):  # it takes llama.cpp's log when it is imported, so not later than edgepatch does
        import_module(f"{PACKAGE}._logger")

    def bring(name: str) -> Any:
        """A name that the package has not: ``from llama_cpp import Llama``, or ``*``, which asks for ``__all__`` first."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
        own = import_module(classes)
        vars(package).update({key: value for key, value in vars(own).items() if not key.startswith("_")})
        return getattr(own, name)

    package.__getattr__ = bring  # type: ignore[method-assign]  # PEP 562
    return package


def require_gpu() -> None:
    """Raises unless the library can keep layers on a GPU of this machine; without one it computes on the CPU and says nothing.

    Raises:
        InputError: it was built for none, or finds none.
        MissingExtraError: llama-cpp-python is not installed.
    """
    if not load_library().llama_supports_gpu_offload():
        raise no_gpu_error("llama.cpp")


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


NEEDS_MATRIX = re.compile(r"IQ[12]_\w+|IQ3_XXS|Q2_K_S")
"""Types that llama.cpp makes with an importance matrix alone."""


def quantization_types() -> dict[str, int]:
    """Name ("F32", "F16", "Q4_K_M") -> llama.cpp's number, for every type that the installed llama.cpp offers.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    llama_cpp = load_library()
    pattern = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
    matches = [m for m in map(pattern.fullmatch, dir(llama_cpp)) if m]
    return {m[1]: int(getattr(llama_cpp, m[0])) for m in matches}


def try_library(_: object, __: object, report: Report) -> dict[str, Any]:
    """In a child: loads the library and nothing else."""
    report("being loaded")
    load_library()
    return {}
