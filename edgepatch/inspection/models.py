"""Everything about a model: its facts, the patches that fit it, and what it needs of this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgepatch.doctor.machine import memory
from edgepatch.inspection.facts import ModelFacts
from edgepatch.inspection.fitting import Fitting, fitting_patches
from edgepatch.inspection.folder_facts import read_model_folder
from edgepatch.inspection.gguf_facts import read_gguf
from edgepatch.inspection.kinds import Kind
from edgepatch.inspection.memory import MemoryNeed, memory_need
from edgepatch.inspection.onnx_facts import read_onnx_folder
from edgepatch.store.reading import StoreReader

MODEL_KINDS = frozenset({Kind.GGUF_MODEL, Kind.MODEL_FOLDER, Kind.ONNX_FOLDER})


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
    if kind is Kind.GGUF_MODEL:
        facts = read_gguf(path)
    elif kind is Kind.ONNX_FOLDER:
        facts = read_onnx_folder(path)
    else:
        facts = read_model_folder(path, loads_libraries)
    fitting = fitting_patches(facts, StoreReader(store), loads_libraries)
    return ModelReport(facts, fitting, memory_need(facts, memory()["available_bytes"]))
