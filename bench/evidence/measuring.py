"""Measures the cells of the evidence matrix: opens every arm on every column, in several processes, and survives what fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgepatch.bench import likelihoods
from edgepatch.bench.arms import load_lora
from edgepatch.bench.columns import TORCH
from edgepatch.bench.evidence.cells import (
    LORA_ARMS,
    RNG_SEED,
    CellKey,
    EvidenceConfig,
    code_digest,
    digest_of,
    inputs_digest,
    is_core,
    item_ids,
    read_cell,
    write_cell,
)
from edgepatch.bench.safety import domain, margins, probes, retained
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.domain import Domain, Outcome
from edgepatch.bench.safety.margins import MarginPair
from edgepatch.decoding import noise
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.judges import refusals, scorers
from edgepatch.judges.classifiers import TransformersClassifier, load_judge
from edgepatch.judges.semantic import RULES
from edgepatch.patch.composition import METHOD
from edgepatch.patch.file import Patch, read_patch, write_patch
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.session import Session

if TYPE_CHECKING:
    from edgepatch.bench.safety.gender import GenderDomain
    from edgepatch.bench.safety.toxicity import ToxicityDomain

SAFETY, JUDGES = Path(domain.__file__).parent, Path(scorers.__file__).parent
COMMON_CODE = tuple(Path(str(module.__file__)) for module in (domain, likelihoods, scorers, refusals))
SOFT_ARM_FILE, ADAPTER_FOLDER = "patch.safetensors", "adapter"


@dataclass(frozen=True)
class Workplace:
    """Where a run reads and writes.

    Attributes:
        out: folder of models, trained arms, compositions and cells.
        data: folder of the public data sets, or ``None`` for the prompts that ship with edgepatch.
        patches: arm -> files of the patches that it is, side by side, where the user brings them.
    """

    out: Path
    data: Path | None
    patches: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    @property
    def cells(self) -> Path:
        """Folder of the raw files."""
        return self.out / "cells"

    @property
    def bases(self) -> Path:
        """Holds a folder for M and one for M', each with the files of all columns."""
        return self.out / "bases"

    def reason(self, error: Exception) -> str:
        """Why a cell failed, without the place where the folder lies."""
        text = str(error) if isinstance(error, EdgepatchError) else f"{type(error).__name__}: {error}"
        return text.replace(f"{self.out}/", "")

    def arm(self, domain: str, arm: str, rng_seed: int) -> Path:
        """What was trained: a patch file, or the folder of a LoRA adapter."""
        folder = self.out / "arms" / domain / f"{arm}-{rng_seed}"
        return folder / (ADAPTER_FOLDER if arm in LORA_ARMS else SOFT_ARM_FILE)

    def parts(self, key: CellKey) -> list[Path]:
        """The patches of a composition."""
        joint = self.out / "arms" / "joint" / f"patch-{key.rng_seed}"
        return [
            joint / f"{part}.safetensors" if key.arm == "joint" else self.arm(part, "patch", key.rng_seed)
            for part in key.parts
        ]

    def trained(self, key: CellKey) -> list[Path]:
        """Every trained file that a cell rests on; none for an untrained arm."""
        if key.parts:
            return self.parts(key)
        if key.rng_seed:
            return [self.arm(key.domain, key.arm, key.rng_seed)]
        return list(self.patches.get(key.arm, ()))

    def base(self, key: CellKey) -> Path:
        """Folder with the files of all columns of the model, M or M'."""
        return self.bases / ("reference" if key.arm == "reference" else "base")


# What a cell rests on.


def measure_code(key: CellKey) -> list[Path]:
    """Modules whose change makes a cell be measured again."""
    if key.measure == "retained":
        return [SAFETY / "retained.py", SAFETY / "harm.py", *COMMON_CODE]
    more = [SAFETY / "margins.py"] if key.measure == "margins" else [SAFETY / "probes.py"] if key.front else []
    drawn = [SAFETY / "continuations.py", Path(noise.__file__)] if key.domain == "toxicity" else []
    return [SAFETY / f"{key.domain}.py", *more, *drawn, *COMMON_CODE]


def bare_reference(key: CellKey, config: EvidenceConfig) -> CellKey:
    """The cell whose continuations the pairs of toxicity's margins are chosen from."""
    return CellKey("safety", key.domain, "bare", config.reference)


def margin_pairs(place: Workplace, key: CellKey, config: EvidenceConfig) -> list[MarginPair]:
    """The held-out pairs of a cell of margins, the same for every arm and column.

    Raises:
        InputError: they are continuations of the bare model, which are not measured yet.
    """
    raw = read_cell(place.cells, bare_reference(key, config)) if key.domain == "toxicity" else {}
    if raw is None or "failed" in raw:
        raise InputError(
            f"{key}: expected continuations of the bare model on {config.reference}, found none",
            hint="measure that cell first",
        )
    return margins.pairs_of(key.domain, place.data, raw, config.num_margin_pairs)


def cell_inputs(place: Workplace, key: CellKey, config: EvidenceConfig) -> dict[str, Any]:
    """Everything that decides a cell's result.

    Raises:
        InputError: the model was not converted, or the arm not trained.
    """
    manifest = place.data / "MANIFEST.json" if place.data else None
    return {
        "key": str(key),
        "sizes": asdict(config.sizes(key)) if key.measure == "retained" else config.num_items(key),
        "rng_seed": RNG_SEED,
        "model": digest_of(config.column_of(key).path(place.base(key))),
        "trained": [digest_of(path) for path in place.trained(key)],
        **({"composition": METHOD} if key.parts else {}),
        "code": [code_digest(path) for path in measure_code(key)],
        "judges": judge_digest(config),
        **({"harm_judge": config.harm_judge} if key.domain == "harm" and config.harm_judge != RULES else {}),
        **({"samples": asdict(config.samples)} if config.samples != SampleConfig() else {}),
        **({"pairs": digest_of_pairs(margin_pairs(place, key, config))} if key.measure == "margins" else {}),
        "data": digest_of(manifest) if manifest and manifest.is_file() else str(bool(place.data)),
    }


def judge_digest(config: EvidenceConfig) -> str:
    """Of who reports toxicity."""
    if Path(config.judge).is_dir():
        return f"{digest_of(Path(config.judge))} {' '.join(config.unsafe_labels)}"
    return digest_of(JUDGES) if config.judge in scorers.JUDGES else _shipped_digest(config.judge)


def _shipped_digest(name: str) -> str:
    judge = load_judge(name)
    return "" if isinstance(judge, TransformersClassifier) else judge.sha256


def digest_of_pairs(pairs: Sequence[MarginPair]) -> str:
    """Names the texts of held-out pairs."""
    return inputs_digest({"pairs": [asdict(pair) for pair in pairs]})


def due(place: Workplace, keys: Iterable[CellKey], config: EvidenceConfig) -> list[CellKey]:
    """Keys whose cell is missing, failed, or was measured from something else; what cannot be measured is written as failed."""
    waiting = []
    for key in keys:
        try:
            digest = inputs_digest(cell_inputs(place, key, config))
        except InputError as error:
            write_cell(place.cells, key, {"failed": place.reason(error)})
            continue
        raw = read_cell(place.cells, key)
        if raw is None or "failed" in raw or raw.get("inputs") != digest:
            waiting.append(key)
    return waiting


# Opening.


def composed_patch(place: Workplace, key: CellKey) -> Patch:
    """The composition of a cell's parts, made once and kept.

    Raises:
        InputError: a part is missing.
    """
    from edgepatch.training.composition import compose

    parts = [read_patch(path) for path in place.parts(key)]
    path = place.out / "compositions" / f"{key.arm}-{'-'.join(key.parts)}-{key.rng_seed}.safetensors"
    if path.is_file():
        kept = read_patch(path)
        if kept.parts == tuple(sorted(part.digest for part in parts)) and kept.training.get("method") == METHOD:
            return kept
    patch = compose(parts, TORCH.path(place.base(key)), f"lab-{'-'.join(key.parts)}", f"0.1.{key.rng_seed}")
    write_patch(patch, path)
    return patch


def open_runtime(place: Workplace, key: CellKey, config: EvidenceConfig) -> Session:
    """The model of a cell with its arm.

    Raises:
        EdgepatchError: a file is missing or damaged, or the arm does not fit the model.
    """
    column = config.column_of(key)
    options: dict[str, Any] = {}
    if column.runtime == "llamacpp":
        options = {
            "num_threads": config.num_threads,
            "num_sequences": config.num_sequences,
            "context_length": config.long_context if key.front else config.context_length,
            "kv_type": column.kv_type,
        }
        options |= {"seed_route": key.route} if key.route else {}
    elif column.runtime == "onnx":
        options = {"num_threads": config.num_threads}
    model = column.path(place.base(key))
    trained = place.trained(key)
    if key.arm in LORA_ARMS:
        return load_lora(column, model, trained[0], place.out / "lora", **options)
    from edgepatch.runtimes import load_runtime

    patch = composed_patch(place, key) if key.parts else [read_patch(path) for path in trained] or None
    return load_runtime(model, patch, **options)


# Measuring.


def domain_of(name: str, data: Path | None, config: EvidenceConfig, progress: Progress = silent) -> Domain:
    """A domain by its name; only toxicity samples so much of a prompt that it tells of each."""
    from edgepatch.bench.safety.gender import GenderDomain
    from edgepatch.bench.safety.harm import HarmDomain
    from edgepatch.bench.safety.toxicity import ToxicityDomain

    if name == "toxicity":
        judge, labels = config.judge, config.unsafe_labels
        return ToxicityDomain(data, config=config.samples, progress=progress, judge=judge, unsafe_labels=labels)
    return HarmDomain(data, judge=config.harm_judge) if name == "harm" else GenderDomain(data)


def safety_raw(outcome: Outcome, num_texts_kept: int) -> dict[str, Any]:
    """What is kept of a measured domain; texts of the first items alone."""
    ids = item_ids(outcome.items)
    scores = outcome.text_scores or [()] * len(outcome.items)
    rows = zip(outcome.items, outcome.texts, outcome.values, scores, strict=True)
    return {
        "ids": ids,
        "values": [float(value) for value in outcome.values],
        "figures": _figures(outcome),
        "failures": outcome.failures,
        **{name: values.tolist() for name, values in outcome.more.items()},
        "texts": [
            {"item": item, "texts": list(texts), "value": float(value), **({"scores": list(scored)} if scored else {})}
            for item, texts, value, scored in islice(rows, num_texts_kept)
        ],
    }


def retained_raw(figures: retained.Retained) -> dict[str, Any]:
    """What is kept of the figures that must stay."""
    refusal = figures.over_refusal
    return {
        "text_ids": item_ids(figures.texts),
        "nll": figures.nll.tolist(),
        "num_tokens": figures.num_tokens.tolist(),
        "fact_ids": item_ids(["\n".join(pair) for pair in figures.minimal_pairs]),
        "correct": figures.correct.astype(int).tolist(),
        "request_ids": item_ids(refusal.items) if refusal else [],
        "refused": refusal.values.tolist() if refusal else [],
        "figures": _figures(refusal) if refusal else {},
        "failures": refusal.failures if refusal else 0,
    }


def margins_raw(runtime: Session, pairs: Sequence[MarginPair], progress: Progress) -> dict[str, Any]:
    """How much likelier rejected texts are than chosen ones, in nats a token, pair by pair."""
    values = []
    for pair in pairs:
        values.append(margins.lean(runtime, pair))
        progress("pairs", len(values), len(pairs))
    ids = item_ids([f"{pair.prompt}\n{pair.chosen}\n{pair.rejected}" for pair in pairs])
    return {"ids": ids, "values": values, "figures": {}, "failures": 0, "texts": []}


def _figures(outcome: Outcome) -> dict[str, list[float]]:
    return {name: list(estimate) for name, estimate in outcome.figures.items()}


class Bench:
    """Measures cells, keeping the last model and every domain loaded.

    Args:
        place: where to read and write.
        config: how much is measured.
        progress: told of prompts within a cell.
    """

    def __init__(self, place: Workplace, config: EvidenceConfig, progress: Progress = silent) -> None:
        self._place, self._config, self._progress = place, config, progress
        self._domains: dict[tuple[str, bool], Domain] = {}
        self._opening: tuple[str, ...] = ()
        self._runtime: Session | None = None

    def run(self, key: CellKey) -> str:
        """Measures a cell and writes its raw file.

        Returns:
            Why it failed, or "".
        """
        began, worked = time.monotonic(), time.process_time()
        try:
            raw = {"inputs": inputs_digest(cell_inputs(self._place, key, self._config)), **self.measure(key)}
        except Exception as error:  # whatever goes wrong in one cell is that cell's result, not the end of the run
            raw = {"failed": self._place.reason(error)}
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - worked
        write_cell(self._place.cells, key, {**raw, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)})
        return str(raw.get("failed", ""))

    def measure(self, key: CellKey) -> dict[str, Any]:
        """The raw result of a cell.

        Raises:
            EdgepatchError: its model cannot be loaded, or does not answer.
        """
        runtime = self._open(key)
        instruction = self._domain(key.domain, key).instruction if key.arm == "safe_prompt" else ""
        if key.measure == "retained":
            return retained_raw(retained.measure(runtime, self._place.data, self._config.sizes(key), instruction))
        if key.measure == "margins":
            return margins_raw(runtime, margin_pairs(self._place, key, self._config), self._progress)
        domain, config = self._domain(key.domain, key), self._config
        if key.front:
            front = probes.Place.of(key.front)
            outcome = probes.outcome(cast("ToxicityDomain", domain), runtime, front, config.num_fronted, RNG_SEED)
            return safety_raw(outcome, config.num_texts_kept)
        outcome = domain.evaluate(runtime, config.num_items(key), instruction, RNG_SEED)
        if (
            key.domain == "gender"
            and key.measure == "safety"
            and is_core(key)
            and domain.data
            and config.num_sentence_pairs
        ):
            checks = cast("GenderDomain", domain).log_probability_checks(runtime, config.num_sentence_pairs)
            outcome.figures.update(checks)
        return safety_raw(outcome, self._config.num_texts_kept)

    def _domain(self, name: str, key: CellKey) -> Domain:
        own = key.measure == "examples"
        if (name, own) not in self._domains:
            self._domains[name, own] = domain_of(name, None if own else self._place.data, self._config, self._progress)
        return self._domains[name, own]

    def _open(self, key: CellKey) -> Session:
        if self._runtime is None or key.opening != self._opening:
            self.close()
            self._runtime, self._opening = open_runtime(self._place, key, self._config), key.opening
        return self._runtime

    def close(self) -> None:
        """Frees the loaded model."""
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None
