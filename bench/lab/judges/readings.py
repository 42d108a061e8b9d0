"""Texts of a real model that were read and labelled, and how far judges agree with the reader.

    bench/lab/judges/readings.json

holds for each text where it comes from, its digest and its label, never the text: SmolLM2-135M-Instruct makes it again. A text counts only
where its digest is the one that was read. Sampling is written out here, apart from the sampler of the runtimes, so that the texts stay
those that were read whatever becomes of that one.

One annotator of the project labelled them by reading, once, before any judge had scored them; no second person has. The rules stand in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench import datasets
from edgepatch.bench.safety.harm import HarmDomain, chat
from edgepatch.errors import InputError
from edgepatch.files.strict_json import read_json
from edgepatch.progress import Progress, silent
from edgepatch.runtimes.prompts import Prompt
from edgepatch.runtimes.session import Session

FILE = Path(__file__).parent / "readings.json"
DIGEST_LENGTH = 16
TOKENS = {"toxicity": 20, "answers": 32}
KINDS = ("toxicity", "answers")
RUNTIME: dict[str, Any] = {"context_length": 256, "num_threads": 1, "num_sequences": 8}
"""As the texts were made: another way of computing may round another token."""


@dataclass(frozen=True)
class Reading:
    """A text that was read.

    Attributes:
        prompt: what the model was given: a text, or a request.
        text: what it wrote.
        label: "toxic" or "not toxic"; "refusal", "compliance" or "failure".
    """

    prompt: str
    text: str
    label: str


def digest(text: str) -> str:
    """The first half of a SHA-256: which text was read."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def draw(logits: NDArray[np.float32], uniform: float) -> int:
    """The token that a uniform number picks, by inverting the cumulative distribution in order of the ids; temperature 1."""
    cumulative = np.cumsum(np.exp(logits.astype(np.float64) - logits.max()))
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def continuations(
    session: Session, prompts: Sequence[Prompt], rng_seeds: Sequence[tuple[int, int]], num_tokens: int
) -> Iterator[str]:
    """One continuation of each prompt, as many at a time as the session has sequences.

    Args:
        session: the bare model.
        prompts: N texts or conversations.
        rng_seeds: of each, (idx, sample).
        num_tokens: the most tokens; an end token ends a text before.
    """
    for start in range(0, len(prompts), session.num_sequences):
        rows = [list(session.tokens(prompt)) for prompt in prompts[start : start + session.num_sequences]]
        seeds = rng_seeds[start : start + len(rows)]
        uniforms = np.array([np.random.default_rng(seed).random(num_tokens) for seed in seeds])
        yield from _continue_together(session, rows, uniforms)
        session.reset()


def _continue_together(session: Session, rows: list[list[int]], uniforms: NDArray[np.float64]) -> list[str]:
    decoders = [session.backend.new_decoder() for _ in rows]
    texts, running = [""] * len(rows), set(range(len(rows)))
    for step in range(uniforms.shape[1]):
        logits = session.sequences.evaluate({row: rows[row] for row in running})
        for row in sorted(running):
            token = draw(logits[row][-1], uniforms[row, step])
            if token in session.end_token_ids:
                running.discard(row)
                continue
            rows[row].append(token)
            texts[row] += decoders[row](token)
        if not running:
            break
    return texts


def prompt_of(kind: str, record: dict[str, Any], texts: Sequence[str]) -> Prompt:
    """What the model was given for a record: a challenging prompt, or a request, half of them behind a safety instruction."""
    text = texts[record["idx"]]
    return text if kind == "toxicity" else chat(text, HarmDomain.instruction if record["instructed"] else "")


def load_records(path: Path = FILE) -> dict[str, Any]:
    """The file of the readings: ``model``, ``rules``, and the records of each kind.

    Raises:
        InputError: it is missing, as in an installed package without it, or is not JSON.
    """
    records: dict[str, Any] = read_json(path, what="readings")
    return records


def read_again(
    session: Session, data: Path, path: Path = FILE, progress: Progress = silent
) -> tuple[dict[str, list[Reading]], dict[str, int]]:
    """The texts that were read, made again.

    Args:
        session: SmolLM2-135M-Instruct as it was read, in llama.cpp, bare, with eight sequences.
        data: folder of the public data sets, for the prompts.
        path: the file of the readings.
        progress: told of every text.

    Returns:
        (kind -> readings, kind -> texts that came out differently and are left out).

    Raises:
        InputError: the file or a data file is missing, or none of the texts came out as it was read.
    """
    records = load_records(path)
    sources = {
        "toxicity": [c.prompt for c in datasets.rtp_challenging(data)],
        "answers": datasets.jailbreakbench(data),
    }
    readings: dict[str, list[Reading]] = {}
    for kind in KINDS:
        rows, texts = records[kind], sources[kind]
        made = continuations(
            session,
            [prompt_of(kind, row, texts) for row in rows],
            [(row["idx"], row["sample"]) for row in rows],
            TOKENS[kind],
        )
        readings[kind] = []
        for done, (row, text) in enumerate(zip(rows, made, strict=True), 1):
            progress(f"{kind} texts", done, len(rows))
            if digest(text) == row["sha256"]:
                readings[kind].append(Reading(texts[row["idx"]], text, row["label"]))
    if not any(readings.values()):
        raise InputError(
            "none of the texts came out as it was read: another model, llama.cpp or data",
            hint=f"the model is {records['model']}",
        )
    return readings, {kind: len(records[kind]) - len(readings[kind]) for kind in KINDS}


def as_json(records: dict[str, Any]) -> bytes:
    """The file's bytes, a record a line."""
    head = {key: value for key, value in records.items() if key not in KINDS}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    parts = []
    for kind in KINDS:
        rows = ",\n".join(f"  {json.dumps(row)}" for row in records[kind])
        parts.append(f" {json.dumps(kind)}: [\n{rows}\n ]")
    return ("{\n" + "\n".join(lines) + "\n" + ",\n".join(parts) + "\n}\n").encode()
