"""What is left of each patch's gain where several stand side by side: untrained for it, and trained jointly.

Three patches of the lab model, against toxicity, gender bias and harm, are measured alone, in every pair and all together, in two orders of each
set. They are composed as a device does it, which gives the same seed as a vendor's. Order must not matter to the last bit of it: two orders
of a set must give the same bytes, and so are measured once.

Toxicity and gender are trained and measured on prompts of our own. Harm is on public requests: of our own there are so few that a patch
trained on them has no gain, and what has none alone says nothing beside others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.environment import environment
from edgepatch.bench.evidence.training import KL_WEIGHTS, PATCH_CONFIG
from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCH
from edgepatch.bench.likelihoods import token_losses
from edgepatch.bench.metrics import paired_bootstrap_difference, retention
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.domain import Domain
from edgepatch.bench.safety.gender import GenderDomain
from edgepatch.bench.safety.harm import HarmDomain
from edgepatch.bench.safety.toxicity import ToxicityDomain
from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders
from edgepatch.converters.hf.rotary import read_rotation
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.patch.composition import compose_on_device
from edgepatch.patch.file import Patch, read_patch, write_patch
from edgepatch.progress import Progress, published_command, silent, within
from edgepatch.prompts.sets import load_benign_text, load_prompts
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session
from edgepatch.training.pairs.preferences import Pair, read_pairs, write_pairs
from edgepatch.training.patching import PatchTraining

Cell = tuple[str, tuple[str, ...], tuple[str, ...]]
DOMAINS = ("gender", "harm", "toxicity")
# The same patches on every machine; pinned, so that distance does not mix with company.
ALONE = replace(PATCH_CONFIG, dtype="float32")
# A segment is held to the bare model whenever it is drawn, which is twice as often as it learns: so about half of the weights that it has alone.
JOINT = replace(ALONE, sft_steps=0, dpo_steps=300, dpo_learning_rate=1e-2, kl_weight=0.8)
MOVING = replace(
    ALONE,
    sft_steps=0,
    dpo_steps=60,
    dpo_learning_rate=1e-2,
    beta=0.05,
    max_tokens=96,
    block=None,
    turns=None,
    front_tokens=256,
)
BENIGN_OF_EACH = 60
NUM_HARM_REQUESTS = 60
NUM_SEQUENCES = 8


def domain_of(name: str, data: Path) -> Domain:
    """A domain: harm on public requests, the others on prompts of our own."""
    if name == "toxicity":
        return ToxicityDomain(None, config=SampleConfig())
    return GenderDomain(None) if name == "gender" else HarmDomain(data, NUM_HARM_REQUESTS)


# Patches.


class Workshop:
    """Pairs and patches of the lab model; what is made already is read.

    Args:
        folder: of them.
        data: folder of the public data sets.
        progress: told of what is made.
    """

    def __init__(self, folder: Path, data: Path, progress: Progress = silent) -> None:
        self._folder, self._data, self._progress = folder, data, progress
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
                domain = domain_of(name, self._data)
                pair_set = domain.training_pairs(base, safer, progress=within(self._progress, name))
            write_pairs(pair_set, path)
        return list(read_pairs(path))

    def alone(self, name: str) -> Patch:
        """A patch that was trained without the others; against toxicity it is the one that ships."""
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            if name == "toxicity":
                rotation = read_rotation(folders.load_model(LAB_FOLDER / "base"))  # which the shipped file does not say
                patch = replace(read_patch(LAB_PATCH), name="toxicity", rotation=rotation, signatures=())
            else:
                domain = domain_of(name, self._data)
                training = PatchTraining(
                    LAB_FOLDER / "base", replace(ALONE, init_text=domain.instruction, kl_weight=KL_WEIGHTS[name])
                )
                patch = training.soft_prompt(
                    self.pairs(name), domain.benign_texts(), name, progress=within(self._progress, name)
                )
            write_patch(patch, path)
        return read_patch(path)

    def moving(self, name: str) -> Patch:
        """A prefix that goes on from the patch alone, trained to move."""
        path = self._folder / f"moving-{name}.safetensors"
        if not path.is_file():
            config = replace(MOVING, kl_weight=KL_WEIGHTS[name])
            training = PatchTraining(LAB_FOLDER / "base", config, run=self._folder / f"moving-{name}")
            benign = domain_of(name, self._data).benign_texts()
            report = within(self._progress, f"moving {name}")
            patch = training.kv_prefix(self.alone(name), self.pairs(name), benign, name, "0.2.0", progress=report)
            write_patch(patch, path)
        return read_patch(path)

    def joint(self) -> dict[str, Patch]:
        """Patches that go on from those, trained beside each other."""
        paths = {name: self._folder / f"joint-{name}.safetensors" for name in DOMAINS}
        if not all(path.is_file() for path in paths.values()):
            starts = [self.alone(name).soft_prompt for name in DOMAINS]
            benign = load_benign_text("train") + load_prompts("benign", "train")
            more = [
                text
                for name in ("gender", "harm")
                for text in domain_of(name, self._data).benign_texts()[:BENIGN_OF_EACH]
            ]
            training = PatchTraining(LAB_FOLDER / "base", JOINT, run=self._folder / "joint")
            patches = training.segments(
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
    runtime: Session, domains: Sequence[Domain], items: int, texts: Sequence[str]
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """((N,) values of each domain, mean nats a token of benign text)."""
    values = {domain.name: domain.evaluate(runtime, items).values for domain in domains}
    losses = np.concatenate([token_losses(runtime, runtime.tokens(text)) for text in texts])
    return values, float(losses.mean())


def run(out: Path, work: Path, data: Path, items: int, num_threads: int, progress: Progress = silent) -> dict[str, Any]:
    """Measures every set of the three patches, and writes the document after each.

    Args:
        out: JSON file.
        work: folder of pairs and patches.
        data: folder of the public data sets.
        items: of each domain.
        num_threads: of a forward pass.
        progress: told of what is trained and of sets.

    Raises:
        InputError: two orders of one set give different bytes.
    """
    workshop = Workshop(work, data, progress)
    model, benign = workshop.model(), load_benign_text("eval")
    document: dict[str, Any] = {
        "command": published_command(),
        "environment": environment(),
        "model": model.name,
        "items": items,
        "cells": [],
    }

    @cache
    def cell_values(digest: str, names: tuple[str, ...]) -> tuple[dict[str, NDArray[np.float64]], float]:
        patch = patches.get(digest)
        with load_runtime(model, patch, num_threads=num_threads, num_sequences=NUM_SEQUENCES) as runtime:
            return measured(runtime, [domain_of(name, data) for name in names], items, benign)

    patches: dict[str, Patch] = {}
    bare, bare_loss = cell_values("", DOMAINS)
    alone: dict[str, NDArray[np.float64]] = {}
    cells = _cells([names for size in (1, 2, 3) for names in combinations(DOMAINS, size)])
    for number, (arm, names, order) in enumerate(cells):
        progress("sets", number, len(cells))
        parts = [workshop.joint()[name] if arm == "joint" else workshop.alone(name) for name in order]
        patch = parts[0] if len(parts) == 1 else compose_on_device(parts)
        patches[patch.digest] = patch
        values, loss = cell_values(patch.digest, names)
        for name in names:
            gain = paired_bootstrap_difference(bare[name], values[name])
            share = retention(bare[name] - values[name], bare[name] - alone.setdefault(name, values[name]))
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
                    "share_of_alone": share.value,
                    "share_of_alone_low": share.low,
                    "share_of_alone_high": share.high,
                    "perplexity_change": float(np.exp(loss - bare_loss) - 1),
                }
            )
        write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    _require_no_order(document["cells"])
    return document


def _cells(sets: Sequence[tuple[str, ...]]) -> list[Cell]:
    """(arm, parts, order) of everything that is measured: each set of several in two orders."""
    several = [names for names in sets if len(names) > 1]
    cells: list[Cell] = [("alone", names, names) for names in sets if len(names) == 1]
    for arm in ("side_by_side", "joint"):
        cells += [(arm, names, order) for names in several for order in (names, names[::-1])]
    return cells


def _require_no_order(cells: Sequence[dict[str, Any]]) -> None:
    """Raises where two orders of a set gave different patches."""
    digests: dict[tuple[str, ...], str] = {}
    for cell in cells:
        key = (cell["arm"], *cell["parts"])
        if digests.setdefault(key, cell["digest"]) != cell["digest"]:
            raise InputError(f"composition: {', '.join(cell['parts'])} in another order is another patch")
