"""Which patches fit a model: those of this device's store, and patch files that lie beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgepatch.converters.weight_tables import read_table
from edgepatch.errors import EdgepatchError, MismatchError
from edgepatch.inspection.facts import ModelFacts
from edgepatch.patch.file import MAX_FILE_BYTES, METADATA_KEY, Patch, read_patch
from edgepatch.patch.sketches import Sketch, compare
from edgepatch.patch.templates import other_template
from edgepatch.store.reading import StoreReader, require_vouched, root_of
from edgepatch.store.records import State, TrustState

MAX_FILES_BESIDE = 64
"""So many files beside a model are looked at."""


@dataclass(frozen=True)
class FittingPatch:
    """A patch for a model.

    Attributes:
        name: of the patch.
        version: of the patch.
        digest: of the patch.
        source: "store", or the file's path.
        is_active: whether a runtime takes it when nobody names one.
        trust: who vouches for it, or why nobody does.
        problem: why it cannot be loaded after all; "" where nothing is known against it.
    """

    name: str
    version: str
    digest: str
    source: str
    is_active: bool
    trust: str
    problem: str


@dataclass(frozen=True)
class Fitting:
    """The patches that were made for a model.

    Attributes:
        patches: the active ones first.
        store: folder of the store.
        problem: why the store could not be read; "" where it could.
        are_weights_compared: whether each was compared with the weights themselves, as loading does.
    """

    patches: tuple[FittingPatch, ...]
    store: str
    problem: str
    are_weights_compared: bool


def fitting_patches(model: ModelFacts, store: StoreReader, loads_libraries: bool = False) -> Fitting:
    """The patches that were made for a model, each checked as loading it would.

    Args:
        model: the model.
        store: of this device.
        loads_libraries: whether the weights of a Transformers folder may be compared, which needs Transformers.
    """
    try:
        state, trust = store.read()
    except EdgepatchError as error:
        return Fitting((), str(store.folder), str(error), False)
    record = state.bases.get(model.base)
    digests = [digest for digest, stored in state.patches.items() if stored.base == model.base]
    ordered = sorted(digests, key=lambda digest: (record is None or digest not in record.active, digest))
    beside = [(path, patch) for path, patch in _beside(model) if patch.digest not in state.patches]
    sketch = _sketcher(model, loads_libraries) if ordered or beside else None
    candidates = [_stored(digest, store, state, trust, model, sketch) for digest in ordered]
    candidates += [_file(path, patch, trust, model, sketch) for path, patch in beside]
    return Fitting(tuple(candidates), str(store.folder), "", sketch is not None)


Sketcher = Callable[[Sketch], Sketch]


def _sketcher(model: ModelFacts, loads_libraries: bool) -> Sketcher | None:
    """Reads a model's own weights at the positions of a patch's sketch."""
    from edgepatch.converters import weight_sketches
    from edgepatch.converters.onnx import weights  # a model without patches does not wait for them

    if model.runtime == "llamacpp":
        return lambda like: weight_sketches.sketch_of_gguf(model.path, like)
    if model.runtime == "onnx":
        return lambda like: weights.sketch_of_onnx(model.path, like)
    return (lambda like: weight_sketches.sketch_of_folder(model.path, like)) if loads_libraries else None


def _stored(
    digest: str, store: StoreReader, state: State, trust: TrustState, model: ModelFacts, sketch: Sketcher | None
) -> FittingPatch:
    stored = state.patches[digest]
    is_active = digest in state.bases[stored.base].active
    signers, problem = f"not checked: {stored.unsigned}" if stored.unsigned else "", ""
    try:
        patch = store.load_stored(digest, state, trust)
        signers = signers or _signers(patch, trust)
        problem = _mismatch(patch, model, sketch)
    except EdgepatchError as error:
        signers, problem = "refused", str(error)
    return FittingPatch(stored.name, stored.version, digest, "store", is_active, signers, problem)


def _file(path: Path, patch: Patch, trust: TrustState, model: ModelFacts, sketch: Sketcher | None) -> FittingPatch:
    try:
        signers = _signers(patch, trust)
    except EdgepatchError as error:
        signers = f"not vouched for: {error}" if trust.root else "unknown: this device has no trust root"
    problem = _mismatch(patch, model, sketch)
    return FittingPatch(patch.name, patch.version, patch.digest, str(path), False, signers, problem)


def _signers(patch: Patch, trust: TrustState) -> str:
    keys = require_vouched(patch, trust)
    root = root_of(trust)
    assert root is not None  # require_vouched
    return "signed by " + ", ".join(sorted(root.called(key) for key in keys))


def _mismatch(patch: Patch, model: ModelFacts, sketch: Sketcher | None) -> str:
    """Why a patch for this base does not fit this template or these weights; "" where it does, or where they cannot be compared."""
    template = model.chat_template
    other = other_template(patch, template.digest if template else "", template.tools_digest if template else "")
    if other is not None:
        return (
            f"{other.name.replace('_', ' ')}: expected {other.expected[:12]}, found {other.actual[:12]} "
            "(--other-template takes it, by word)"
        )
    if sketch is None or patch.weight_sketch is None:
        return ""
    try:
        compare(patch.weight_sketch, sketch(patch.weight_sketch), model.quantization)
    except MismatchError as error:
        return "; ".join(f"{name}: expected {want}, found {have}" for name, (want, have) in error.differences.items())
    except EdgepatchError:
        return ""  # a graph that does not name its matrices, or a package that is missing: the runtime decides by the canary
    return ""


def _beside(model: ModelFacts) -> list[tuple[Path, Patch]]:
    """Patch files for this model in the folder where it lies."""
    folder = model.path.resolve().parent
    patches = []
    for path in sorted(folder.glob("*.safetensors"))[:MAX_FILES_BESIDE]:
        try:
            if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES and METADATA_KEY in read_table(path).metadata:
                patch = read_patch(path)
                patches += [(path, patch)] if patch.base == model.spec else []
        except (EdgepatchError, OSError):
            continue  # `show` of that file says what is wrong with it
    return patches
