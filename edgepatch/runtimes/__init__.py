"""Runtimes: llama.cpp, ONNX Runtime and the PyTorch reference behind one protocol, each needing its own extra, and the session over them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgepatch.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from edgepatch.patch.file import Patch
    from edgepatch.runtimes.runtime import Runtime
    from edgepatch.runtimes.session import Session
    from edgepatch.tensors import ModelSpec


class _Choice(Enum):
    ACTIVE = "active"


ACTIVE: Literal[_Choice.ACTIVE] = _Choice.ACTIVE
"""In place of a patch: those that the store of this device names as active for the model."""

OnePatch: TypeAlias = "Patch | Path | str"
PatchChoice: TypeAlias = "OnePatch | Sequence[OnePatch] | Literal[_Choice.ACTIVE] | None"
PIN = "sha256:"
"""What stands before the digest of a patch in the store."""

GGUF_MAGIC = b"GGUF"
PACKAGES = {
    "llamacpp": {"gguf", "jinja2", "llama_cpp"},
    "onnx": {"jinja2", "onnxruntime", "tokenizers"},
    "torch": {"gguf", "jinja2", "peft", "tokenizers", "torch", "transformers"},
}
EXTRAS = {"llamacpp": "gguf", "onnx": "onnx", "torch": "train"}


def runtime_name(model: Path) -> str:
    """Which runtime takes a model: "llamacpp", "onnx" or "torch".

    Raises:
        InputError: nothing is there, or it is no model of a known kind.
    """
    try:
        if model.is_dir():
            if (model / "genai_config.json").is_file() or (model / "model.onnx").is_file():
                return "onnx"
            if (model / "onnx" / "model.onnx").is_file() and not list(model.glob("*.safetensors")):
                return "onnx"
            if (model / "config.json").is_file():
                return "torch"
            content = f"a folder with {', '.join(sorted(p.name for p in model.iterdir())[:6]) or 'nothing'}"
        else:
            # A pipe that nobody writes to is not waited for.
            with open(os.open(model, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", buffering=0) as file:
                start = file.read(len(GGUF_MAGIC)) or b""
            if start == GGUF_MAGIC:
                return "llamacpp"
            content = f"a file that starts with {start!r}"
    except OSError as error:
        raise InputError(f"cannot read model {model}: {error.strerror}", hint="check the path") from error
    raise InputError(
        f"{model} is no model: expected a GGUF file, an ONNX folder or a Transformers folder, found {content}",
        hint="name the .gguf file itself, or the folder that holds genai_config.json, model.onnx or config.json",
    )


def device_options(model: Path, device: str) -> dict[str, object]:
    """What each runtime calls the device.

    Args:
        model: decides which runtime it is.
        device: "cpu" or "cuda".

    Raises:
        InputError: the model is of no known kind.
    """
    options: dict[str, dict[str, object]] = {
        "llamacpp": {"num_gpu_layers": -1 if device == "cuda" else 0},
        "onnx": {"provider": device},
        "torch": {"device": device},
    }
    return options[runtime_name(model)]


def _runtime_class(name: str) -> Callable[..., Runtime]:
    if name == "llamacpp":
        from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime

        return LlamaCppRuntime
    if name == "onnx":
        from edgepatch.runtimes.onnx.runtime import OnnxRuntime

        return OnnxRuntime
    from edgepatch.runtimes.reference import TorchRuntime

    return TorchRuntime


def load_runtime(
    model: Path | str,
    patch: PatchChoice = ACTIVE,
    *,
    store: Path | str | None = None,
    pinned: bool = False,
    other_template: bool = False,
    chat_template: str | None = None,
    **options: Any,
) -> Session:
    """Loads a model, with a patch or several side by side, in the runtime that takes its kind.

    Args:
        model: a GGUF file (llama.cpp), a folder with ``genai_config.json`` or ``model.onnx`` (ONNX Runtime), or a
            Transformers folder (PyTorch).
        patch: the patch; its file; "sha256:" and the digest of one in the store; several of these, in any order, which act side by
            side; ``None`` for the bare model on purpose. When not given: the active patches of the store for this model; having
            none is an error, unless an administrator took them off by word.
        store: folder of the store, which must exist; ``None`` takes that of the device.
        pinned: leaves a seed that moves at the start of the text, where its hold fades; for models that cannot move it.
        other_template: lets the model have another chat template than the patch was made with; the fingerprint then names it.
        chat_template: Jinja source to write conversations with instead of the model's own; every fingerprint names it.
        **options: of that runtime's class, e.g. ``context_length`` or ``num_threads``.

    Raises:
        InputError: a file or the store cannot be used, no patch is active and none was named, the runtime has no such option, or
            several patches cannot stand side by side.
        MissingExtraError: the runtime's packages are not installed.
        PatchFormatError: the patch file breaks the format.
        UntrustedError: the store or a patch in it was changed, or its trust root does not vouch for the patch.
        MismatchError: the patch, or each active one, was made for another model.
        InactivePatchError: the seed was not taken, or the canary says that it does not work.
    """
    from edgepatch.runtimes.patching import require_room, together
    from edgepatch.runtimes.session import Session

    path = Path(model)
    name, is_other = runtime_name(path), other_template or chat_template is not None
    with _naming_extras(name):
        if patch is not ACTIVE:
            parts = find_patches(patch, store)
            planned = together(parts)
            require_room(parts, options.get("context_length"))
            runtime = _with_template(_open(name, path, planned, options), chat_template)
            return Session(runtime, parts, pinned, is_other)
        from edgepatch.store.reading import StoreReader

        reader = StoreReader(store)
        reader.require_some()
        runtime = _with_template(_open(name, path, None, options), chat_template)
        try:
            parts = reader.require_active(runtime.spec)
        except BaseException:
            runtime.close()
            raise
        return Session(runtime, parts, pinned, is_other)


def find_patches(patch: OnePatch | Sequence[OnePatch] | None, store: Path | str | None = None) -> tuple[Patch, ...]:
    """Patches as ``find_patch`` finds each of them; none for ``None``.

    Raises:
        InputError: a file or the store cannot be read, has no such patch, or a list is empty or holds ``None``.
        PatchFormatError: a file breaks the format.
        UntrustedError: a patch of the store was changed, or its trust root does not vouch for it.
    """
    if patch is None:
        return ()
    several = patch if isinstance(patch, Sequence) and not isinstance(patch, str) else [patch]
    loaded = [find_patch(one, store) for one in several]
    parts = tuple(one for one in loaded if one is not None)
    if not parts or len(parts) < len(loaded):
        raise InputError(
            f"patches: expected one or more, found {len(parts)} of {len(loaded)}",
            hint="None is the bare model on purpose",
        )
    return parts


def find_patch(patch: Patch | Path | str | None, store: Path | str | None = None) -> Patch | None:
    """A patch from its file, or by "sha256:" and its digest from the store.

    Raises:
        InputError: the file or the store cannot be read, or has no such patch.
        PatchFormatError: the file breaks the format.
        UntrustedError: the patch of the store was changed, or its trust root does not vouch for it.
    """
    if not isinstance(patch, (str, Path)):
        return patch
    if not str(patch).startswith(PIN):
        from edgepatch.patch.file import read_patch

        return read_patch(Path(patch))
    from edgepatch.store.reading import StoreReader

    return StoreReader(store).load(str(patch))


@contextmanager
def _naming_extras(name: str) -> Iterator[None]:
    """Where a package of a runtime is missing, the error names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES[name]:
            raise
        raise MissingExtraError(error.name, EXTRAS[name]) from None


def _with_template(runtime: Runtime, source: str | None) -> Runtime:
    if source is not None:
        try:
            runtime.chat_template = runtime.chat_template.replaced(source)
        except BaseException:
            runtime.close()
            raise
    return runtime


def _open(name: str, model: Path, planned: Patch | None, options: dict[str, Any]) -> Runtime:
    runtime = _runtime_class(name)
    accepted = list(inspect.signature(runtime).parameters)[2:]
    unknown = sorted(options.keys() - set(accepted))
    if unknown:
        raise InputError(f"the {name} runtime has no option {unknown[0]}", hint=f"it takes {', '.join(accepted)}")
    return runtime(model, planned, **options)


def read_spec(model: Path) -> ModelSpec:
    """What model this is, in the words that patches name their base with.

    Raises:
        InputError: the model cannot be read.
        MissingExtraError: the packages that read it are not installed.
    """
    name = runtime_name(model)
    if name == "llamacpp":
        from edgepatch.converters.gguf import specs

        return specs.read_spec(model)
    if name == "torch":
        from edgepatch.converters.hf import folders

        return folders.read_spec(model)
    with _naming_extras(name):
        runtime = _open(name, model, None, {})
    runtime.close()
    return runtime.spec
