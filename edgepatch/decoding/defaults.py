"""How a model's makers want it sampled, and what is taken where they say nothing: one set of defaults behind every door.

A Transformers or ONNX folder says it in ``generation_config.json``, a GGUF file in ``general.sampling.*``, as llama.cpp reads it.
Where a model names any of temperature, top-p, top-k and min-p it is taken at its word, and what it leaves out is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.decoding.sampling import DrawRule, Sampling
from edgepatch.errors import InputError
from edgepatch.files.strict_json import read_json

OURS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}
"""Of models that name neither temperature nor a cut."""

GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
INT32 = 2**31 - 1
FILE = "generation_config.json"


@dataclass(frozen=True)
class SamplingDefaults:
    """What fills a setting that a request leaves open.

    Attributes:
        sampling: with temperature, top-p, top-k, min-p and repetition penalty; its other settings are nobody's default.
        source: whose word it is: "edgepatch", "generation_config.json" or "general.sampling".
        named: what the model itself names, under our names.
        note: what the model says wrong, so that nothing of it is taken; "" where all is well.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling.plain(**OURS))
    source: str = "edgepatch"
    named: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def generation_config(self) -> dict[str, Any]:
        """What the model names, as a ``generation_config.json`` says it."""
        if self.named.get("temperature") != 0:
            return {"do_sample": True, **self.named} if self.named else {}
        return {"do_sample": False, **{name: value for name, value in self.named.items() if name != "temperature"}}

    @property
    def gguf_metadata(self) -> dict[str, Any]:
        """What the model names, as a GGUF file says it."""
        values = {**self.named, **({"top_k": min(self.named["top_k"], INT32)} if "top_k" in self.named else {})}
        return {GGUF_KEYS[name]: value for name, value in values.items()}

    @property
    def values(self) -> dict[str, float]:
        """The settings by name, for JSON."""
        return dict(self.sampling.rule._asdict())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.values, "source": self.source, **({"note": self.note} if self.note else {})}

    def __str__(self) -> str:
        rule = self.sampling.rule
        changed = [f"{name} {value:g}" for name, value in self.values.items() if value != getattr(DrawRule(), name)]
        return (
            f"{'greedy' if not rule.temperature else ', '.join(changed) or 'as the model gives them'} ({self.source})"
        )


def of_folder(folder: Path) -> SamplingDefaults:
    """The defaults of a Transformers or ONNX folder.

    Raises:
        InputError: its ``generation_config.json`` is damaged.
    """
    path = folder / FILE
    return of_generation_config(read_json(path, what="generation config", infinite=True) if path.is_file() else {})


def of_generation_config(settings: Mapping[str, Any]) -> SamplingDefaults:
    """What a ``generation_config.json`` asks for; without ``do_sample`` its temperature counts all the same."""
    named = {name: settings[name] for name in DrawRule._fields if settings.get(name) is not None}
    draws = settings.get("do_sample")
    if not isinstance(draws, bool | None):
        return _refused(FILE, f"do_sample: expected true or false, found {draws!r:.80}")
    if draws is False:
        named["temperature"] = 0.0
    return _defaults(named, FILE)


def of_gguf(metadata: Mapping[str, Any]) -> SamplingDefaults:
    """What the metadata of a GGUF file asks for; llama.cpp's further samplers (XTC, Mirostat) are passed over."""
    named = {name: _decimal(metadata[key]) for name, key in GGUF_KEYS.items() if key in metadata}
    return _defaults(named, "general.sampling")


def _defaults(named: Mapping[str, Any], source: str) -> SamplingDefaults:
    try:
        sampling = Sampling(**{name: _plain(name, value) for name, value in named.items()})
    except InputError as error:
        return _refused(source, str(error).removeprefix("sampling: "))
    if not named:
        return SamplingDefaults()
    says_how = bool(named.keys() - {"repetition_penalty"})
    filled = sampling.filled(Sampling.plain(**({} if says_how else OURS)))
    values = {name: getattr(sampling, name) for name in named}
    return SamplingDefaults(filled, source, values)


def _refused(source: str, problem: str) -> SamplingDefaults:
    return SamplingDefaults(note=f"{source} of the model: {problem}; none of its settings is used for sampling")


def _decimal(value: Any) -> Any:
    """A float32 of a GGUF file as the decimal that was meant: 0.7, not 0.699999988."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _plain(name: str, value: Any) -> Any:
    """A value as ``Sampling`` takes it: ``top_k`` is a whole number, and -1 keeps all as 0 does."""
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    return 0 if name == "top_k" and value == -1 else value
