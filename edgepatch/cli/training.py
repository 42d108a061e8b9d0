"""``pairs``, ``train`` and ``demo``."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.console import JsonFlag, print_json, progress_bars, stdout
from edgepatch.cli.root import app
from edgepatch.errors import InputError


def _read_texts(path: Path) -> list[str]:
    """Texts of a file: JSON Lines with ``text`` or ``prompt``, or plain lines."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines]
            lines = [row.get("text") or row["prompt"] for row in rows]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"cannot read texts from {path}: {error}",
                         hint="expected one text a line, or JSON Lines with the field text or prompt") from None  # fmt: skip
    if not lines:
        raise InputError(f"{path} holds no text")
    return lines


@app.command("pairs")
def make_pairs(
    model: Annotated[Path, typer.Argument(help="The model to be patched (M).")],
    reference: Annotated[Path, typer.Argument(help="A safer model (M').")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON Lines file to write.")],
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line, or JSON Lines; default: the prompts shipped.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each model a prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a continuation.")] = 24,
    min_margin: Annotated[float, typer.Option(min=0, max=1, help="Least difference of the two scores.")] = 0.4,
    max_chosen_score: Annotated[float, typer.Option(min=0, max=1, help="Highest score of a chosen text.")] = 0.2,
    rng_seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Make preference pairs: both models answer the same prompts, the filter judge scores them.

    Example: `edgepatch pairs models/base models/safer -o pairs.jsonl --prompts prompts.txt`
    """
    from edgepatch.bench.prompt_sets import load_prompts
    from edgepatch.bench.scorers import ToxicityScorer
    from edgepatch.runtimes import load_runtime
    from edgepatch.training.preferences import PairConfig, build_pairs, write_pairs

    texts = _read_texts(prompts) if prompts else load_prompts("toxic", "train")
    config = PairConfig(
        samples_per_prompt=samples, max_new_tokens=max_new_tokens, min_margin=min_margin,
        max_chosen_score=max_chosen_score, rng_seed=rng_seed,
    )  # fmt: skip
    score = ToxicityScorer.load("filter").score
    with load_runtime(model, None) as base, load_runtime(reference, None) as safer, progress_bars() as bars:
        made = build_pairs(base, safer, texts, score, config, lambda done, total: bars("pairs", done, total))
    write_pairs(made, out)
    if as_json:
        print_json({"path": str(out), "pairs": len(made), "prompts": len(texts)})
    else:
        print(f"{out}: {len(made)} pairs from {len(texts)} prompts")


@app.command()
def train(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model to be patched: Transformers folder, or GGUF file to be dequantized.")
    ],
    pairs_file: Annotated[Path, typer.Option("--pairs", help="Preference pairs, JSON Lines.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.")],
    benign: Annotated[Path | None, typer.Option(help="Benign texts for the KL term; default: the texts shipped.")] = None,
    name: Annotated[str, typer.Option(help="Name of the patch.")] = "patch",
    version: Annotated[str, typer.Option(help="Its version (SemVer).")] = "0.1.0",
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="P.")] = 50,
    init_text: Annotated[str | None, typer.Option(help="Instruction whose embeddings start the soft prompt.")] = None,
    sft_steps: Annotated[int | None, typer.Option(min=0, help="Steps of stage 1.")] = None,
    dpo_steps: Annotated[int | None, typer.Option(min=0, help="Steps of stage 2.")] = None,
    beta: Annotated[float | None, typer.Option(min=0, help="Strength of DPO's tie to its reference.")] = None,
    kl_weight: Annotated[float | None, typer.Option(min=0, help="Weight of the KL term on benign text.")] = None,
    dpo_reference: Annotated[str | None, typer.Option(help="base or sft.")] = None,
    rng_seed: Annotated[int, typer.Option(help="Random seed of the order of examples.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Train a patch: a soft prompt on the frozen model, SFT then DPO.

    Example: `edgepatch train models/base --pairs pairs.jsonl -o detox.safetensors --name detox`
    """
    from edgepatch.bench.prompt_sets import load_benign_text, load_prompts
    from edgepatch.patches import write_patch
    from edgepatch.training.preferences import read_pairs
    from edgepatch.training.trainer import TrainConfig, train_patch

    chosen = {
        "init_text": init_text, "sft_steps": sft_steps, "dpo_steps": dpo_steps, "beta": beta, "kl_weight": kl_weight,
        "dpo_reference": dpo_reference,
    }  # fmt: skip
    given = {k: v for k, v in chosen.items() if v is not None}
    config = TrainConfig(num_virtual_tokens=num_virtual_tokens, rng_seed=rng_seed, **given)  # type: ignore[arg-type]
    pairs = read_pairs(pairs_file)
    texts = _read_texts(benign) if benign else load_benign_text("train") + load_prompts("benign", "train")
    with progress_bars() as bars:
        patch, history = train_patch(
            model, pairs, texts, config, name, version, progress=lambda stage, step, total, _: bars(stage, step, total)
        )
    patch = replace(patch, created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
    digest = write_patch(patch, out)
    accuracy = history.preference_accuracy[-1]
    if as_json:
        print_json({"path": str(out), "digest": digest, "training": patch.training})
    else:
        print(f"{out}: {patch.num_virtual_tokens} virtual tokens, held-out preference accuracy {accuracy:.2f}, SHA-256 {digest}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for models, patch, results.json and report.html.")] = Path("out/demo"),
    data: Annotated[Path | None, typer.Option(help="Data folder (default: EDGEPATCH_DATA); without it our own prompts are used.")] = None,
    lab: Annotated[Path | None, typer.Option(help="Folder with the lab models base/ and reference/.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts behind the table.")] = 48,
    samples: Annotated[int, typer.Option(min=1, help="Continuations a prompt.")] = 25,
    rng_seed: Annotated[int, typer.Option(help="Random seed of training.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Train a patch for the lab model and measure it on PyTorch, GGUF and ONNX, bare and patched.

    Example: `edgepatch demo --out out/demo`
    """
    from edgepatch.bench import demo as main_job
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.matrix import MatrixConfig
    from edgepatch.bench.report import print_table
    from edgepatch.training.trainer import TrainConfig

    config = main_job.DemoConfig(
        num_prompts=prompts, matrix=MatrixConfig(samples_per_prompt=samples, num_threads=1), train=TrainConfig(rng_seed=rng_seed)
    )
    with progress_bars() as bars:
        document, page = main_job.run_demo(out, data_folder(data), lab or main_job.LAB_FOLDER, config, bars)
    if as_json:
        print_json(document)
        return
    print_table(document, stdout())
    print(f"results {page.parent / 'results.json'}\nreport  {page}")
