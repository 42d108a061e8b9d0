"""What the evidence matrix consists of: keys of its cells, the order they are measured in, one raw file each."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from edgepatch.bench.columns import Column, columns
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.retained import Sizes
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically

DOMAINS = ("toxicity", "gender", "harm")
MEASURES = ("safety", "retained", "examples")
"""Of the matrix; a model of the user's own also has "margins", and "safety" behind other text."""
ROUTES = ("stored", "decoded")
UNTRAINED_ARMS = ("bare", "safe_prompt", "reference")
LORA_ARMS = ("lora_r1", "lora_r16")
SOFT_PROMPT_ARMS = ("patch", "patch_q4_k_m", "patch_all")
ARMS = (*UNTRAINED_ARMS, *LORA_ARMS, *SOFT_PROMPT_ARMS, "kv")
CORE_ARMS = ("bare", *SOFT_PROMPT_ARMS, "kv", "lora_r16")
DECODED_ARMS, DECODED_COLUMNS = ("patch",), ("llamacpp Q8_0", "llamacpp Q4_K_M", "llamacpp Q2_K")
"""Measured on both routes of the seed."""
SINGLE_RUN_ARMS = ("lora_r1",)
"""Trained once: nothing is claimed against them."""
COMPOSED_ARMS = ("composed", "joint")
"""Patches that stand side by side: trained apart, and trained together."""

REFERENCE_COLUMN = "torch F32"
CORE_COLUMNS = (REFERENCE_COLUMN, "llamacpp F16", "llamacpp Q8_0", "llamacpp Q4_K_M")
GOAL_COLUMNS = (REFERENCE_COLUMN, "llamacpp Q8_0", "llamacpp Q4_K_M")
COMPOSITION_COLUMNS = ("llamacpp Q4_K_M",)
EXAMPLE_COLUMNS = (REFERENCE_COLUMN, "llamacpp Q4_K_M")
SHARED = "all"
"""In place of a domain: what is the same for every domain, as the bare model's perplexity is."""

RNG_SEED = 1
"""Of the sampling: the same in every cell, so that all comparisons are paired."""
DEFAULT_ITEMS = (200, 100, 25)
"""Prompts of a core cell, a composition, any other cell."""

DOCUMENTED = ("items", "retained", "examples", "rng_seeds", "composition")
"""Settings that a document names."""


@dataclass(frozen=True)
class CellKey:
    """One measurement.

    Attributes:
        measure: "safety", "retained" (what must stay as it was), "examples" (safety on the prompts that ship with edgepatch) or "margins"
            (how much likelier chosen texts are than rejected ones).
        domain: what is measured, and what the arm was trained for; ``SHARED`` where the latter does not matter.
        arm: one of ``ARMS`` or ``COMPOSED_ARMS``.
        column: name of a column.
        route: of the seed, "stored" or "decoded"; "" where there is no choice.
        rng_seed: of the training; 0 where this run trains nothing, as for a patch that the user brings.
        parts: domains of the patches that an arm is composed of, in the order of ``DOMAINS``; no order means anything.
        front: what stands in front of the prompts, as ``bench.safety.length`` names places; "" for nothing.
    """

    measure: str
    domain: str
    arm: str
    column: str
    route: str = ""
    rng_seed: int = 0
    parts: tuple[str, ...] = ()
    front: str = ""

    @property
    def opening(self) -> tuple[str, ...]:
        """Keys with the same opening are measured on one loaded model."""
        trained_for = "" if not self.rng_seed or self.parts else self.domain
        model = "bare" if self.arm == "safe_prompt" else self.arm
        room = "long" if self.front else ""
        return (model, trained_for, self.column, self.route, str(self.rng_seed), room, *self.parts)

    @property
    def path(self) -> Path:
        """Of the raw file, under the folder of cells."""
        arm = "-".join([self.arm, *self.parts])
        name = "-".join(
            part for part in (self.column.replace(" ", "-"), self.route, str(self.rng_seed), self.front) if part
        )
        return Path(self.measure, self.domain, arm, f"{name}.json")

    def __str__(self) -> str:
        words = (self.measure, self.domain, self.front, self.arm, "+".join(self.parts), self.column, self.route)
        return " ".join(word for word in words if word) + (f" #{self.rng_seed}" if self.rng_seed else "")


@dataclass(frozen=True)
class EvidenceConfig:
    """What is measured and how much of it.

    Attributes:
        items: domain -> prompts of (a core cell, a composition, any other cell); each divides the one before, so that the prompts
            at even distances of the smaller are among those of the larger.
        retained: how much of what must stay, in a core cell and in any other.
        examples: prompts of the cells whose texts are shown in public.
        rng_seeds: of the training runs.
        samples: of each prompt, where continuations are measured.
        measures, routes: those that are measured.
        domains, columns, arms: those that are measured; no column means all.
        composition: whether compositions are measured.
        num_sequences, context_length: of llama.cpp; ``None`` for the model's own length.
        num_texts_kept: items of a cell whose texts are kept in its raw file.
        known_columns: those that ``columns`` may name.
        reference: name of the column that retention is told against.
        num_threads: of a process.
        num_sentence_pairs: of WinoBias and of CrowS-Pairs, in core cells of gender.
        num_margin_pairs: the most held-out pairs of a domain.
        num_fronted: prompts that are measured behind other text.
        judge, unsafe_labels: who reports toxicity, as ``load_judge`` takes it.
        harm_judge: who reports harm, as ``load_answer_judge`` takes it.
        long_context: as ``context_length``, for prompts behind other text.
    """

    items: Mapping[str, tuple[int, int, int]] = field(default_factory=lambda: dict.fromkeys(DOMAINS, DEFAULT_ITEMS))
    retained: tuple[Sizes, Sizes] = (Sizes(24, 3, 60), Sizes(8, 1, 20))
    examples: int = 12
    rng_seeds: tuple[int, ...] = (1, 2, 3)
    domains: tuple[str, ...] = DOMAINS
    columns: tuple[str, ...] = ()
    arms: tuple[str, ...] = ARMS
    composition: bool = True
    samples: SampleConfig = SampleConfig()
    measures: tuple[str, ...] = MEASURES
    routes: tuple[str, ...] = ROUTES
    num_sequences: int = 25
    context_length: int | None = 512
    num_texts_kept: int = 20
    known_columns: tuple[Column, ...] = field(default_factory=lambda: tuple(columns()))
    reference: str = REFERENCE_COLUMN
    num_threads: int = 1
    num_sentence_pairs: int = 100
    num_margin_pairs: int = 300
    num_fronted: int = 40
    judge: str = "report"
    harm_judge: str = "rules"
    unsafe_labels: tuple[str, ...] = ()
    long_context: int | None = None

    def __post_init__(self) -> None:
        names = {"domain": DOMAINS, "arm": ARMS, "column": tuple(column.name for column in self.known_columns)}
        for kind, chosen in (("domain", self.domains), ("arm", self.arms), ("column", self.columns)):
            if unknown := [name for name in chosen if name not in names[kind]]:
                raise InputError(f"{kind}: there is no {unknown[0]!r}", hint=f"one of {', '.join(names[kind])}")
        for domain, counts in self.items.items():
            for more, fewer in pairwise(counts):
                if fewer < 1 or more % fewer:
                    raise InputError(f"{domain}: expected a number of prompts that divides {more}, found {fewer}")

    def chosen_columns(self) -> list[Column]:
        """Those that are measured."""
        return [column for column in self.known_columns if not self.columns or column.name in self.columns]

    def column_of(self, key: CellKey) -> Column:
        """The column of a cell."""
        return next(column for column in self.known_columns if column.name == key.column)

    def num_items(self, key: CellKey) -> int:
        """Prompts of a cell."""
        if key.measure == "examples":
            return self.examples
        return self.items[key.domain][1 if key.parts else 0 if is_core(key) else 2]

    def sizes(self, key: CellKey) -> Sizes:
        """How much of what must stay a cell holds."""
        return self.retained[not is_core(key)]

    def as_dict(self) -> dict[str, Any]:
        """For the document."""
        return {name: value for name, value in asdict(self).items() if name in DOCUMENTED}


def is_core(key: CellKey) -> bool:
    """Whether a cell is one of those that the claims rest on."""
    return key.column in CORE_COLUMNS and key.arm in CORE_ARMS and key.route != "decoded"


def _routes(arm: str, column: Column, config: EvidenceConfig) -> tuple[str, ...]:
    if column.runtime != "llamacpp" or arm not in (*SOFT_PROMPT_ARMS, "kv"):
        return ("",)
    routes = ROUTES if arm in DECODED_ARMS and column.name in DECODED_COLUMNS else ROUTES[:1]
    return tuple(route for route in routes if route in config.routes)


def _runs(arm: str, config: EvidenceConfig) -> tuple[int, ...]:
    if arm in UNTRAINED_ARMS:
        return (0,)
    return config.rng_seeds[:1] if arm in SINGLE_RUN_ARMS else config.rng_seeds


def _matrix(config: EvidenceConfig) -> Iterable[CellKey]:
    """Every arm on every column."""
    for arm in config.arms:
        for column in config.chosen_columns():
            for domain in config.domains:
                for route in _routes(arm, column, config):
                    for rng_seed in _runs(arm, config):
                        yield CellKey("safety", domain, arm, column.name, route, rng_seed)
                        trained_for = SHARED if arm in ("bare", "reference") else domain
                        yield CellKey("retained", trained_for, arm, column.name, route, rng_seed)
                        if (
                            arm in ("bare", "patch")
                            and column.name in EXAMPLE_COLUMNS
                            and rng_seed < 2
                            and route != "decoded"
                        ):
                            yield CellKey("examples", domain, arm, column.name, route, rng_seed)


def sets(domains: Sequence[str]) -> list[tuple[str, ...]]:
    """Every two or more domains."""
    return [parts for count in range(2, len(domains) + 1) for parts in combinations(domains, count)]


def _compositions(config: EvidenceConfig) -> Iterable[CellKey]:
    for column in COMPOSITION_COLUMNS:
        if config.columns and column not in config.columns:
            continue
        for arm in COMPOSED_ARMS:
            for parts in sets(config.domains):
                for rng_seed in config.rng_seeds:
                    for domain in parts:
                        yield CellKey("safety", domain, arm, column, "stored", rng_seed, parts)
                    yield CellKey("retained", SHARED, arm, column, "stored", rng_seed, parts)


def _tier(key: CellKey) -> int:
    """Earlier tiers give a useful part of the matrix before the whole is there."""
    if is_core(key):
        return 0 if key.arm in ("bare", "patch") else 1
    if key.parts:
        return 2
    return 4 if key.arm in LORA_ARMS and (key.arm in SINGLE_RUN_ARMS or key.column.startswith("onnx")) else 3


def plan(config: EvidenceConfig) -> list[CellKey]:
    """Every cell, once, in the order of measuring: what the claims rest on comes first, keys of one opening stand together."""
    keys = dict.fromkeys(key for key in _matrix(config) if key.measure in config.measures)
    if config.composition:
        keys.update(dict.fromkeys(_compositions(config)))
    first: dict[tuple[object, ...], int] = {}

    def together(key: CellKey) -> tuple[object, ...]:
        return (_tier(key), *key.opening)

    for place, key in enumerate(keys):
        first.setdefault(together(key), place)
    return sorted(keys, key=lambda key: (_tier(key), first[together(key)]))


def groups(keys: Iterable[CellKey]) -> list[list[CellKey]]:
    """Runs of keys with one opening."""
    runs: list[list[CellKey]] = []
    for key in keys:
        if runs and runs[-1][0].opening == key.opening:
            runs[-1].append(key)
        else:
            runs.append([key])
    return runs


# What a cell was measured from, and its raw file.


@lru_cache(maxsize=512)
def _digest_at(path: Path, modified_ns: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of a folder's files.

    Raises:
        InputError: nothing is there.
    """
    if path.is_dir():
        files = [(str(p.relative_to(path)), digest_of(p)) for p in sorted(path.rglob("*")) if p.is_file()]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()
    try:
        status = path.stat()
        return _digest_at(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


@lru_cache(maxsize=64)
def code_digest(path: Path) -> str:
    """Of a module's code; comments and layout do not count."""
    return hashlib.sha256(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode()).hexdigest()


def inputs_digest(inputs: Mapping[str, object]) -> str:
    """Names everything that a cell depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def item_ids(items: Sequence[str]) -> list[str]:
    """A name for every item that tells nothing of its text; an item that stands there twice gets two."""
    seen: dict[str, int] = {}
    names = []
    for item in items:
        name = hashlib.sha256(item.encode()).hexdigest()[:16]
        seen[name] = seen.get(name, 0) + 1
        names.append(f"{name}.{seen[name]}")
    return names


def read_cell(cells: Path, key: CellKey) -> dict[str, Any] | None:
    """The raw result of a cell; ``None`` where there is none that can be read."""
    try:
        raw = json.loads((cells / key.path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def write_cell(cells: Path, key: CellKey, raw: Mapping[str, Any]) -> None:
    """Writes the raw result of a cell whole or not at all.

    Raises:
        InputError: it holds NaN, or the folder cannot be written.
    """
    try:
        text = json.dumps({"key": asdict(key), **raw}, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{key}: expected finite values: {error}") from None
    write_atomically(cells / key.path, text.encode())
