"""Trains the shipped patches jointly, from what they are: ``python -m edgepatch.bench.smollm2.together DATA OUT``.

Patches that were trained one by one lose most of what they do beside the others. Here each step draws which of them stand beside the one
whose pairs it reads (``SideBySidePolicy``). ``OUT`` is the folder that ``make`` wrote.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.bench.lab import corpus
from edgepatch.bench.smollm2.shipped import DOMAIN_OF, PATCHES
from edgepatch.known_models import find
from edgepatch.patch.file import read_patch, write_patch
from edgepatch.progress import logged
from edgepatch.prompts.sets import evenly
from edgepatch.training.config import TrainConfig
from edgepatch.training.forward import BenignText
from edgepatch.training.pairs.filtering import key_of
from edgepatch.training.pairs.preferences import Pair, PairPrompt, read_pairs
from edgepatch.training.pairs.prompt_files import read_prompts
from edgepatch.training.patching import PatchTraining

PAIRS_OF = {"detox": ("own.jsonl", 480), "fairness": ("gender.jsonl", 320), "harm": ("harm.jsonl", 640)}
"""Patch -> its pairs, and how many of them are read: a step reads eight, and a run ends before it has seen more."""

START_VERSION, VERSION = "0.1.0", "0.2.0"

CONFIG = TrainConfig(
    sft_steps=0,
    dpo_steps=210,
    dpo_learning_rate=5e-3,
    beta=0.1,
    nll_weight=0.5,
    kl_weight=2.0,
    kl_batch_size=6,
    micro_batch_size=8,
    block=128,
    turns=True,
    front_tokens=0,
    held_out=0.05,
    check_every=70,
    dtype="float32",
    rng_seed=3,
)

TYPED_SHARE = 0.12
"""Of the prompts in capitals, and as many in small letters: the answer to a request does not depend on either."""

QUESTION_CHARACTERS, ANSWER_WORDS, NUM_PROBLEMS = 130, 25, 100


def question_texts(data: Path) -> list[str]:
    """Questions with short answers as plain texts, without a chat template.

    A patch whose benign texts were conversations and paragraphs lost 14 points of ARC-Easy, which asks in this form. None of these
    questions is from a set that patches are measured on.
    """
    asked = [(q, a) for q, a in corpus.instruction_split(data)[0] if q.endswith("?") and "\n" not in q]
    short = [(q, a) for q, a in asked if len(q) < QUESTION_CHARACTERS and len(a.split()) <= ANSWER_WORDS]
    problems = evenly(datasets.gsm8k_train(data), NUM_PROBLEMS)
    return [f"Question: {question}\nAnswer: {answer}" for question, answer in [*short, *problems]]


def typed(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs, some prompts of which are in capitals or in small letters."""
    rng = random.Random("typed")
    forms = [
        rng.choices((str, str.upper, str.lower), (1 - 2 * TYPED_SHARE, TYPED_SHARE, TYPED_SHARE))[0] for _ in pairs
    ]
    return [replace(pair, prompt=_in_form(pair.prompt, form)) for pair, form in zip(pairs, forms, strict=True)]


def _in_form(prompt: PairPrompt, form: Callable[[str], str]) -> PairPrompt:
    if isinstance(prompt, str):
        return form(prompt)
    return tuple({**message, "content": form(message["content"])} for message in prompt)


def tasks_of(out: Path) -> dict[str, list[Pair]]:
    """Patch -> its pairs. Pronouns stay as they are written: in capitals the answers would be other tokens."""
    pairs = {name: evenly(read_pairs(out / file), count) for name, (file, count) in PAIRS_OF.items()}
    return {name: each if name == "fairness" else typed(each) for name, each in pairs.items()}


def benign_of(data: Path, out: Path) -> list[BenignText]:
    """Texts of every kind that is to stay as it is, each once."""
    files = [out / f"benign-{domain}.jsonl" for domain in DOMAIN_OF.values()]
    texts = [text for file in files for text in read_prompts(file).prompts]
    return list({key_of(text): text for text in texts}.values()) + question_texts(data)


def main(data: Path, out: Path, config: TrainConfig = CONFIG) -> None:
    """Writes the trained patches to the folder, unsigned.

    Args:
        data: folder of the public data sets.
        out: pairs and benign texts, as ``make`` writes them; a run that was stopped goes on from there.
        config: hyperparameters.
    """
    tasks = tasks_of(out)
    files = [PATCHES / f"smollm2-{name}-{START_VERSION}.safetensors" for name in tasks]
    starts = [seed for seed in (read_patch(file).kv_seed for file in files) if seed is not None]
    names, run = [f"smollm2-{name}" for name in tasks], out / "run"
    with logged(out / "together.log", print, kept=lambda: f"{run} goes on with the same command") as progress:
        training = PatchTraining(find("smollm2"), config, run=run, tell=print, progress=progress)
        patches = training.segments(list(tasks.values()), starts, benign_of(data, out), names, VERSION, progress)
    for patch in patches:
        write_patch(patch, out / f"{patch.name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
