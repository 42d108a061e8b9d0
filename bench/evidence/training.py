"""Trains every arm of the evidence matrix: patches for full precision, for one quantization, for all of them, trained K/V, LoRA, compositions.

All arms of a domain read the same pairs in the same order with the same number of steps. What is done is kept: a killed run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgepatch.bench.evidence.cells import SINGLE_RUN_ARMS
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.safety.domain import Domain
from edgepatch.bench.safety.gender import GenderDomain
from edgepatch.bench.safety.harm import HarmDomain
from edgepatch.bench.safety.toxicity import ToxicityDomain
from edgepatch.patch.file import Patch, read_patch, write_patch
from edgepatch.progress import Progress, silent, within
from edgepatch.runtimes import load_runtime
from edgepatch.training.config import TrainConfig
from edgepatch.training.frozen.forward import BenignText
from edgepatch.training.lora import LoRATraining
from edgepatch.training.pairs.preferences import Pair, read_pairs, write_pairs
from edgepatch.training.patching import PatchTraining

BASE = LAB_FOLDER / "base"
RNG_SEEDS = (1, 2, 3)
QUANTIZED = {"patch_q4_k_m": ("Q4_K_M",), "patch_all": ("F16", "Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")}
LORA_RANKS = {"lora_r1": 1, "lora_r16": 16}
ARMS = ("patch", *QUANTIZED, "kv", *LORA_RANKS)
PATCH_FILE = "patch.safetensors"
ADAPTER_FOLDER = "adapter"

PATCH_CONFIG = TrainConfig(
    sft_steps=100,
    dpo_steps=250,
    dpo_learning_rate=2e-2,
    dtype="bfloat16",
    max_tokens=224,
    kl_batch_size=3,
    block=0,  # what the published matrix was measured with: pinned
    turns=False,
)
KV_CONFIG = replace(PATCH_CONFIG, sft_steps=0, dpo_steps=200, beta=0.02)
LORA_CONFIG = replace(PATCH_CONFIG, sft_learning_rate=1e-3, dpo_learning_rate=5e-4)
KL_WEIGHTS = {"toxicity": 1.25, "gender": 4.0, "harm": 2.0}
"""The same for all arms of a domain. Gender is so easily moved that at 1 the patch cost 3.4 % of perplexity for nothing."""


@dataclass(frozen=True)
class DomainData:
    """What all arms of a domain are trained on."""

    name: str
    instruction: str
    pairs: Sequence[Pair]
    benign_texts: Sequence[BenignText]

    @classmethod
    def of(cls, domain: Domain, pairs: Sequence[Pair]) -> DomainData:
        """The domain's own texts with given pairs."""
        return cls(domain.name, domain.instruction, pairs, domain.benign_texts())


def train_arm(
    data: DomainData,
    arm: str,
    rng_seed: int,
    out: Path,
    quantized: Mapping[str, Path],
    progress: Progress = silent,
) -> Path:
    """Trains one arm where it is missing.

    Args:
        data: of the domain.
        arm: one of ``ARMS``.
        rng_seed: of training.
        out: the arms' folder; the result lies in ``<domain>/<arm>-<rng_seed>``.
        quantized: GGUF type -> file of the base.

    Returns:
        The arm's folder.
    """
    folder = out / data.name / f"{arm}-{rng_seed}"
    if is_done(folder):
        return folder
    report = within(progress, f"{data.name} {arm}-{rng_seed}")
    name = f"lab-{data.name}-{arm.replace('_', '-')}"
    if arm in LORA_RANKS:
        _train_lora(data, LORA_RANKS[arm], rng_seed, folder, report)
        return folder
    if arm == "kv":
        start = read_patch(out / data.name / f"patch-{rng_seed}" / PATCH_FILE)
        training = PatchTraining(BASE, _config(KV_CONFIG, data, rng_seed), run=folder / "run", progress=report)
        patch = training.kv_prefix(start, data.pairs, data.benign_texts, name, progress=report)
    else:
        weights = [quantized[kind] for kind in QUANTIZED.get(arm, ())]
        training = PatchTraining(BASE, _config(PATCH_CONFIG, data, rng_seed), weights, folder / "run", progress=report)
        patch = training.soft_prompt(data.pairs, data.benign_texts, name, progress=report)
    write_patch(patch, folder / PATCH_FILE)
    return folder


def is_done(folder: Path) -> bool:
    """Whether an arm is trained."""
    return (folder / PATCH_FILE).is_file() or (folder / ADAPTER_FOLDER / "adapter_model.safetensors").is_file()


def _config(config: TrainConfig, data: DomainData, rng_seed: int) -> TrainConfig:
    return replace(config, init_text=data.instruction, rng_seed=rng_seed, kl_weight=KL_WEIGHTS[data.name])


def _train_lora(data: DomainData, rank: int, rng_seed: int, folder: Path, report: Progress) -> None:
    training = LoRATraining(BASE, _config(LORA_CONFIG, data, rng_seed), rank, folder / "run")
    training.train(data.pairs, data.benign_texts, folder / ADAPTER_FOLDER, report)


def train_joint(
    domains: Sequence[DomainData], rng_seed: int, out: Path, progress: Progress = silent
) -> dict[str, Path]:
    """Order-free segments, one a domain, trained together from where the independent patches ended (successive, then joint).

    Args:
        domains: two or more, each with a trained arm "patch".
        rng_seed: of training; the independent patches of the same seed are the start.
        out: the arms' folder; the result lies in ``joint/patch-<rng_seed>``.

    Returns:
        Domain -> its patch.
    """
    folder = out / "joint" / f"patch-{rng_seed}"
    paths = {d.name: folder / f"{d.name}.safetensors" for d in domains}
    if all(path.is_file() for path in paths.values()):
        return paths
    starts = [_soft_prompt(read_patch(out / d.name / f"patch-{rng_seed}" / PATCH_FILE)) for d in domains]
    benign = [text for d in domains for text in d.benign_texts]
    config = replace(
        PATCH_CONFIG,
        sft_steps=0,
        dpo_steps=150 * len(domains),
        dpo_learning_rate=1e-2,
        kl_weight=2.0,
        rng_seed=rng_seed,
    )
    report = within(progress, f"joint-{rng_seed}")
    training = PatchTraining(BASE, config, run=folder / "run", progress=report)
    patches = training.segments(
        [d.pairs for d in domains],
        starts,
        benign,
        [f"lab-{d.name}-joint" for d in domains],
        progress=report,
    )
    for patch, path in zip(patches, paths.values(), strict=True):
        write_patch(patch, path)
    return paths


def _soft_prompt(patch: Patch) -> Any:
    assert patch.soft_prompt is not None  # the arm "patch" trains one
    return patch.soft_prompt


def domain_pairs(domain: Domain, bases: Path, path: Path, progress: Progress = silent) -> list[Pair]:
    """The domain's pairs, sampled from M and M' at F16 where the file is missing."""
    if not path.is_file():
        unsafe, safer = bases / "base" / "F16.gguf", bases / "reference" / "F16.gguf"
        with load_runtime(unsafe, None, num_threads=1) as base, load_runtime(safer, None, num_threads=1) as reference:
            pairs = domain.training_pairs(base, reference, progress=within(progress, domain.name))
        write_pairs(pairs, path)
    return read_pairs(path)


def train_missing(out: Path, data: Path | None, progress: Progress = silent) -> None:
    """Pairs, then every arm of every domain and random seed, then the order-free compositions, where they are missing.

    Args:
        out: holds ``bases`` (converted models); gets ``pairs`` and ``arms``.
        data: folder of the public data sets; ``None`` takes the prompts that ship with edgepatch.
        progress: told of every step.
    """
    quantized = {kind: out / "bases" / "base" / f"{kind}.gguf" for kinds in QUANTIZED.values() for kind in kinds}
    domains = []
    for domain in (ToxicityDomain(data), GenderDomain(data), HarmDomain(data)):
        pairs = domain_pairs(domain, out / "bases", out / "pairs" / f"{domain.name}.jsonl", progress)
        domains.append(DomainData.of(domain, pairs))
    for rng_seed in RNG_SEEDS:
        for each in domains:
            for arm in ARMS if rng_seed == RNG_SEEDS[0] else [arm for arm in ARMS if arm not in SINGLE_RUN_ARMS]:
                train_arm(each, arm, rng_seed, out / "arms", quantized, progress)
        train_joint(domains, rng_seed, out / "arms", progress)
