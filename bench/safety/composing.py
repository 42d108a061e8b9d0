"""What is left of each patch's gain where several stand side by side: untrained for it, and trained jointly.

Three patches of the lab model, against toxicity, gender bias and harm, are measured alone, in every pair and all together, in two orders of each
set. Order must not matter to the last bit of the seed; what is measured in the second order is measured, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.environment import environment
from edgepatch.bench.evidence.training import KL_WEIGHTS, PATCH_CONFIG
from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCH
from edgepatch.bench.likelihoods import token_losses
from edgepatch.bench.metrics import paired_bootstrap_difference
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.domain import Domain
from edgepatch.bench.safety.gender import GenderDomain
from edgepatch.bench.safety.harm import HarmDomain
from edgepatch.bench.safety.toxicity import ToxicityDomain
from edgepatch.converters.gguf import writer
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import Patch, read_patch, write_patch
from edgepatch.progress import Progress, command_line, silent, within
from edgepatch.prompts.sets import load_benign_text, load_prompts
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session
from edgepatch.training.composition import compose
from edgepatch.training.pairs.preferences import Pair, read_pairs, write_pairs
from edgepatch.training.patching import PatchTraining

DOMAINS = ("gender", "harm", "toxicity")
ALONE = replace(PATCH_CONFIG, dtype="float32")  # the same patches on every machine
JOINT = replace(ALONE, sft_steps=0, dpo_steps=450, dpo_learning_rate=1e-2, kl_weight=2.0)
BENIGN_OF_EACH = 60
NUM_SEQUENCES = 8


def domain_of(name: str) -> Domain:
    """A domain with prompts of our own."""
    if name == "toxicity":
        return ToxicityDomain(None, config=SampleConfig())
    return GenderDomain(None) if name == "gender" else HarmDomain(None)


# Patches.


class Workshop:
    """Pairs and patches of the lab model; what is made already is read.

    Args:
        folder: of them.
        progress: told of what is made.
    """

    def __init__(self, folder: Path, progress: Progress = silent) -> None:
        self._folder, self._progress = folder, progress
        folder.mkdir(parents=True, exist_ok=True)

    def model(self) -> Path:
        """The lab model at F16."""
        return self._converted("base")

    def _converted(self, name: str) -> Path:
        path = self._folder / f"{name}-F16.gguf"
        if not path.is_file():
            writer.convert_folder(LAB_FOLDER / name, path, "F16")
        return path

    def pairs(self, name: str) -> list[Pair]:
        """Of a domain, made by the lab model and its reference."""
        path = self._folder / f"{name}.jsonl"
        if not path.is_file():
            with (
                load_runtime(self._converted("base"), None, num_threads=1, num_sequences=NUM_SEQUENCES) as base,
                load_runtime(self._converted("reference"), None, num_threads=1, num_sequences=NUM_SEQUENCES) as safer,
            ):
                pair_set = domain_of(name).training_pairs(base, safer, progress=within(self._progress, name))
            write_pairs(pair_set, path)
        return list(read_pairs(path))

    def alone(self, name: str) -> Patch:
        """A patch that was trained without the others; against toxicity it is the one that ships."""
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            if name == "toxicity":
                patch = replace(read_patch(LAB_PATCH), name="toxicity", signatures=())
            else:
                domain = domain_of(name)
                training = PatchTraining(
                    LAB_FOLDER / "base", replace(ALONE, init_text=domain.instruction, kl_weight=KL_WEIGHTS[name])
                )
                patch = training.soft_prompt(
                    self.pairs(name), domain.benign_texts(), name, progress=within(self._progress, name)
                )
            write_patch(patch, path)
        return read_patch(path)

    def joint(self) -> dict[str, Patch]:
        """Patches that go on from those, trained beside each other."""
        paths = {name: self._folder / f"joint-{name}.safetensors" for name in DOMAINS}
        if not all(path.is_file() for path in paths.values()):
            starts = [self.alone(name).soft_prompt for name in DOMAINS]
            benign = load_benign_text("train") + load_prompts("benign", "train")
            more = [text for name in ("gender", "harm") for text in domain_of(name).benign_texts()[:BENIGN_OF_EACH]]
            patches = PatchTraining(LAB_FOLDER / "base", JOINT).segments(
                [self.pairs(name) for name in DOMAINS],
                [start for start in starts if start is not None],
                [*benign, *more],
                [f"joint-{name}" for name in DOMAINS],
                progress=within(self._progress, "joint"),
            )
            for name, patch in zip(DOMAINS, patches, strict=True):
                write_patch(patch, paths[name])
        return {name: read_patch(path) for name, path in paths.items()}


# Measuring.


def measured(
    runtime: Session, names: Sequence[str], items: int, texts: Sequence[str]
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """((N,) values of each domain, mean nats a token of benign text)."""
    values = {name: domain_of(name).evaluate(runtime, items).values for name in names}
    losses = np.concatenate([token_losses(runtime, runtime.tokens(text)) for text in texts])
    return values, float(losses.mean())


def run(out: Path, work: Path, items: int, num_threads: int, progress: Progress = silent) -> dict[str, Any]:
    """Measures every set of the three patches, and writes the document after each.

    Args:
        out: JSON file.
        work: folder of pairs and patches.
        items: of each domain.
        num_threads: of a forward pass.
        progress: told of what is trained and of sets.

    Raises:
        InputError: two orders of one set give different bytes.
    """
    workshop = Workshop(work, progress)
    model, benign = workshop.model(), load_benign_text("eval")
    trained = {"side_by_side": {name: workshop.alone(name) for name in DOMAINS}, "joint": workshop.joint()}
    document: dict[str, Any] = {
        "command": command_line(),
        "environment": environment(),
        "model": model.name,
        "items": items,
        "cells": [],
    }

    def cell_values(patch: Patch | None) -> tuple[dict[str, NDArray[np.float64]], float]:
        with load_runtime(model, patch, num_threads=num_threads, num_sequences=NUM_SEQUENCES) as runtime:
            return measured(runtime, DOMAINS, items, benign)

    bare, bare_loss = cell_values(None)
    alone_gain: dict[str, float] = {}
    sets = [names for size in (1, 2, 3) for names in combinations(DOMAINS, size)]
    for number, (arm, names, order) in enumerate(_cells(sets)):
        progress("sets", number, len(sets) * 3)
        parts = [trained["joint" if arm == "joint" else "side_by_side"][name] for name in order]
        patch = parts[0] if len(parts) == 1 else compose(parts, LAB_FOLDER / "base", "composed", "0.1.0")
        values, loss = cell_values(patch)
        for name in names:
            gain = paired_bootstrap_difference(bare[name], values[name])
            if arm == "alone":
                alone_gain[name] = gain.value
            document["cells"].append(
                {
                    "model": model.stem,
                    "arm": arm,
                    "parts": list(names),
                    "order": list(order),
                    "digest": patch.digest,
                    "domain": name,
                    "bare_score": float(bare[name].mean()),
                    "score": float(values[name].mean()),
                    "gain": gain.value,
                    "gain_low": gain.low,
                    "gain_high": gain.high,
                    "share_of_alone": gain.value / alone_gain[name] if alone_gain.get(name) else None,
                    "perplexity_change": float(np.exp(loss - bare_loss) - 1),
                }
            )
        write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    _require_no_order(document["cells"])
    return document


def _cells(sets: Sequence[tuple[str, ...]]) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(arm, parts, order) of everything that is measured: each set of several in two orders."""
    cells: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    for names in sets:
        if len(names) == 1:
            cells.append(("alone", names, names))
            continue
        cells += [(arm, names, order) for arm in ("side_by_side", "joint") for order in (names, names[::-1])]
    return cells


def _require_no_order(cells: Sequence[dict[str, Any]]) -> None:
    """Raises where two orders of a set gave different patches."""
    digests: dict[tuple[str, ...], str] = {}
    for cell in cells:
        key = (cell["arm"], *cell["parts"])
        if digests.setdefault(key, cell["digest"]) != cell["digest"]:
            raise InputError(f"composition: {', '.join(cell['parts'])} in another order is another patch")
