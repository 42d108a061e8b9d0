"""LoRA adapters, trained as patches are: what a user would take in place of a patch, and the strongest teacher of one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError
from edgepatch.files.writing import new_folder
from edgepatch.progress import Progress, silent, stage
from edgepatch.training import parallel, runs
from edgepatch.training.config import History, TrainConfig
from edgepatch.training.distillation import Teacher
from edgepatch.training.frozen.forward import BenignText, FrozenModels
from edgepatch.training.pairs import provenance
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.policies import Policy
from edgepatch.training.trainer import Trainer


class LoRAPolicy(Policy):
    """Low-rank adapters on every linear layer of a copy of the base (PEFT LoRA): the usual alternative to a patch.

    Args:
        base: stays as it is.
        rank: r; alpha is 2 r.
        rng_seed: of their random start.
    """

    def __init__(self, base: Any, rank: int, rng_seed: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(rng_seed)
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():  # PEFT 0.21 asks Transformers 5.23 by an old name
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            self.adapted: Any = get_peft_model(copy.deepcopy(base), settings).eval()

    def parameters(self) -> list[Any]:
        return [p for p in self.adapted.parameters() if p.requires_grad]

    def model(self, base: Any) -> Any:
        return self.adapted


class LoRATraining:
    """One training run of a LoRA adapter; the counterpart of ``patching.PatchTraining``.

    Args:
        folder: the base: a Transformers folder, or a GGUF file, whose weights are dequantized.
        config: hyperparameters, of which those of virtual tokens mean nothing; its rates should be a tenth of a patch's.
        rank: r.
        run: folder for settings, checkpoint and curves; ``None`` keeps nothing.
        device: "cpu" or "cuda".
        teacher: as for ``PatchTraining``.

    Raises:
        InputError: the model cannot be read, or the configuration moves a seed.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        rank: int,
        run: Path | None = None,
        device: str | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        if config.block or config.turns:
            raise InputError(
                f"a LoRA adapter has no seed that moves, found block {config.block} and turns {config.turns}",
                hint="leave them out",
            )
        config = replace(config, block=0, turns=False)
        self.config, self.rank, self._run, self.teacher, self.history = config, rank, run, teacher, History()
        self.models = FrozenModels([folder], config, device or parallel.local_device())

    def train(
        self, pairs: Sequence[Pair], benign_texts: Sequence[BenignText], out: Path, progress: Progress = silent
    ) -> dict[str, Any]:
        """Trains the adapter and writes it as a PEFT folder; the record of it.

        Raises:
            InputError: as ``Trainer``, or the folder exists or cannot be written.
            TrainingError: as ``Trainer``.
        """
        policy = LoRAPolicy(self.models.base, self.rank, self.config.rng_seed)
        settings = {
            "kind": "lora",
            "rank": self.rank,
            "config": asdict(self.config),
            "pairs_sha256": provenance.digest_of_json([asdict(pair) for pair in pairs]),
            **({"teacher": self.teacher.identity} if self.teacher else {}),
        }
        run = runs.Run(self._run, settings)
        with stage(progress, "tokenize"):
            trainer = Trainer(self.models, policy, [pairs], benign_texts, run, teacher=self.teacher)
        trainer.train(progress)
        self.history = trainer.history
        run.finish(trainer.history, settings)
        if parallel.world()[0] == 0:
            with new_folder(out) as unfinished:
                policy.adapted.float().save_pretrained(unfinished)
        return settings
