"""Opens what answers prompts: a model here, a server, the model behind a safety text, or the model with a LoRA adapter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.runtimes import device_options, load_runtime, runtime_name
from edgepatch.training.pairs.provenance import digest_of
from edgepatch.training.pairs.samplers import RuntimeSampler, Sampler
from edgepatch.training.pairs.server_sampler import ServerSampler, is_url
from edgepatch.training.pairs.teachers import SELF, InstructedSampler

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """One of the two models.

    Attributes:
        model: file, folder or address.
        name: of the model on its server; "" takes the only one.
        key_variable: environment variable that holds the server's API key.
    """

    model: str
    name: str = ""
    key_variable: str | None = None


@dataclass(frozen=True)
class Means:
    """How servers (the first two) and runtimes are used."""

    parallel: int = 8
    timeout_s: float = 600
    sequences: int = 1
    context_length: int | None = None
    threads: int | None = None
    device: str = "cpu"


def is_adapter(source: str) -> bool:
    """Whether a folder holds an adapter of PEFT."""
    return not is_url(source) and (Path(source) / ADAPTER_CONFIG).is_file()


def open_sampler(source: Source, means: Means, stack: ExitStack) -> Sampler:
    """A model as it is; the stack closes it.

    Raises:
        InputError: it cannot be loaded, the server cannot be used, or a name or key is given for what is no server.
    """
    if is_url(source.model):
        key = _api_key(source.key_variable)
        return stack.enter_context(ServerSampler(source.model, source.name, key, means.parallel, means.timeout_s))
    _refuse_server_options(source)
    path = Path(source.model)
    return RuntimeSampler(_loaded(path, means, stack), digest_of(path))


def open_teacher(
    teacher: Source, base: Sampler, base_source: Source, texts: Sequence[str], means: Means, stack: ExitStack
) -> Sampler:
    """The teacher; the stack closes it.

    Args:
        teacher: ``SELF``, the folder of a LoRA adapter for the base, or another model.
        base: open, and the teacher itself where that is ``SELF``.
        base_source: what ``base`` was opened from.
        texts: safety texts in front of the teacher's prompts; may be empty but for ``SELF``.
        means: of runtimes and servers.
        stack: closes what is opened.

    Raises:
        InputError: as ``open_sampler``, the adapter is not for this base, or nothing makes the teacher safer.
    """
    if teacher.model == SELF:
        _refuse_server_options(teacher)
        if not texts:
            raise InputError("the teacher is the model itself, and has no safety text", hint="give one")
        opened = base
    elif is_adapter(teacher.model):
        _refuse_server_options(teacher)
        opened = _open_adapted(Path(teacher.model), base_source, means, stack)
    else:
        opened = open_sampler(teacher, means, stack)
    return InstructedSampler(opened, texts) if texts else opened


def _open_adapted(adapter: Path, base: Source, means: Means, stack: ExitStack) -> Sampler:
    """The base with the adapter merged, in full precision, in a temporary folder."""
    from edgepatch.converters.peft.lora import merge_for_runtime

    if is_url(base.model):
        raise InputError(
            f"{adapter} is an adapter of the model, and the model is on a server: {base.model}",
            hint="let a server answer with the adapter, and name it as the teacher",
        )
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgepatch-teacher-")))
    merged = merge_for_runtime(Path(base.model), adapter, folder)
    return RuntimeSampler(_loaded(merged, means, stack), digest_of(adapter), "adapter_sha256")


def _loaded(path: Path, means: Means, stack: ExitStack) -> Any:
    options: dict[str, Any] = {
        "num_sequences": means.sequences,
        "context_length": means.context_length,
        "num_threads": None if runtime_name(path) == "torch" else means.threads,
    }
    options |= device_options(path, means.device)
    given = {name: value for name, value in options.items() if value is not None}
    return stack.enter_context(load_runtime(path, None, **given))


def _refuse_server_options(source: Source) -> None:
    if source.name or source.key_variable:
        raise InputError(
            f"{source.model} is no URL: the model's name and API key are for servers", hint="leave them out"
        )


def _api_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} is not set, or empty", hint="it should hold the server's API key"
        )
    return key
