"""The main job on the lab model: pairs, training, conversion, seeding and the measured table, in one command."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from edgepatch.bench import datasets, matrix
from edgepatch.bench.environment import environment
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.matrix import MatrixConfig, Variant
from edgepatch.bench.report.matrix_page import write_report
from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.errors import InputError
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.patch.file import Patch, write_atomically, write_patch
from edgepatch.progress import Progress, silent, stage, within
from edgepatch.prompts.sets import evenly, load_benign_text, load_prompts
from edgepatch.runtimes.reference import TorchRuntime
from edgepatch.training.config import History, TrainConfig
from edgepatch.training.pairs.preferences import PairConfig, build_pairs, write_pairs
from edgepatch.training.patching import train_patch

GGUF_TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
ONNX_PRECISIONS = {"fp32": "F32", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults end within ten minutes on two cores.

    Attributes:
        num_training_prompts, num_prompts: prompts for pairs and for the table.
        num_benign_texts: for perplexity.
        pairs, train, matrix: settings of the three stages.
    """

    num_training_prompts: int = 220
    num_prompts: int = 64
    num_benign_texts: int = 30
    pairs: PairConfig = PairConfig()
    train: TrainConfig = TrainConfig(dtype="float32")  # the same table on every machine
    matrix: MatrixConfig = MatrixConfig(
        num_threads=1
    )  # more threads only get into each other's way in so small a model


@dataclass(frozen=True)
class Texts:
    """What the demo reads: prompts for pairs and for the table, benign text for training and for perplexity."""

    source: str
    training_prompts: list[str]
    prompts: list[str]
    benign_training: list[str]
    benign: list[str]


def choose_texts(data: Path | None, config: DemoConfig) -> Texts:
    """Our own prompts, or RealToxicityPrompts' challenging ones (trained on below index 700) where a data folder is named."""
    benign_training = load_benign_text("train") + load_prompts("benign", "train")
    benign = load_benign_text("eval")
    if data is None:
        source, training, prompts = "own prompts", load_prompts("toxic", "train"), load_prompts("toxic", "eval")
    else:
        rows = [c.prompt for c in datasets.rtp_challenging(data)]
        source = f"RealToxicityPrompts challenging, index >= {datasets.RTP_SPLIT}"
        training, prompts = rows[: datasets.RTP_SPLIT], rows[datasets.RTP_SPLIT :]
        benign_training += datasets.wikitext_paragraphs(data, "valid", 200)
        benign = datasets.wikitext_paragraphs(data, "test", config.num_benign_texts)
    return Texts(
        source,
        evenly(training, config.num_training_prompts),
        evenly(prompts, config.num_prompts),
        benign_training,
        benign[: config.num_benign_texts],
    )


def convert_base(base: Path, out: Path, progress: Progress = silent) -> list[Variant]:
    """Every form of the base model that the table compares; full precision first."""
    total = 1 + len(GGUF_TYPES) + len(ONNX_PRECISIONS)
    variants = [Variant("torch", "F32", base)]
    full = out / "base-F16.gguf"
    for kind in GGUF_TYPES:
        path = out / f"base-{kind}.gguf"
        progress("convert", len(variants), total)
        if kind == "F16":
            writer.convert_folder(base, path, "F16", within(progress, kind))
        else:
            writer.quantize(full, path, kind, progress=within(progress, kind))
        variants.append(Variant("llamacpp", kind, path))
    for precision, kind in ONNX_PRECISIONS.items():
        folder = out / f"base-onnx-{precision}"
        progress("convert", len(variants), total)
        onnx.export(base, folder, cast("onnx.Precision", precision), progress=within(progress, "onnx"))
        variants.append(Variant("onnx", kind, folder))
    progress("convert", total, total)
    return variants


def train_lab_patch(
    lab: Path, texts: Texts, config: DemoConfig, out: Path, progress: Progress = silent
) -> tuple[Patch, History]:
    """Pairs from M and M', then the patch; writes ``pairs.jsonl`` into ``out``."""
    score = ToxicityScorer.load("filter").score
    with ExitStack() as stack:
        with stage(progress, "load models"):
            base, reference = (stack.enter_context(TorchRuntime(lab / name)) for name in ("base", "reference"))
        pairs = build_pairs(base, reference, texts.training_prompts, score, config.pairs, progress)
    write_pairs(pairs, out / "pairs.jsonl")
    return train_patch(lab / "base", pairs, texts.benign_training, config.train, "lab-detox", progress=progress)


def run_demo(
    out: Path,
    data: Path | None = None,
    lab: Path = LAB_FOLDER,
    config: DemoConfig | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Any], Path]:
    """Trains a patch for the lab model and measures it on every runtime and quantization.

    Args:
        out: folder for the pairs, the patch, the converted models, ``results.json`` and ``report.html``.
        data: data folder; ``None`` takes the prompts that ship with edgepatch.
        lab: folder with ``base`` and ``reference``.
        config: sizes.
        progress: told of every step of a stage.

    Returns:
        The results document and the path of the HTML report.

    Raises:
        InputError: the lab model is missing, or ``out`` cannot be written.
    """
    config = config or DemoConfig()
    if not (lab / "base" / "config.json").is_file():
        raise InputError(
            f"no lab model in {lab}", hint="run the demo from a source checkout, or rebuild it with `make lab`"
        )
    began = time.monotonic()
    write_atomically(out / ".writable", b"")  # a folder that cannot be written shows before minutes of work, not after
    (out / ".writable").unlink()
    texts = choose_texts(data, config)
    patch, history = train_lab_patch(lab, texts, config, out, progress)
    variants = convert_base(lab / "base", out, progress)
    measured = matrix.run_matrix(
        variants, patch, texts.prompts, texts.benign, ToxicityScorer.load("report").score, config.matrix, progress
    )
    patch = replace(patch, evaluation={"source": texts.source, "retention": measured["retention"]})
    digest = write_patch(patch, out / f"{patch.name}-{patch.version}.safetensors")
    document = {
        "command": " ".join(["edgepatch", *sys.argv[1:]]) if sys.argv[0].endswith("edgepatch") else "run_demo",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "environment": environment(),
        "base": folders.read_spec(lab / "base").as_dict(),
        "patch": {"name": patch.name, "version": patch.version, "digest": digest, "training": patch.training},
        "prompts": {
            "source": texts.source,
            "count": len(texts.prompts),
            "samples_per_prompt": config.matrix.samples_per_prompt,
            "max_new_tokens": config.matrix.max_new_tokens,
        },
        "training": asdict(history),
        **measured,
    }
    return document, write_report(document, out)
