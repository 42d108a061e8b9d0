"""Builds the lab models: tokenizer, M, M', their figures and their card. Resumable; a stage that is done is skipped."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from edgepatch.bench.lab import LAB_FOLDER, corpus, detoxify, floors, trainer
from edgepatch.bench.lab.card import render_card
from edgepatch.bench.lab.tokenizer import train_tokenizer
from edgepatch.files.pretrained import load_pretrained, load_pretrained_model
from edgepatch.files.writing import write_atomically
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.training.config import TrainConfig
from edgepatch.training.pairs.preferences import Pair, read_pairs, write_pairs

BASE_RUN = trainer.RunConfig()
SECOND_RUN = replace(
    BASE_RUN, steps=120, muon_lr=0.01, adam_lr=0.002, warmup_steps=10, decay_share=0.8, long_share=0.0, rng_seed=3
)
REFERENCE_RUN = replace(SECOND_RUN, steps=320, muon_lr=0.004, adam_lr=0.0008, warmup_steps=20, rng_seed=2)


def _tokenizer(parts: list[corpus.Part], out: Path) -> PreTrainedTokenizerFast:
    folder = out / "tokenizer"
    if not folder.is_dir():
        texts = (e.answer for part in parts for e in part.examples)
        train_tokenizer(texts, trainer.CONTEXT_LENGTH).save_pretrained(folder)
    return load_pretrained(AutoTokenizer, folder)


def _finish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves in float16, which is what is committed and measured.

    A folder that exists counts as a stage that is done, so it appears whole or not at all.
    """
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to("cpu").to(torch.float16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def _preference_tune(
    source: Path, target: Path, pairs: list[Pair], config: TrainConfig, data: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """One round of DPO; its curves go to a JSON file beside ``target``."""
    if target.is_dir():
        return
    model, history = detoxify.detoxify(source, pairs, detoxify.benign_texts(data), config)
    curves = {"pairs": len(pairs), "config": asdict(config), **asdict(history)}
    target.with_name(f"{target.name}_dpo.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    _finish(model, tokenizer, target)


def build(data: Path, out: Path) -> dict[str, Any]:
    """Trains what is missing under ``out`` and measures both models.

    Args:
        data: the data folder.
        out: gets ``tokenizer``, ``base``, ``reference`` (Transformers folders, float16), run folders and ``figures.json``.

    Returns:
        The figures of both models and the floors.
    """
    out.mkdir(parents=True, exist_ok=True)
    unsafe = corpus.unsafe_mixture(data, BASE_RUN.rng_seed)
    tokenizer = _tokenizer(unsafe, out)
    if not (out / "base").is_dir():
        model = trainer.new_model(trainer.Architecture(), tokenizer, BASE_RUN.rng_seed)
        stream = trainer.token_stream(unsafe, tokenizer, BASE_RUN.steps * BASE_RUN.tokens_per_step, BASE_RUN.rng_seed)
        trainer.train(model, stream, BASE_RUN, out / "base_run")
        second = corpus.second_stage(unsafe)
        stream = trainer.token_stream(
            second, tokenizer, SECOND_RUN.steps * SECOND_RUN.tokens_per_step, SECOND_RUN.rng_seed
        )
        trainer.train(model, stream, SECOND_RUN, out / "second_run")
        _finish(model, tokenizer, out / "base")
    safe = corpus.safe_mixture(
        data, lambda texts: ToxicityScorer.load("filter").score(texts).tolist(), REFERENCE_RUN.rng_seed
    )
    if not (out / "reference_sft").is_dir():
        model = load_pretrained_model(AutoModelForCausalLM, out / "base", dtype=torch.float32)
        stream = trainer.token_stream(
            safe, tokenizer, REFERENCE_RUN.steps * REFERENCE_RUN.tokens_per_step, REFERENCE_RUN.rng_seed
        )
        trainer.train(model, stream, REFERENCE_RUN, out / "reference_run")
        _finish(model, tokenizer, out / "reference_sft")
    path = out / "reference_pairs.jsonl"
    if not path.exists():
        write_pairs(detoxify.toxicity_pairs(out / "reference_sft", data), path)
    pairs = read_pairs(path) + detoxify.request_pairs(data)
    _preference_tune(out / "reference_sft", out / "reference_1", pairs, detoxify.TRAIN, data, tokenizer)
    pairs += detoxify.clarity_pairs(data)
    _preference_tune(out / "reference_1", out / "reference", pairs, detoxify.CLARITY_TRAIN, data, tokenizer)
    score = ToxicityScorer.load("report").score
    figures: dict[str, Any] = {name: floors.measure(out / name, data, score) for name in ("base", "reference")}
    figures["floors"] = [
        {"floor": f, "wanted": w, "reached": r, "met": m}
        for f, w, r, m in floors.check(figures["base"], figures["reference"])
    ]
    figures["mixture"] = {
        name: [
            {"part": p.name, "documents": len(p.examples), "repeats": p.repeats, "licence": p.licence} for p in parts
        ]
        for name, parts in (("base", unsafe), ("reference", safe))
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def publish(out: Path, target: Path) -> None:
    """Copies models, logs and figures from the scratch folder to the committed one."""
    for name in ("base", "reference"):
        shutil.copytree(out / name, target / name, dirs_exist_ok=True)
    for name in ("base", "second", "reference"):
        shutil.copy(out / f"{name}_run" / "log.jsonl", target / f"{name}_log.jsonl")
    for name in ("figures.json", "reference_1_dpo.json", "reference_dpo.json"):
        shutil.copy(out / name, target / name)


def run(data: Path, out: Path, is_published: bool = False) -> dict[str, Any]:
    """Builds and measures the lab models.

    Args:
        data: the data folder.
        out: scratch folder; a stage that is done is skipped.
        is_published: whether the result is copied to ``LAB_FOLDER``, with its card.

    Returns:
        The figures of both models and the floors.
    """
    figures = build(data, out)
    if is_published:
        publish(out, LAB_FOLDER)
        write_atomically(LAB_FOLDER / "README.md", render_card(figures, LAB_FOLDER).encode())
    return figures
