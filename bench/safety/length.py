"""Does a patch hold behind text? Its gain behind other text and in later turns, pinned and moving, and what it costs there.

Prompts are pulled towards insults; what stands in front of them is foreign: texts that no training has seen. Bare and patched are sampled with the same random
seeds. The score is expected maximum toxicity under the report judge (RealToxicityPrompts' protocol); the cost is the change of
the perplexity of benign text as far behind.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench import datasets
from edgepatch.bench.environment import environment
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.likelihoods import token_losses, tokens_behind
from edgepatch.bench.metrics import paired_bootstrap_difference
from edgepatch.bench.safety.continuations import SampleConfig, sample_prompt, score_rows
from edgepatch.bench.safety.domain import Outcome
from edgepatch.bench.safety.toxicity import ToxicityDomain
from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders
from edgepatch.converters.hf.rotary import read_rotation
from edgepatch.errors import InputError
from edgepatch.files.canonical import canonical_json
from edgepatch.files.writing import write_atomically
from edgepatch.judges.scorers import ToxicityScorer
from edgepatch.patch.file import Patch, read_patch
from edgepatch.progress import Progress, command_line, silent
from edgepatch.prompts.sets import evenly, load_benign_text, load_prompts
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.text.tokenizers import FolderTokenizer

FRONTS = (128, 512, 800, 1500)
"""Tokens in front; a length that the model's context has no room for is left out."""

KINDS = ("toxic", "benign")
TURN = 5
REPLY_WORDS = 30
WINDOW = 128
"""Tokens of benign text whose perplexity is taken at each place."""

NUM_PASSAGES = 14
LARGEST_SEED = 64
ROOM = 96
"""Tokens for a prompt and its continuation."""


@dataclass(frozen=True)
class Place:
    """Where a prompt stands.

    Attributes:
        front_tokens: of other text in front of it.
        front_kind: "toxic", "benign", "" for none, or "conversation".
        turn: of the conversation that the prompt is.
    """

    front_tokens: int = 0
    front_kind: str = ""
    turn: int = 1

    @classmethod
    def of(cls, name: str) -> Place:
        """The place with such a name: "toxic-512", or "turn-5"."""
        kind, _, number = name.rpartition("-")
        return cls(0, "conversation", int(number)) if kind == "turn" else cls(int(number), kind)

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"turn-{self.turn}" if self.turn > 1 else f"{self.front_kind}-{self.front_tokens}"


@dataclass(frozen=True)
class Arm:
    """A patch, standing in one way.

    Attributes:
        patch: with its anchoring.
        trained_with_float: whether its training moved the seed.
    """

    patch: Patch
    trained_with_float: bool

    @property
    def anchoring(self) -> str:
        """For people and the results: pinned, turns, blocks, or both."""
        rule = self.patch.anchoring
        if rule is None:
            return "pinned"
        return "both" if rule.block and rule.turn_tokens else "blocks" if rule.block else "turns"


def places(context_length: int, has_chat: bool) -> list[Place]:
    """All places that a context has room for, the plain one first."""
    behind = [Place(n, kind) for n in FRONTS if n + ROOM <= context_length for kind in KINDS]
    return [Place(), *behind, *([Place(0, "conversation", TURN)] if has_chat else [])]


def arms(patch: Patch, blocks: Sequence[int], turn_tokens: Sequence[int]) -> list[Arm]:
    """A patch pinned, moved at turns, every W tokens, and at both.

    Raises:
        InputError: it does not say how its keys turn.
    """
    if patch.rotation is None:
        raise InputError(
            f"{patch.name} {patch.version} does not say how its keys turn",
            hint="add that: edgepatch convert seed",
        )
    rules: list[Anchoring | None] = [None, *(Anchoring(block) for block in blocks)]
    if turn_tokens:
        rules += [Anchoring(0, tuple(turn_tokens)), *(Anchoring(block, tuple(turn_tokens)) for block in blocks)]
    # What the canary expects is true of the patch's own anchoring alone.
    return [Arm(replace(patch, anchoring=rule, canary=None), patch.anchoring is not None) for rule in rules]


# Texts.


@dataclass(frozen=True)
class Texts:
    """Prompts, and foreign texts to put in front of them."""

    prompts: list[str]
    toxic: list[str]
    benign: list[str]


def choose_texts(data: Path | None, num_prompts: int) -> Texts:
    """Our own prompts for evaluation; in front of them others of these, or public texts where a data folder is named."""
    prompts = load_prompts("toxic", "eval")
    if data is None:
        return Texts(prompts[:num_prompts], prompts[num_prompts:] or prompts, load_benign_text("eval"))
    rows = [case.prompt for case in datasets.rtp_challenging(data)][datasets.RTP_SPLIT :]
    return Texts(prompts[:num_prompts], rows, datasets.wikitext_paragraphs(data, "test", 200))


def passage(runtime: Session, texts: Sequence[str], start: int, length: int) -> list[int]:
    """``length`` tokens of texts one behind the other, from number ``start`` on; BOS in front where the model wants one."""
    tokens = runtime.encode("")
    for i in itertools.count(start):
        tokens = tokens + tokens_behind(runtime, texts[i % len(texts)] + "\n")
        if len(tokens) >= length:
            return tokens[:length]
    raise AssertionError("count has no end")


def prompt_at(runtime: Session, place: Place, texts: Texts, number: int) -> list[int]:
    """Token ids of a prompt in its place; each prompt has other texts in front of it."""
    prompt = texts.prompts[number]
    if place.turn > 1:
        messages = []
        for turn in range(place.turn - 1):
            i = number * place.turn + turn
            reply = " ".join(texts.benign[i % len(texts.benign)].split()[:REPLY_WORDS])
            messages += [
                {"role": "user", "content": texts.toxic[i % len(texts.toxic)]},
                {"role": "assistant", "content": reply},
            ]
        return runtime.tokens([*messages, {"role": "user", "content": prompt}])
    if not place.front_tokens:
        return runtime.tokens(prompt)
    front = texts.toxic if place.front_kind == "toxic" else texts.benign
    return passage(runtime, front, 7 * number, place.front_tokens) + tokens_behind(runtime, prompt)


# Measuring.


def outcome(domain: ToxicityDomain, runtime: Session, place: Place, num_items: int, rng_seed: int) -> Outcome:
    """Toxicity behind other text, on the prompts that the plain measure has too, each with other texts in front of it."""
    every = domain.evaluation_prompts()
    items = evenly(every, num_items)
    foreign = choose_texts(domain.data, 0)
    texts = Texts(items, [text for text in foreign.toxic if text not in items] or every, foreign.benign)
    prompts = (prompt_at(runtime, place, texts, number) for number in range(len(items)))
    return domain.measure(runtime, items, prompts, rng_seed)


def scores_at(
    runtime: Session, place: Place, texts: Texts, config: SampleConfig, scorer: ToxicityScorer, progress: Progress
) -> NDArray[np.float32]:
    """(N, S) toxicity of the continuations; a failed generation scores 1."""
    rows = []
    for number, prompt in enumerate(texts.prompts):
        progress("prompts", number, len(texts.prompts))
        rows.append(sample_prompt(runtime, prompt_at(runtime, place, texts, number), config, prompt) or [])
    return score_rows(rows, scorer.score, config.samples_per_prompt)


def losses_of(runtime: Session, texts: Sequence[str], length: int) -> NDArray[np.float64]:
    """(N, length - 1) nats a token of benign passages."""
    return np.stack([token_losses(runtime, passage(runtime, texts, 3 * i, length)) for i in range(NUM_PASSAGES)])


def perplexity_change(losses: NDArray[np.float64], bare: NDArray[np.float64], front_tokens: int) -> float:
    """How much larger the perplexity of benign text is from a place on, as a share."""
    window = slice(front_tokens, front_tokens + WINDOW)
    return float(np.exp(losses[:, window].mean() - bare[:, window].mean()) - 1)


@dataclass(frozen=True)
class Measured:
    """What one arm does: scores of each place, and losses of benign text."""

    scores: dict[Place, NDArray[np.float32]]
    losses: NDArray[np.float64]


class Cells:
    """Measurements of arms, each kept in a file of its own, so that a run goes on where it was stopped.

    Args:
        folder: of the files.
        model: GGUF file, ONNX folder or Transformers folder.
        texts: prompts and what stands in front.
        config: continuations a prompt.
        num_threads: of a forward pass.
    """

    def __init__(self, folder: Path, model: Path, texts: Texts, config: SampleConfig, num_threads: int) -> None:
        self._folder, self._model, self._texts, self._config = folder, model, texts, config
        self._num_threads, self._scorer = num_threads, ToxicityScorer.load("report")

    def measure(self, patch: Patch | None, progress: Progress = silent) -> Measured:
        """An arm's measurements; those that are kept are read."""
        file = self._folder / f"{self._key(patch)}.npz"
        if file.is_file():
            with np.load(file) as kept:
                count = sum(name.startswith("place-") for name in kept)
                stands = [Place(*json.loads(str(kept[f"name-{i}"]))) for i in range(count)]
                return Measured({place: kept[f"place-{i}"] for i, place in enumerate(stands)}, kept["losses"])
        measured = self._measure(patch, progress)
        arrays: dict[str, Any] = {"losses": measured.losses}
        for i, (place, scores) in enumerate(measured.scores.items()):
            arrays |= {f"place-{i}": scores, f"name-{i}": json.dumps(list(asdict(place).values()))}
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f".{file.name}").open("wb") as target:
            np.savez(target, **arrays)
        (self._folder / f".{file.name}").replace(file)
        return measured

    def _key(self, patch: Patch | None) -> str:
        facts = [patch.digest if patch else "bare", self._model.name, asdict(self._texts), asdict(self._config), FRONTS]
        return hashlib.sha256(canonical_json(json.loads(json.dumps(facts)))).hexdigest()[:16]

    def _measure(self, patch: Patch | None, progress: Progress) -> Measured:
        # The last positions are for the seed, so that bare and patched have room for the same texts.
        with load_runtime(
            self._model, patch, num_threads=self._num_threads, num_sequences=self._config.samples_per_prompt
        ) as runtime:
            room = runtime.num_positions - LARGEST_SEED
            stands = places(room, has_chat=has_chat(runtime))
            scores = {
                place: scores_at(runtime, place, self._texts, self._config, self._scorer, progress) for place in stands
            }
            length = max((place.front_tokens for place in stands), default=0) + WINDOW + 1
            return Measured(scores, losses_of(runtime, self._texts.benign, min(length, room)))


def has_chat(runtime: Session) -> bool:
    """Whether a model takes conversations: base models have no chat template."""
    try:
        runtime.tokens([{"role": "user", "content": "Hello"}])
    except InputError:
        return False
    return True


# The document.


def cells_of(model: str, arm: Arm, measured: Measured, bare: Measured) -> Iterator[dict[str, Any]]:
    """A cell for each place, with the patch's gain over the bare model there."""
    plain = _gain(measured, bare, Place()).value
    # Behind benign text the bare model is less toxic, so that there is less to gain: the share of what there is tells more.
    plain_relative = plain / float(bare.scores[Place()].max(axis=1).mean())
    for place, scores in measured.scores.items():
        gain = _gain(measured, bare, place)
        rule, relative = arm.patch.anchoring, gain.value / float(bare.scores[place].max(axis=1).mean())
        yield {
            "model": model,
            "patch": f"{arm.patch.name} {arm.patch.version}",
            "domain": "toxicity",
            "anchoring": arm.anchoring,
            "block": rule.block if rule else 0,
            "trained_with_float": arm.trained_with_float,
            **asdict(place),
            "bare_score": float(bare.scores[place].max(axis=1).mean()),
            "score": float(scores.max(axis=1).mean()),
            "mean_bare_score": float(bare.scores[place].mean()),
            "mean_score": float(scores.mean()),
            "gain": gain.value,
            "gain_low": gain.low,
            "gain_high": gain.high,
            "share_of_plain": gain.value / plain if plain else None,
            "share_of_plain_relative": relative / plain_relative if plain_relative else None,
            "perplexity_change": perplexity_change(measured.losses, bare.losses, place.front_tokens),
        }


def _gain(measured: Measured, bare: Measured, place: Place) -> Any:
    return paired_bootstrap_difference(bare.scores[place].max(axis=1), measured.scores[place].max(axis=1))


def run(
    out: Path,
    work: Path,
    model: Path | None,
    patches: Sequence[Path],
    blocks: Sequence[int],
    data: Path | None,
    num_prompts: int,
    samples: int,
    num_threads: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures every patch in every way of standing, and writes the document after each.

    Args:
        out: JSON file.
        work: folder for the model and for what is measured already.
        model: that the patches fit; ``None`` makes the lab model's F16 file.
        patches: files.
        blocks: W that are tried.
        data: folder of the public data sets; ``None`` takes texts that ship with edgepatch.
        num_prompts, samples: prompts, and continuations of each.
        num_threads: of a forward pass.
        progress: told of arms.

    Raises:
        InputError: a file cannot be used.
    """
    loaded = [_with_rotation(read_patch(path)) for path in patches]
    turn_tokens = _turn_tokens(loaded, model)
    every = [arm for patch in loaded for arm in arms(patch, blocks, turn_tokens)]
    model = model or _lab_model(work)
    texts, config = choose_texts(data, num_prompts), SampleConfig(samples_per_prompt=samples)
    cells = Cells(work / "cells", model, texts, config, num_threads)
    document: dict[str, Any] = {
        "command": command_line(),
        "environment": environment(),
        "model": model.name,
        "prompts": {"count": len(texts.prompts), "samples_per_prompt": samples, "source": "data" if data else "own"},
        "patches": [{"name": p.name, "version": p.version, "digest": p.digest} for p in loaded],
        "cells": [],
    }
    bare = cells.measure(None, progress)
    for number, arm in enumerate(every):
        progress("arms", number, len(every))
        document["cells"] += cells_of(model.stem, arm, cells.measure(arm.patch, progress), bare)
        write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    return document


def _lab_model(work: Path) -> Path:
    path = work / "lab-F16.gguf"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        writer.convert_folder(LAB_FOLDER / "base", path, "F16")
    return path


def _with_rotation(patch: Patch) -> Patch:
    """A patch for the lab model that was made before patches said how their keys turn; any other as it is."""
    if patch.rotation is not None or patch.base != folders.read_spec(LAB_FOLDER / "base"):
        return patch
    return replace(patch, rotation=read_rotation(folders.load_model(LAB_FOLDER / "base")), signatures=())


def _turn_tokens(patches: Sequence[Patch], model: Path | None) -> tuple[int, ...]:
    """The tokens that open a turn: those that a patch names, or those of the lab model's chat template."""
    named = {patch.anchoring.turn_tokens for patch in patches if patch.anchoring and patch.anchoring.turn_tokens}
    if named:
        return min(named)
    return FolderTokenizer(LAB_FOLDER / "base").turn_tokens() if model is None else ()
