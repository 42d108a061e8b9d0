"""The one way to load what Transformers loads: nothing of a folder's own code is run, no pickle is read, nothing is fetched.

Transformers asks at the terminal whether it may run a folder's Python, reads pickled weights where there are no others, and downloads what is
missing. Each is a default that every call must turn off, so there is one call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgepatch.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
"""How files of weights end that are programs, or that need a library which runs some."""

SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_pretrained(loader: Any, folder: Path | None, **options: Any) -> Any:
    """``loader.from_pretrained`` of a folder, of what is no model's weights: a config or a tokenizer.

    Args:
        loader: a class of Transformers, e.g. ``AutoConfig``.
        folder: of the model.
        **options: for the class.

    Raises:
        OSError, ValueError: as the class raises, also where the folder's own code would be needed.
    """
    return loader.from_pretrained(folder, **options, **SAFE)


def load_pretrained_model(loader: Any, folder: Path | None, **options: Any) -> Any:
    """As ``load_pretrained``, of a model with its weights, which must be safetensors.

    Args:
        loader: a model class of Transformers, e.g. ``AutoModelForCausalLM``.
        folder: of the model; ``None`` where the options bring the weights.
        **options: for the class.

    Raises:
        InputError: the folder holds pickled weights alone, or an adapter that would change the weights unseen.
        OSError, ValueError: as the class raises, also where the folder's own code would be needed.
    """
    if folder is not None and "gguf_file" not in options:
        require_safe_weights(folder)
    return loader.from_pretrained(folder, **options, use_safetensors=True, **SAFE)


def load_adapter(loader: Any, model: Any, folder: Path) -> Any:
    """``loader.from_pretrained`` of a PEFT adapter over a model in memory; its weights must be safetensors.

    Args:
        loader: ``PeftModel``.
        model: the base, which is changed.
        folder: of the adapter.

    Raises:
        InputError: the folder holds pickled weights alone.
        OSError, ValueError: as the class raises.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder}: expected adapter_model.safetensors, found none", hint="save the adapter again")
    return loader.from_pretrained(model, folder, local_files_only=True)


def require_safe_weights(folder: Path) -> None:
    """Refuses a model folder by the names of its files, before anything opens them.

    Raises:
        InputError: it holds pickled weights and no safetensors, or an adapter beside its weights.
    """
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}", hint="check the path and its rights") from error
    pickled = [name for name in names if name.endswith(PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"weights in {folder}: expected safetensors, found {', '.join(pickled[:3])}, which may run any code when read",
            hint="get the model's safetensors, or convert it where you trust it",
        )
    if "adapter_config.json" in names:
        raise InputError(
            f"{folder}: expected a model or an adapter, found adapter_config.json beside a model's config",
            hint="an adapter beside weights would change them unseen: move it into a folder of its own",
        )
