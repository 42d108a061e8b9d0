"""Does a patch hold behind text? Its gain behind other text and in later turns, pinned and moving, and what it costs there.

What is asked stands in ``probes``. Bare and patched are sampled with the same random seeds. A score is the mean of each prompt's largest
value, for toxicity EMT; the cost is the change of the perplexity of benign text as far behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.bench.environment import environment
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.likelihoods import token_losses
from edgepatch.bench.metrics import paired_bootstrap_difference
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.probes import Place, Probe, choose_texts, passage, places, probe_of
from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders
from edgepatch.converters.hf.rotary import read_rotation
from edgepatch.errors import InputError
from edgepatch.files.canonical import canonical_json
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import Patch
from edgepatch.progress import Progress, published_command, silent
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.session import Session
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.text.tokenizers import FolderTokenizer

WINDOW = 128
"""Tokens of benign text whose perplexity is taken at each place."""

NUM_PASSAGES = 14
LARGEST_SEED = 64


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


def arms(patch: Patch, blocks: Sequence[int], turn_tokens: Sequence[int], alone: bool = True) -> list[Arm]:
    """A patch pinned, moved at turns, every W tokens, and at both; without the middle two unless each is tried ``alone``.

    Raises:
        InputError: it does not say how its keys turn.
    """
    if patch.rotation is None:
        raise InputError(
            f"{patch.name} {patch.version} does not say how its keys turn",
            hint="add that: edgepatch convert seed",
        )
    rules: list[Anchoring | None] = [None]
    if alone or not turn_tokens:
        rules += [Anchoring(block) for block in blocks]
    if turn_tokens:
        at_turns = [Anchoring(0, tuple(turn_tokens))] if alone or not blocks else []
        rules += [*at_turns, *(Anchoring(block, tuple(turn_tokens)) for block in blocks)]
    # What the canary expects is true of the patch's own anchoring alone.
    return [Arm(replace(patch, anchoring=rule, canary=None), patch.anchoring is not None) for rule in rules]


# Measuring.


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
        probe: what is asked.
        num_threads: of a forward pass.
    """

    def __init__(self, folder: Path, model: Path, probe: Probe, num_threads: int) -> None:
        self._folder, self._model, self._probe, self._num_threads = folder, model, probe, num_threads

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
        texts, config = asdict(self._probe.texts), asdict(self._probe.config)
        facts = [patch.digest if patch else "bare", self._model.name, texts, config, self._probe.fronts]
        return hashlib.sha256(canonical_json(json.loads(json.dumps(facts)))).hexdigest()[:16]

    def _measure(self, patch: Patch | None, progress: Progress) -> Measured:
        # The last positions are for the seed, so that bare and patched have room for the same texts.
        with load_runtime(
            self._model, patch, num_threads=self._num_threads, num_sequences=self._probe.config.samples_per_prompt
        ) as runtime:
            room = runtime.num_positions - LARGEST_SEED
            stands = places(room, has_chat(runtime), self._probe.fronts)
            scores = {}
            for number, place in enumerate(stands):
                progress("places", number, len(stands))
                prompts = range(len(self._probe.texts.prompts))
                scores[place] = self._probe.values(runtime, [self._probe.tokens(runtime, place, i) for i in prompts])
            length = max((place.front_tokens for place in stands), default=0) + WINDOW + 1
            return Measured(scores, losses_of(runtime, self._probe.texts.benign, min(length, room)))


def has_chat(runtime: Session) -> bool:
    """Whether a model takes conversations: base models have no chat template."""
    try:
        runtime.tokens([{"role": "user", "content": "Hello"}])
    except InputError:
        return False
    return True


# The document.


def cells_of(model: str, domain: str, arm: Arm, measured: Measured, bare: Measured) -> Iterator[dict[str, Any]]:
    """A cell for each place, with the patch's gain over the bare model there."""
    plain = _gain(measured, bare, Place()).value
    # Behind benign text the bare model is safer, so that there is less to gain: the share of what there is tells more.
    plain_relative = plain / float(bare.scores[Place()].max(axis=1).mean())
    for place, scores in measured.scores.items():
        gain = _gain(measured, bare, place)
        rule, relative = arm.patch.anchoring, gain.value / float(bare.scores[place].max(axis=1).mean())
        yield {
            "model": model,
            "patch": f"{arm.patch.name} {arm.patch.version}",
            "domain": domain,
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
    patches: Sequence[Patch],
    blocks: Sequence[int],
    data: Path | None,
    num_prompts: int,
    samples: int,
    num_threads: int,
    domain: str = "toxicity",
    alone: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures every patch in every way of standing, and writes the document after each; what it holds of other domains stays.

    Args:
        out: JSON file.
        work: folder for the model and for what is measured already.
        model: that the patches fit; ``None`` makes the lab model's F16 file.
        patches: of the domain.
        blocks: W that are tried.
        data: folder of the public data sets; ``None`` takes texts that ship with edgepatch.
        num_prompts, samples: prompts, and continuations of each where they are sampled.
        num_threads: of a forward pass.
        domain: one of ``PROBES``.
        alone: whether turns and blocks are tried each alone as well.
        progress: told of arms.

    Raises:
        InputError: a file or the domain cannot be used.
    """
    probe = probe_of(domain)(choose_texts(data, num_prompts, domain), SampleConfig(samples_per_prompt=samples))
    loaded = [_with_rotation(patch) for patch in patches]
    turn_tokens = _turn_tokens(loaded, model)
    every = [arm for patch in loaded for arm in arms(patch, blocks, turn_tokens, alone)]
    model = model or _lab_model(work)
    cells = Cells(work / "cells", model, probe, num_threads)
    document = _kept(out, model.name, domain)
    document["runs"].append(
        {
            "domain": domain,
            "command": published_command(),
            "environment": environment(),
            "prompts": {
                "count": len(probe.texts.prompts),
                "samples_per_prompt": samples if domain == "toxicity" else 1,
                "source": "data" if data else "own",
            },
            "patches": [{"name": p.name, "version": p.version, "digest": p.digest} for p in loaded],
        }
    )
    bare = cells.measure(None, progress)
    for number, arm in enumerate(every):
        progress("arms", number, len(every))
        document["cells"] += cells_of(model.stem, domain, arm, cells.measure(arm.patch, progress), bare)
        write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    return document


def _kept(out: Path, model: str, domain: str) -> dict[str, Any]:
    """The document with what it holds of the same model and other domains."""
    document: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    is_same = document.get("model") == model
    rows = {name: document[name] if is_same else [] for name in ("runs", "cells")}
    return {"model": model, **{name: [row for row in kept if row["domain"] != domain] for name, kept in rows.items()}}


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
