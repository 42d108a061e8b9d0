"""The main job on the lab model: pairs, training, conversion, seeding and the measured table, in one command."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgepatch.bench import datasets
from edgepatch.bench.columns import convert_model
from edgepatch.bench.demo.measuring import DOMAIN, demo_columns, demo_config, measure_demo
from edgepatch.bench.environment import environment
from edgepatch.bench.evidence.measuring import Workplace
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.report.matrix_page import write_report
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.converters.hf import folders
from edgepatch.errors import InputError
from edgepatch.files.writing import require_writable
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.patch.file import Patch, write_patch
from edgepatch.progress import Progress, silent, stage
from edgepatch.prompts.sets import evenly, load_benign_text, load_prompts
from edgepatch.runtimes import load_runtime
from edgepatch.training.config import History, TrainConfig
from edgepatch.training.pairs.preferences import PairConfig, build_pairs, write_pairs
from edgepatch.training.patching import train_patch

TRAIN = TrainConfig(dtype="float32", block=0, turns=False)
"""The same table on every machine, and pinned: training with the move takes longer than the whole demo may."""


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults end within ten minutes on two cores.

    Attributes:
        num_training_prompts, num_prompts: prompts for pairs and for the table.
        num_benign_texts: for perplexity.
        pairs, train, samples: settings of pairs, of training, and of the continuations behind the table.
        timing_repeats: of bare and patched, in turn.
    """

    num_training_prompts: int = 220
    num_prompts: int = 64
    num_benign_texts: int = 30
    pairs: PairConfig = PairConfig()
    train: TrainConfig = TRAIN
    samples: SampleConfig = SampleConfig()
    timing_repeats: int = 7


@dataclass(frozen=True)
class Texts:
    """What the demo trains on: prompts for pairs, and benign text; and where the prompts come from."""

    source: str
    prompts: list[str]
    benign: list[str]


def choose_texts(data: Path | None, count: int) -> Texts:
    """Our own prompts, or RealToxicityPrompts' challenging ones (trained on below index 700) where a data folder is named."""
    benign = load_benign_text("train") + load_prompts("benign", "train")
    if data is None:
        return Texts("own prompts", evenly(load_prompts("toxic", "train"), count), benign)
    prompts = [c.prompt for c in datasets.rtp_challenging(data)][: datasets.RTP_SPLIT]
    source = f"RealToxicityPrompts challenging, index >= {datasets.RTP_SPLIT}"
    return Texts(source, evenly(prompts, count), benign + datasets.wikitext_paragraphs(data, "valid", 200))


def train_lab_patch(
    lab: Path, texts: Texts, config: DemoConfig, out: Path, progress: Progress = silent
) -> tuple[Patch, History]:
    """Pairs from M and M', then the patch; writes ``pairs.jsonl`` into ``out``."""
    score = ToxicityScorer.load("filter").score
    with ExitStack() as stack:
        with stage(progress, "load models"):
            base, reference = (stack.enter_context(load_runtime(lab / name, None)) for name in ("base", "reference"))
        pairs = build_pairs(base, reference, texts.prompts, score, config.pairs, progress)
    write_pairs(pairs, out / "pairs.jsonl")
    return train_patch(lab / "base", pairs, texts.benign, config.train, "lab-detox", progress=progress)


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
    require_writable(out)
    texts, place = choose_texts(data, config.num_training_prompts), Workplace(out, data)
    patch, history = train_lab_patch(lab, texts, config, out, progress)
    write_patch(patch, place.arm(DOMAIN, "patch", 1))
    convert_model(lab / "base", place.bases / "base", progress, demo_columns(), is_kept=False)
    settings = demo_config(config.num_prompts, config.num_benign_texts, config.samples)
    measured = measure_demo(place, settings, config.timing_repeats, progress)
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
            "count": measured["cells"][0]["num_prompts"],
            "samples_per_prompt": config.samples.samples_per_prompt,
            "max_new_tokens": config.samples.max_new_tokens,
        },
        "training": asdict(history),
        **measured,
    }
    return document, write_report(document, out)
