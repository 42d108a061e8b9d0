"""Negative controls of the parity table: seeds that are wrong on purpose, each of which must be caught when it is loaded."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.bench.parity.models import Architecture
from edgepatch.bench.parity.rows import CONTEXT, Oracle
from edgepatch.converters.llamacpp.layout import Layout
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import Patch

Row = dict[str, Any]

QUANTIZATIONS = ("F32", "Q8_0", "Q4_K_M", "Q4_0")
THETA_FACTOR = 50
"""As far as Llama 3's rope theta is from Llama 2's."""

PLAIN: Row = {"kv_type": "f16", "flash_attention": True}
ROTATED: Row = {"kv_type": "q8_0", "flash_attention": True}


def control_rows(
    spec: Architecture, folder: Path, oracle: Oracle, quantizations: Sequence[str] = QUANTIZATIONS
) -> Iterator[Row]:
    """One row for each wrong seed: ``caught_by`` is "calibration", "canary", or ``None`` where it got through.

    Two kinds. A seed that is wrong in the patch must be caught in every quantization, also when the right patch was there before.
    A measurement that was tampered with leaves the canary alone to notice; at 4 bits it cannot tell every such error from those
    of the weights, so there the row is ``required`` no more.

    Args:
        spec: the architecture.
        folder: holds its Transformers folder and its GGUF files.
        oracle: with the right patch.
        quantizations: of the files.
    """
    foreign = _wrong_seeds(folder, oracle) if spec.stored_route else {}
    for quantization in quantizations:
        model = folder / f"{quantization}.gguf"
        required = not quantization.startswith("Q4")
        for control, setting, route, patch, replaced in _cases(spec, model, oracle.patch, foreign):
            row = {"architecture": spec.name, "quantization": quantization, "control": control} | setting
            with _replaced(replaced):
                yield row | {"required": required or not replaced} | _load(model, patch, route, setting)


def _cases(
    spec: Architecture, model: Path, right: Patch, foreign: Mapping[str, Patch]
) -> Iterator[tuple[str, Row, str, Patch, Row]]:
    """(name, setting, route, patch, replaced attributes of the calibration) of each control."""
    if spec.stored_route:
        plain, rotated = (_measured_layout(model, right, setting) for setting in (PLAIN, ROTATED))
        for control, patch in foreign.items():
            yield control, PLAIN, "stored", patch, {}
        swapped = replace(plain, rotates_neighbours=not plain.rotates_neighbours)
        yield "canary alone: no permutation, or one too many", PLAIN, "stored", right, {"layout": swapped}
        yield (
            "canary alone: no rotation",
            ROTATED,
            "stored",
            right,
            {"layout": replace(rotated, key_block=0, value_block=0)},
        )
    if spec.scaled_embeddings:
        factor = _unscaled(spec)
        yield (
            "canary alone: embeddings in another scale",
            PLAIN,
            "decoded",
            right,
            {"embedding_factor": lambda *_: factor},
        )


def _wrong_seeds(folder: Path, oracle: Oracle) -> dict[str, Patch]:
    """Patches with the right soft prompt and canary, and a seed that is not theirs."""
    right = oracle.patch.kv_seed
    assert right is not None  # stored_route
    order = np.random.default_rng(5).permutation(right.keys[0].shape[-1])
    return {
        "seed of another rope theta": replace(oracle.patch, kv_seed=_seed_of_another_theta(folder, oracle)),
        "keys in an unknown order": replace(
            oracle.patch, kv_seed=replace(right, keys=tuple(key[..., order] for key in right.keys))
        ),
        "layers exchanged": replace(oracle.patch, kv_seed=replace(right, keys=right.keys[::-1])),
    }


def _measured_layout(model: Path, patch: Patch, setting: Row) -> Layout:
    from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
    from edgepatch.runtimes.session import Session

    runtime = LlamaCppRuntime(model, patch, **setting, context_length=CONTEXT, seed_route="stored", num_threads=1)
    with Session(runtime, patch):
        layout = runtime.calibration.layout
    if layout is None:
        raise InputError(f"{model.name}: no layout was confirmed")
    return layout


def _load(model: Path, patch: Patch, route: str, setting: Row) -> Row:
    from edgepatch.runtimes import load_runtime

    try:
        load_runtime(model, patch, **setting, context_length=CONTEXT, seed_route=route, num_threads=1).close()
    except InputError as error:
        return {"caught_by": "calibration", "message": str(error)}
    except InactivePatchError as error:
        match = re.search(r"deviates by ([\d.]+)", str(error))
        return {"caught_by": "canary", "message": str(error), "canary": float(match[1]) if match else None}
    return {"caught_by": None, "message": ""}


def _seed_of_another_theta(folder: Path, oracle: Oracle) -> Any:
    from edgepatch.converters.hf import folders, seeds

    assert oracle.patch.soft_prompt is not None  # make_oracle
    other = folder / "other-theta"
    shutil.copytree(folder / "hf", other, dirs_exist_ok=True)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(_with_other_theta(config)), encoding="utf-8")
    return seeds.compute_kv_seed(folders.load_model(other), oracle.patch.soft_prompt)


def _with_other_theta(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: v * THETA_FACTOR if k == "rope_theta" else _with_other_theta(v) for k, v in value.items()}


def _unscaled(spec: Architecture) -> float:
    """What is wrong by sqrt(D): as it is for a graph that scales, scaled down for one that does not."""
    return 1.0 if spec.scaled_embeddings == "graph" else 1 / 16


@contextlib.contextmanager
def _replaced(attributes: Row) -> Iterator[None]:
    """Gives every calibration other attributes."""
    from edgepatch.runtimes.llamacpp.calibration import Calibration

    kept = {name: Calibration.__dict__[name] for name in attributes}
    for name, value in attributes.items():
        setattr(Calibration, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(Calibration, name, value)
