"""How fast we train against PEFT + TRL on the same job: ``edgepatch bench trl``; bench/results/trl.json and .md.

Each measurement is a process of its own, the two arms in turns, so that neither inherits the other's memory and both share the
machine's moods. CPU seconds are told beside wall-clock time: on a busy machine they are the steadier of the two.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.trl.arms import OwnArm, Stage, TrlArm, config_of, make_pairs
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.files.pretrained import load_pretrained
from edgepatch.files.writing import write_atomically
from edgepatch.processes import run_apart
from edgepatch.progress import Progress, silent
from edgepatch.tensors import SoftPrompt
from edgepatch.training.pairs.preferences import Pair

LAB = LAB_FOLDER / "base"
STAGES: tuple[Stage, ...] = ("SFT", "DPO")
NUM_VIRTUAL_TOKENS, BATCH_SIZE = 50, 8
WARM_UP = 2
DEADLINE_S = 4 * 3600.0
PLAN = "plan"
"""In place of an arm: the batches that all read."""

STEPS = {"lab": 20, "llama-64m": 6}
GOALS = {"lab": 2.0, "llama-64m": 1.25}


def write_random_model(folder: Path) -> None:
    """A random Llama of 64 M parameters with the lab's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=1856,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_pretrained(AutoTokenizer, LAB).save_pretrained(folder)


def plan(model: Path, stage: Stage, steps: int) -> dict[str, Any]:
    """The batches that our trainer reads, in order, and the soft prompt that it starts from: what TRL is given."""
    config = config_of(stage, steps, NUM_VIRTUAL_TOKENS, BATCH_SIZE)
    own = OwnArm(model, stage, make_pairs(model, BATCH_SIZE * steps), config)
    rows = [[p.prompt, p.chosen, p.rejected] for p in own.plan(steps)]
    return {"rows": rows, "start": own.policy.soft_prompt().embeddings.tolist()}


def work(request: dict[str, Any]) -> dict[str, Any]:
    """In a child: one measurement, or the plan of several; ``request`` holds the arguments of ``measure`` but threads."""
    model, stage, steps = Path(request["model"]), request["stage"], request["steps"]
    if request["arm"] == PLAN:
        return plan(model, stage, steps)
    return _train(request["arm"], model, stage, steps, Path(request["plan_file"]))


def _train(arm: str, model: Path, stage: Stage, steps: int, plan_file: Path) -> dict[str, Any]:
    import numpy as np

    config = config_of(stage, steps, NUM_VIRTUAL_TOKENS, BATCH_SIZE)
    if arm == "ours":
        course = OwnArm(model, stage, make_pairs(model, BATCH_SIZE * steps), config).run()
    else:
        batches = json.loads(plan_file.read_text(encoding="utf-8"))
        pairs = [Pair(prompt, chosen, rejected, 0.0, 1.0) for prompt, chosen, rejected in batches["rows"]]
        start = SoftPrompt(np.array(batches["start"], dtype=np.float32))
        course = TrlArm(model, stage, pairs, config, start, plan_file.parent / "trl").run()
    counted = len(course.losses) - WARM_UP
    return {
        "seconds_per_step": (course.ended[-1] - course.ended[WARM_UP - 1]) / counted,
        "cpu_seconds_per_step": (course.worked[-1] - course.worked[WARM_UP - 1]) / counted,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": course.losses,
    }


def measure(arm: str, model: Path, stage: Stage, steps: int, threads: int, plan_file: Path) -> dict[str, Any]:
    """One measurement of an arm, or the plan of several, in a process of its own.

    Raises:
        EdgepatchError: it failed.
    """
    request = {"arm": arm, "model": str(model), "stage": stage, "steps": steps, "plan_file": str(plan_file)}
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    outcome = run_apart(f"{__name__}:work", request, deadline_s=DEADLINE_S, environment=environment)
    if outcome.error:
        raise outcome.error
    if outcome.failure:
        raise EdgepatchError(f"{model.name}, {stage}, {arm}: the measurement {outcome.failure}")
    figures: dict[str, Any] = outcome.value
    return figures


def compare(name: str, model: Path, stage: Stage, repeats: int, threads: int, progress: Progress) -> dict[str, Any]:
    """Interleaved measurements of both on one job."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder) / "plan.json"
        plan_file.write_text(json.dumps(measure(PLAN, model, stage, STEPS[name], threads, plan_file)), encoding="utf-8")
        for repeat in range(repeats):
            for arm, figures in runs.items():
                progress(f"{name} {stage}", 2 * repeat + (arm == "trl"), 2 * repeats)
                figures.append(measure(arm, model, stage, STEPS[name], threads, plan_file))
    progress(f"{name} {stage}", 2 * repeats, 2 * repeats)
    pairs = list(zip(runs["ours"], runs["trl"], strict=True))
    return {
        "model": name,
        "stage": stage,
        "steps": STEPS[name],
        "repeats": repeats,
        "goal": GOALS[name],
        "speed_ratio": _spread([t["seconds_per_step"] / o["seconds_per_step"] for o, t in pairs]),
        "cpu_ratio": _spread([t["cpu_seconds_per_step"] / o["cpu_seconds_per_step"] for o, t in pairs]),
        "memory_ratio": _spread([t["peak_mib"] / o["peak_mib"] for o, t in pairs]),
        **{
            f"{c}_steps_per_second": _spread([1 / run["seconds_per_step"] for run in repeated])
            for c, repeated in runs.items()
        },
        **{
            f"{c}_cpu_seconds_per_step": _spread([run["cpu_seconds_per_step"] for run in repeated])
            for c, repeated in runs.items()
        },
        **{f"{c}_peak_mib": _spread([run["peak_mib"] for run in repeated]) for c, repeated in runs.items()},
        "largest_loss_difference": max(
            abs(a - b) for o, t in pairs for a, b in zip(o["losses"], t["losses"], strict=True)
        ),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def render(document: dict[str, Any]) -> str:
    """The table as Markdown."""

    def cell(spread: dict[str, float], digits: int) -> str:
        return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f} to {spread['max']:.{digits}f})"

    introduction = (
        f"Same start, same batches in the same order, float32, no dropout, no KL term, P {document['num_virtual_tokens']}, "
        f"{document['batch_size']} pairs a step, DPO with its reference computed beforehand in both; {document['threads']} CPU thread(s), "
        f"{document['cpu']}. Median (least to most) over interleaved repeats; ratios are of one repeat each, above 1 is in our favour."
    )
    lines = [
        "# Training speed against PEFT + TRL",
        "",
        introduction,
        "",
        "| model | stage | ours, steps/s | TRL, steps/s | speed | CPU time | peak memory, ours / TRL | goal | losses differ by |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in document["rows"]:
        met = "met" if row["speed_ratio"]["median"] >= row["goal"] else "missed"
        lines.append(
            f"| {row['model']} | {row['stage']} | {cell(row['ours_steps_per_second'], 2)} | {cell(row['trl_steps_per_second'], 2)} "
            f"| {cell(row['speed_ratio'], 2)} | {cell(row['cpu_ratio'], 2)} | {row['ours_peak_mib']['median']:.0f} / "
            f"{row['trl_peak_mib']['median']:.0f} MiB | >= {row['goal']} {met} | {row['largest_loss_difference']:.1e} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["software"].items())
    lines += [
        "",
        "Peak memory is the process's largest resident size, with libraries, model, and the preparation of data and reference.",
        "",
        f"{versions}. Made by `edgepatch bench trl`.",
        "",
    ]
    return "\n".join(lines)


def run(
    out: Path, repeats: int, threads: int, names: Sequence[str] = tuple(STEPS), progress: Progress = silent
) -> dict[str, Any]:
    """All rows; written after each, so that an interrupted run keeps what it has.

    Args:
        out: folder for ``trl.json`` and ``trl.md``.
        repeats: of each arm.
        threads: of a process.
        names: of the models, some of ``STEPS``.
        progress: told of every measurement.

    Raises:
        InputError: a model is not known.
    """
    if unknown := [name for name in names if name not in STEPS]:
        raise InputError(f"model: expected some of {', '.join(STEPS)}, found {unknown[0]}")
    import platform

    import peft
    import torch
    import transformers
    import trl

    document: dict[str, Any] = {
        "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
        "batch_size": BATCH_SIZE,
        "threads": threads,
        "cpu": platform.processor() or platform.machine(),
        "software": {module.__name__: module.__version__ for module in (torch, transformers, peft, trl)},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            model = LAB if name == "lab" else Path(folder)
            if name != "lab":
                write_random_model(model)
            for stage in STAGES:
                document["rows"].append(compare(name, model, stage, repeats, threads, progress))
                write_atomically(out / "trl.json", (json.dumps(document, indent=1) + "\n").encode())
                write_atomically(out / "trl.md", render(document).encode())
    return document
