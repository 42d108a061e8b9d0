"""How fast we train against PEFT + TRL on the same job: ``make trl``; bench/results/trl.json and .md.

Each measurement is a process of its own, the two contestants in turns, so that neither inherits the other's memory and both share the
machine's moods. CPU seconds are told beside wall-clock time: on a busy machine they are the steadier of the two.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from edgepatch.bench.trl.contestants import OwnContestant, Stage, TrlContestant, config_of, make_pairs
from edgepatch.files.writing import write_atomically
from edgepatch.processes.programs import run_program
from edgepatch.progress import OF_STREAM, Lines, Progress, logged
from edgepatch.tensors import SoftPrompt
from edgepatch.training.pairs.preferences import Pair

LAB = Path(__file__).parent.parent / "lab" / "model" / "base"
STAGES: tuple[Stage, ...] = ("SFT", "DPO")
NUM_VIRTUAL_TOKENS, BATCH_SIZE = 50, 8
WARM_UP = 2
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
    AutoTokenizer.from_pretrained(LAB).save_pretrained(folder)


def plan(model: Path, stage: Stage, steps: int) -> dict[str, Any]:
    """The batches that our trainer reads, in order, and the soft prompt that it starts from: what TRL is given."""
    config = config_of(stage, steps, NUM_VIRTUAL_TOKENS, BATCH_SIZE)
    own = OwnContestant(model, stage, make_pairs(model, BATCH_SIZE * steps), config)
    rows = [[p.prompt, p.chosen, p.rejected] for p in own.plan(steps)]
    return {"rows": rows, "start": own.policy.soft_prompts()[0].embeddings.tolist()}


def work(contestant: str, model: Path, stage: Stage, steps: int, plan_file: Path) -> dict[str, Any]:
    """One measurement, in this process."""
    import numpy as np

    config = config_of(stage, steps, NUM_VIRTUAL_TOKENS, BATCH_SIZE)
    if contestant == "ours":
        course = OwnContestant(model, stage, make_pairs(model, BATCH_SIZE * steps), config).run()
    else:
        given = json.loads(plan_file.read_text(encoding="utf-8"))
        pairs = [Pair(prompt, chosen, rejected, 0.0, 1.0) for prompt, chosen, rejected in given["rows"]]
        start = SoftPrompt(np.array(given["start"], dtype=np.float32))
        course = TrlContestant(model, stage, pairs, config, start, plan_file.parent / "trl").run()
    counted = len(course.losses) - WARM_UP
    return {
        "seconds_per_step": (course.ended[-1] - course.ended[WARM_UP - 1]) / counted,
        "cpu_seconds_per_step": (course.worked[-1] - course.worked[WARM_UP - 1]) / counted,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": course.losses,
    }


def measure(task: str, model: Path, stage: Stage, steps: int, threads: int, plan_file: Path) -> dict[str, Any]:
    """One measurement, or the plan of several, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "edgepatch.bench.trl",
        "--work",
        task,
        str(model),
        stage,
        str(steps),
        str(plan_file),
    ]
    environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = run_program(command, environment=environment)
    if done.failure:
        raise RuntimeError(f"{' '.join(command)} {done.failure}:\n{done.complaints}")
    found: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return found


def compare(name: str, model: Path, stage: Stage, repeats: int, threads: int, progress: Progress) -> dict[str, Any]:
    """Interleaved measurements of both on one job."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder) / "plan.json"
        plan_file.write_text(
            json.dumps(measure("plan", model, stage, STEPS[name], threads, plan_file)), encoding="utf-8"
        )
        for repeat in range(repeats):
            for contestant, found in runs.items():
                progress(f"{name} {stage}", 2 * repeat + (contestant == "trl"), 2 * repeats)
                found.append(measure(contestant, model, stage, STEPS[name], threads, plan_file))
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
            f"{c}_steps_per_second": _spread([1 / run["seconds_per_step"] for run in found])
            for c, found in runs.items()
        },
        **{
            f"{c}_cpu_seconds_per_step": _spread([run["cpu_seconds_per_step"] for run in found])
            for c, found in runs.items()
        },
        **{f"{c}_peak_mib": _spread([run["peak_mib"] for run in found]) for c, found in runs.items()},
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
        f"{versions}. Made by `make trl`.",
        "",
    ]
    return "\n".join(lines)


def run(out: Path, repeats: int, threads: int, names: list[str], progress: Progress) -> dict[str, Any]:
    """All rows; written after each, so that an interrupted run keeps what it has."""
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
                print(render(document).splitlines()[6 + len(document["rows"]) - 1], flush=True)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed against PEFT + TRL.")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument(
        "--work", nargs=5, metavar=("TASK", "MODEL", "STAGE", "STEPS", "PLAN"), help="one task; its JSON on stdout"
    )
    given = parser.parse_args()
    if given.work:
        task, model, stage, steps, plan_file = given.work
        job = (Path(model), stage, int(steps))
        print(json.dumps(plan(*job) if task == "plan" else work(task, *job, Path(plan_file))))
    else:
        tell = partial(print, file=sys.stderr, flush=True)
        kept = f"the rows that are complete are in {given.out}; the same command starts again"
        with logged(given.out / "trl.log", tell, [Lines(tell, OF_STREAM)], lambda: kept) as progress:
            run(given.out, given.repeats, given.threads, given.models, progress)
