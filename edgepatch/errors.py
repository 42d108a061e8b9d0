"""The error tree. Every error says what was expected, what was found and which one; ``hint`` says what to do.

EdgepatchError            exit 1
+- InputError             exit 2   a file, folder, option or value that cannot be used
|  +- UnfitModelError     exit 5   a model on which llama.cpp or ONNX Runtime dies, hangs or computes no numbers on this machine
+- MissingExtraError      exit 2   an optional package is not installed
+- PatchFormatError       exit 3   a patch file breaks the format
+- UntrustedError         exit 3   a signature, key or trust root does not hold
+- MismatchError          exit 4   a patch was made for another model
+- InactivePatchError     exit 1   a patch was loaded but is not active: never run on
+- TrainingError          exit 1   training cannot go on (NaN loss, no usable pairs)
"""

from __future__ import annotations

import json
from urllib.parse import unquote, urlsplit


class EdgepatchError(Exception):
    """Base of all errors that edgepatch raises on purpose.

    Args:
        message: expected, found, and which one.
        hint: one line that says what to do; empty where nothing can be done.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(EdgepatchError):
    """A file, folder, option or value that cannot be used."""

    exit_code = 2


class UnfitModelError(InputError):
    """A model that a C library cannot use on this machine: in a child process it died, hung, or computed no numbers."""

    exit_code = 5


def install_command(extra: str, is_again: bool = False) -> str:
    """What a user types to get an extra.

    From a checkout it installs the checkout, from a wheel the wheel. Only where nothing says where edgepatch came from
    does it name the folder of wheels that the user has.

    Args:
        extra: e.g. "gguf".
        is_again: whether the packages are there, and broken.
    """
    again = " --force-reinstall" if is_again else ""
    url, is_editable = _source()
    if is_editable:
        return f"pip install{again} -e '{_path(url)}[{extra}]'"
    if url:
        return f"pip install{again} 'edgepatch[{extra}] @ {url}'"
    return f"pip install{again} --find-links WHEELS 'edgepatch[{extra}]', where WHEELS is the folder that edgepatch came in"


def _path(url: str) -> str:
    return unquote(urlsplit(url).path)


def _source() -> tuple[str, bool]:
    """(address, whether it is a checkout) that edgepatch was installed from; ("", False) where pip did not write it down."""
    from importlib import metadata

    try:
        # A checkout may hold metadata of its own beside those that pip wrote.
        texts = [each.read_text("direct_url.json") for each in metadata.distributions(name="edgepatch")]
        written = json.loads(next((text for text in texts if text), "{}"))
        return str(written.get("url", "")), bool(written.get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return "", False


class MissingExtraError(EdgepatchError):
    """An optional package is not installed.

    Args:
        package: the distribution that is missing.
        extra: the extra of edgepatch that installs it.
    """

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", hint=install_command(extra))


def no_gpu_error(library: str) -> InputError:
    """The error for a GPU that was asked for, and that a library has not.

    Args:
        library: for people: "PyTorch".
    """
    return InputError(
        f"device cuda: expected a GPU that {library} can use, found none",
        hint=f"leave --device out to run on the CPU, or install a {library} that was built for this machine's GPU; `edgepatch doctor` shows both",
    )


class PatchFormatError(EdgepatchError):
    """A patch file breaks the format."""

    exit_code = 3


class UntrustedError(EdgepatchError):
    """A signature, key or trust root does not hold. Whatever rests on it is refused.

    Args:
        check: the check that failed ("root version").
        expected: what it needs.
        actual: what is there.
    """

    exit_code = 3

    def __init__(self, check: str, expected: object, actual: object, hint: str = "") -> None:
        super().__init__(f"{check}: expected {expected}, found {actual}", hint)
        self.check = check


class MismatchError(EdgepatchError):
    """A patch was made for another model.

    Args:
        differences: field name -> (value the patch expects, value the model has).
    """

    exit_code = 4

    def __init__(self, differences: dict[str, tuple[object, object]]) -> None:
        lines = [f"{field}: patch expects {want}, model has {have}" for field, (want, have) in differences.items()]
        super().__init__(
            "the patch was made for another model\n  " + "\n  ".join(lines),
            hint="use the model that the patch names, or a patch made for this model",
        )
        self.differences = differences


class InactivePatchError(EdgepatchError):
    """A patch was loaded but is not active."""


class TrainingError(EdgepatchError):
    """Training cannot go on."""
