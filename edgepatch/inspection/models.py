"""Everything about a model: its facts, the patches that fit it, and what it needs of this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.hf.specs import read_json
from edgepatch.doctor.machine import memory
from edgepatch.inspection.facts import ModelFacts
from edgepatch.inspection.fitting import Fitting, fitting_patches
from edgepatch.inspection.folder_facts import read_model_folder, read_origin
from edgepatch.inspection.gguf_facts import origin_of, read_gguf
from edgepatch.inspection.kinds import Kind
from edgepatch.inspection.memory import MemoryNeed, memory_need
from edgepatch.inspection.onnx_facts import read_onnx_folder
from edgepatch.runtimes import runtime_name
from edgepatch.store.reading import StoreReader

OF_RUNTIME = {"llamacpp": Kind.GGUF_MODEL, "onnx": Kind.ONNX_FOLDER, "torch": Kind.MODEL_FOLDER}
MODEL_KINDS = frozenset(OF_RUNTIME.values())


@dataclass(frozen=True)
class ModelReport:
    """A model on this machine.

    Attributes:
        facts: of the model itself.
        fitting: patches for it.
        memory: that it needs.
    """

    facts: ModelFacts
    fitting: Fitting
    memory: MemoryNeed

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        need = self.memory
        return {
            **self.facts.as_dict(),
            "fitting": asdict(self.fitting),
            "memory": {**asdict(need), "total_bytes": need.total_bytes, "fits": need.fits},
        }


def kind_of_model(path: Path) -> Kind:
    """Which of ``MODEL_KINDS`` a model is.

    Raises:
        InputError: nothing is there, or it is no model.
    """
    return OF_RUNTIME[runtime_name(path)]


def read_facts(path: Path, kind: Kind, loads_libraries: bool = False) -> ModelFacts:
    """Facts of a model; arguments and errors as for ``examine_model``."""
    if kind is Kind.GGUF_MODEL:
        return read_gguf(path)
    return read_onnx_folder(path) if kind is Kind.ONNX_FOLDER else read_model_folder(path, loads_libraries)


def model_name(path: Path) -> str:
    """What a model calls itself, "" where it does not say; neither weights nor a library are read.

    Raises:
        InputError: it is no model, or its header or config is damaged.
    """
    if kind_of_model(path) is Kind.GGUF_MODEL:
        return origin_of(read_header(path).metadata).name
    return read_origin(path, read_json(path / "config.json")).name


def examine_model(path: Path, kind: Kind, store: Path | None = None, loads_libraries: bool = False) -> ModelReport:
    """Facts, fitting patches and need of memory of a model.

    Args:
        path: file or folder.
        kind: one of ``MODEL_KINDS``.
        store: folder of the store; ``None`` takes that of the device.
        loads_libraries: whether Transformers may be loaded, for what a folder's config leaves open and to compare weights.

    Raises:
        InputError: a file is missing, truncated or damaged.
    """
    facts = read_facts(path, kind, loads_libraries)
    fitting = fitting_patches(facts, StoreReader(store), loads_libraries)
    return ModelReport(facts, fitting, memory_need(facts, memory()["available_bytes"]))
