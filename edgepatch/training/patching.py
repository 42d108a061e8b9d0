"""From pairs to a patch: a trained soft prompt, a trained K/V prefix, or several that will stand side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgepatch.converters import weight_sketches
from edgepatch.converters.hf import folders, seeds
from edgepatch.errors import InputError
from edgepatch.patch.composition import in_order
from edgepatch.patch.file import Patch
from edgepatch.progress import Progress, silent, stage
from edgepatch.tensors import KVSeed, SoftPrompt
from edgepatch.training import parallel, runs
from edgepatch.training.composition import require_room
from edgepatch.training.config import History, TrainConfig
from edgepatch.training.distillation import Teacher
from edgepatch.training.frozen.forward import BenignText, FrozenModels
from edgepatch.training.pairs import provenance
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.policies import (
    KVPolicy,
    Policy,
    SideBySidePolicy,
    SoftPromptPolicy,
    initial_soft_prompt,
    random_soft_prompt,
)
from edgepatch.training.precision import TRIED, choose_dtype
from edgepatch.training.trainer import Trainer

TRIAL_PAIRS = 256
"""So many pairs of each task are encoded to find those of middle length."""


class PatchTraining:
    """One training run of patches for the model in ``folder``.

    Args:
        folder: the base: a Transformers folder, or a GGUF file of 16 or 32 bits. Seed and canary are its.
        config: hyperparameters.
        weights: what to train on instead of the base's own weights: quantized GGUF files of it; each step draws one.
        run: folder for settings, checkpoint and curves; a run that was killed goes on from there. ``None`` keeps nothing.
        reference: the safer model, where ``config.dpo_reference`` is "model".
        device: "cpu" or "cuda".
        tell: takes a line for whoever watches: which type and which place of the seed were chosen where the configuration leaves them open.
        progress: told of the loading.
        teacher: whose distributions stage 1 learns in place of the chosen tokens; ``None`` for SFT.

    Raises:
        InputError: a model cannot be read.
        MismatchError: the weights are not of the base.
        MissingExtraError: torch, transformers or peft is not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        weights: Sequence[Path] = (),
        run: Path | None = None,
        reference: Path | None = None,
        device: str | None = None,
        tell: Callable[[str], None] = lambda line: None,
        progress: Progress = silent,
        teacher: Teacher | None = None,
    ) -> None:
        self.folder, self.reference, self._run = folder, reference, run
        self.teacher = teacher
        self.weights = list(weights)
        with stage(progress, "load model"):
            self.models = FrozenModels(self.weights or [folder], config, device or parallel.local_device())
            folders.read_spec(folder).require_same(self.models.spec)
        self.history, self._tell, self.config = History(), tell, self.models.config
        if self.models.place:
            tell(self.models.place)
        block, longest = self.config.block or 0, self.config.longest_row
        if block >= longest:
            tell(
                f"block {block}: no row is longer than {longest} tokens, so training never sees the "
                "seed move inside a text; front_tokens puts texts in front"
            )
        self._dtype_choice: dict[str, Any] = {}

    def start(self) -> SoftPrompt:
        """The soft prompt that training starts from."""
        base, count = self.models.base, self.config.num_virtual_tokens
        if self.config.init == "random":
            return random_soft_prompt(base, count, self.config.rng_seed)
        return initial_soft_prompt(base, self.models.tokenizer.encode(self.config.init_text, bos=False), count)

    def soft_prompt(
        self,
        pairs: Sequence[Pair],
        benign_texts: Sequence[BenignText],
        name: str,
        version: str = "0.1.0",
        progress: Progress = silent,
        company: Sequence[Patch] = (),
    ) -> Patch:
        """A patch whose soft prompt is trained; with seed and canary.

        Args:
            company: patches, perhaps of other vendors, beside which it is trained and which stay as they are.

        Raises:
            InputError: too few pairs, no benign text for the KL term, a run folder with other settings, or ``company`` that cannot stand
                beside the patch.
            MismatchError: ``company`` is for another base.
            TrainingError: the loss became NaN or infinite.
        """
        self._settle_dtype([pairs])  # the start is of the type that is trained on
        return self._train_segments(
            "soft_prompt", [pairs], [self.start()], benign_texts, [name], version, progress, company
        )[0]

    def kv_prefix(
        self,
        start: Patch,
        pairs: Sequence[Pair],
        benign_texts: Sequence[BenignText],
        name: str,
        version: str = "0.1.0",
        progress: Progress = silent,
        company: Sequence[Patch] = (),
    ) -> Patch:
        """A patch of trained keys and values, which starts from a trained patch's seed: same cost, more capacity.

        Args:
            start: has a seed for this base.
            company: as for ``soft_prompt``.

        Raises:
            InputError: ``start`` has no seed, or the model has windows or recurrent layers, where no K/V prefix stands alone.
            MismatchError: it is for another base.
        """
        start.base.require_same(self.models.spec)
        if start.kv_seed is None or not self.models.packs:
            raise InputError(
                "a K/V prefix starts from a patch with a seed, on a model with full attention in every layer",
                hint="train a soft prompt instead; it runs on every model",
            )
        return self._train_segments(
            "kv_prefix", [pairs], [start.kv_seed], benign_texts, [name], version, progress, company, start=start.digest
        )[0]

    def segments(
        self,
        tasks: Sequence[Sequence[Pair]],
        starts: Sequence[SoftPrompt | KVSeed],
        benign_texts: Sequence[BenignText],
        names: Sequence[str],
        version: str = "0.1.0",
        progress: Progress = silent,
        company: Sequence[Patch] = (),
    ) -> list[Patch]:
        """Patches trained jointly, each beside random others, so that any of them may be composed.

        Args:
            tasks: pairs of each segment.
            starts: of each segment: ``start``'s soft prompt, or what a patch trained before holds (successive training). A segment that
                starts from a seed is trained as a K/V prefix.
            names: of the patches.
            company: as for ``soft_prompt``.

        Raises:
            InputError: fewer than two segments, different numbers of them, or patches that cannot stand side by side.
        """
        if not 2 <= len(tasks) == len(starts) == len(names):
            raise InputError(
                f"joint training: expected two segments or more, each with pairs, start and name; found {len(tasks)}, {len(starts)}, {len(names)}"
            )
        return self._train_segments("side_by_side", tasks, starts, benign_texts, names, version, progress, company)

    def _train_segments(
        self,
        kind: str,
        tasks: Sequence[Sequence[Pair]],
        starts: Sequence[SoftPrompt | KVSeed],
        benign_texts: Sequence[BenignText],
        names: Sequence[str],
        version: str,
        progress: Progress,
        company: Sequence[Patch],
        **details: Any,
    ) -> list[Patch]:
        """One patch a task."""
        device = self.models.device
        segments = [KVPolicy(s, device) if isinstance(s, KVSeed) else SoftPromptPolicy(s, device) for s in starts]
        policy = self._beside(segments, names, version, company)
        if company:
            details["company"] = [patch.digest for patch in company]
        self._settle_dtype(tasks)
        record = self._train(policy, tasks, benign_texts, kind, progress, **details)
        trained = zip(names, segments, strict=True)
        return [
            self._patch(name, version, segment, record | ({"segment": i} if len(segments) > 1 else {}), progress)
            for i, (name, segment) in enumerate(trained)
        ]

    def _beside(
        self,
        segments: Sequence[SoftPromptPolicy | KVPolicy],
        names: Sequence[str],
        version: str,
        company: Sequence[Patch],
    ) -> Policy:
        """What is trained: one patch alone, or several that stand side by side."""
        if len(segments) + len(company) == 1:
            return segments[0]
        untrained = [self._untrained(segment, name, version) for segment, name in zip(segments, names, strict=True)]
        in_order([*untrained, *company])
        beside = SideBySidePolicy(segments, self.models.rotation, list(map(_seed_of, company)), self.models.device)
        require_room(beside.num_virtual_tokens, self.models.context)
        return beside

    def _untrained(self, segment: SoftPromptPolicy | KVPolicy, name: str, version: str) -> Patch:
        return Patch(name, version, self.models.spec, *_trained(segment))

    def _settle_dtype(self, tasks: Sequence[Sequence[Pair]]) -> None:
        """Chooses the type of the weights where the configuration leaves it open; a run that goes on keeps what it began with."""
        if self.config.dtype != "auto":
            return
        dtype, self._dtype_choice, line = parallel.from_first(lambda: self._known_dtype() or self._tried_dtype(tasks))
        self._tell(line)
        self.models.settle(dtype)
        self.config = self.models.config

    def _known_dtype(self) -> tuple[str, dict[str, Any], str] | None:
        settings = runs.known_settings(self._run)
        if settings is None:
            return None
        dtype = str(settings.get("config", {}).get("dtype"))
        if dtype not in TRIED:
            dtype = TRIED[0]  # the run that is there is refused, for its other settings
        return dtype, settings.get("dtype_choice", {}), f"dtype {dtype}: as {self._run} began with"

    def _tried_dtype(self, tasks: Sequence[Sequence[Pair]]) -> tuple[str, dict[str, Any], str]:
        examples = [self.models.pair_example(pair) for pairs in tasks for pair in pairs[:TRIAL_PAIRS]]
        config, policy = self.config, SoftPromptPolicy(self.start(), self.models.device)
        pairs_a_step = -(-config.batch_size // parallel.world()[1])
        at_once = min(config.micro_batch_size or pairs_a_step, pairs_a_step)
        choice = choose_dtype(
            self.models, policy, examples, at_once, pairs_a_step * (config.sft_steps + config.dpo_steps)
        )
        return choice.dtype, choice.as_dict(), str(choice)

    def _train(
        self,
        policy: Policy,
        tasks: Sequence[Sequence[Pair]],
        benign_texts: Sequence[BenignText],
        kind: str,
        progress: Progress,
        **details: Any,
    ) -> dict[str, Any]:
        """Trains the policy; the record of it."""
        began = time.monotonic()
        data = {
            "pairs_sha256": provenance.digest_of_json([[asdict(p) for p in pairs] for pairs in tasks]),
            "benign_texts_sha256": provenance.digest_of_json(list(benign_texts)),
        }
        settings = {
            "kind": kind,
            "config": asdict(self.config),
            "data": data,
            "weights": [p.name for p in self.weights],
            **({"dtype_choice": self._dtype_choice} if self._dtype_choice else {}),
            **({"teacher": self.teacher.identity} if self.teacher else {}),
            **details,
        }
        run = runs.Run(self._run, settings)
        self.models.num_virtual_tokens = policy.num_virtual_tokens
        with stage(progress, "tokenize"):
            trainer = Trainer(self.models, policy, tasks, benign_texts, run, self.reference, self.teacher)
        trainer.train(progress)
        self.history = trainer.history
        gain = {"teacher_gain": list(trainer.teacher_gain)} if trainer.teacher_gain else {}
        record = settings | {
            **gain,
            "num_pairs": sum(map(len, tasks)),
            "seconds": round(time.monotonic() - began, 1),
            "device": self.models.device,
            "final": {name: curve[-1] for name, curve in asdict(self.history).items() if curve},
            "software": provenance.versions(),
        }
        run.finish(self.history, record)
        return record

    def _patch(
        self,
        name: str,
        version: str,
        segment: SoftPromptPolicy | KVPolicy,
        record: dict[str, Any],
        progress: Progress,
    ) -> Patch:
        with stage(progress, "sketch"):
            sketch = weight_sketches.sketch_of(self.folder)
        patch = Patch(
            name,
            version,
            self.models.spec,
            *_trained(segment),
            training=record,
            weight_sketch=sketch,
            chat_template=self.models.tokenizer.chat_template_digest,
            tokenizer_probe=self.models.tokenizer.probe(),
            rotation=self.models.rotation if self.models.anchoring else None,  # which `complete` reads anyway
            anchoring=self.models.anchoring,
        )
        # Loaded afresh: training may have changed how the model in memory attends, and with it the last bits of the seed.
        with stage(progress, "seed and canary"):
            return seeds.complete(patch, folders.load_model(self.folder, self.models.device), self._tell)


def _trained(segment: SoftPromptPolicy | KVPolicy) -> tuple[SoftPrompt | None, KVSeed | None]:
    """What a patch holds of it."""
    return (segment.soft_prompt(), None) if isinstance(segment, SoftPromptPolicy) else (None, segment.kv_seed())


def _seed_of(patch: Patch) -> KVSeed:
    if patch.kv_seed is None:
        raise InputError(
            f"{patch.name} {patch.version} ({patch.digest[:12]}): expected a KV seed, found a soft prompt alone",
            hint="add the seed first: edgepatch convert seed",
        )
    return patch.kv_seed


def train_patch(
    folder: Path,
    pairs: Sequence[Pair],
    benign_texts: Sequence[BenignText],
    config: TrainConfig,
    name: str,
    version: str = "0.1.0",
    progress: Progress = silent,
) -> tuple[Patch, History]:
    """Trains a soft prompt on the base's own weights, in one go; arguments and errors as in ``PatchTraining``.

    Returns:
        The patch, with soft prompt, float16 seed and canary, and the curves.
    """
    training = PatchTraining(folder, config, progress=progress)
    patch = training.soft_prompt(pairs, benign_texts, name, version, progress)
    return patch, training.history
