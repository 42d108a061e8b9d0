"""The settings of a PEFT adapter: an allow-list of ``adapter_config.json``, each value checked.

The file comes from strangers and steers a loader: PEFT once took ``trust_remote_code`` from it. Here a setting is read, known to
be of no account, or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.files.strict_json import read_json

PROMPT_TUNING, PREFIX_TUNING, CARTRIDGE = PEFT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE")
P_TUNING = "P_TUNING"
"""A soft prompt that an encoder has made: what is saved is the encoder's output, and so a soft prompt like any other."""

READ_TYPES = (*PEFT_TYPES, P_TUNING)
SOFT_PROMPTS = (PROMPT_TUNING, P_TUNING)
PEFT_VERSION = "0.21.2"
"""The release whose ``adapter_config.json`` is written."""

MAX_CONFIG_BYTES = 1024 * 1024
MAX_TEXT = 4096

SIZES = {"num_virtual_tokens": 65536, "num_layers": 1024, "token_dim": 65536, "num_attention_heads": 1024}
"""Setting -> its largest value."""

FIXED: dict[str, tuple[object, ...]] = {
    "task_type": ("CAUSAL_LM", None),
    "num_transformer_submodules": (1, None),
    "modules_to_save": (None, []),
}
"""Setting -> the values with which the tensor means what a patch means."""

IGNORED = frozenset(
    {
        "auto_mapping",
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "inference_mode",
        "init_weights",
        "num_frozen_tokens",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "revision",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
"""Settings that say how the tensor was trained, and PEFT's hints to loaders. Their values are never looked at."""


@dataclass(frozen=True)
class AdapterConfig:
    """What is read of ``adapter_config.json``; ``None`` where the file leaves a value open.

    Attributes:
        peft_type: one of ``READ_TYPES``.
        num_virtual_tokens: P.
        num_layers: L.
        token_dim: D of a soft prompt, K * H of a prefix.
        num_attention_heads: query heads of a soft prompt's model, K of a prefix.
        base_model_name_or_path: what the adapter calls its base; never opened.
        peft_version: the PEFT that wrote it.
    """

    peft_type: str
    num_virtual_tokens: int
    num_layers: int | None
    token_dim: int | None
    num_attention_heads: int | None
    base_model_name_or_path: str | None
    peft_version: str | None


def read_config(path: Path) -> AdapterConfig:
    """The settings of an adapter, from an allow-list of keys.

    Raises:
        InputError: the file is missing, no JSON object, of an unknown type, or a setting is unknown or out of range.
    """
    values = read_json(path, MAX_CONFIG_BYTES, what="settings", hint="name a PEFT adapter folder, or save it again")
    kind = values.get("peft_type")
    if kind not in READ_TYPES:
        raise InputError(
            f"{path}: peft_type: expected {', '.join(READ_TYPES)}, found {str(kind)[:80]!r}",
            hint="a patch is virtual tokens; adapters that change weights (LoRA and others) are merged into the base model instead",
        )
    for key, allowed in FIXED.items():
        if values.get(key) not in allowed or isinstance(values.get(key), bool):
            raise InputError(
                f"{path}: {key}: expected {allowed[0]!r}, found {str(values[key])[:80]}",
                hint="it cannot be made a patch",
            )
    read = {*AdapterConfig.__dataclass_fields__, *FIXED}
    unknown = sorted(key for key, value in values.items() if key not in read | IGNORED and value is not None)
    if unknown:
        raise InputError(
            f"{path}: expected the settings of PEFT {PEFT_VERSION}, found {unknown[0][:80]!r} as well",
            hint="what it changes is unknown here; save the adapter without it, or update edgepatch",
        )
    sizes = {key: _integer(path, values, key, largest) for key, largest in SIZES.items()}
    if sizes["num_virtual_tokens"] is None:
        raise InputError(f"{path}: num_virtual_tokens is missing", hint="save the adapter with PEFT again")
    texts = {key: _text(path, values, key) for key in ("base_model_name_or_path", "peft_version")}
    return AdapterConfig(peft_type=kind, **sizes, **texts)  # type: ignore[arg-type]


def _integer(path: Path, values: dict[str, Any], key: str, largest: int) -> int | None:
    value = values.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest):
        raise InputError(f"{path}: {key}: expected an integer from 1 to {largest}, found {str(value)[:80]}")
    return value


def _text(path: Path, values: dict[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise InputError(f"{path}: {key}: expected a text of at most {MAX_TEXT} characters, found {str(value)[:80]!r}")
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can spell halves of characters, UTF-8 cannot
