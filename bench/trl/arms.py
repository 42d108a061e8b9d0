"""The same training job in PEFT + TRL and in our trainer: same start, same batches in the same order, float32, no dropout.

TRL is the oracle of the losses (tests/bench/test_trl.py) and the yardstick of the speed (bench/trl/run.py), and no dependency of training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgepatch.files.pretrained import load_pretrained, load_pretrained_model
from edgepatch.prompts.sets import load_benign_text
from edgepatch.tensors import SoftPrompt
from edgepatch.training.config import TrainConfig
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.policies import SoftPromptPolicy, initial_soft_prompt
from edgepatch.training.trainer import Trainer, _rate_factor

Stage = Literal["SFT", "DPO"]

INIT_TEXT = "Continue in a kind, calm and respectful way, without insults or swearing."


@dataclass
class Course:
    """What an arm did.

    Attributes:
        losses: of each step, before its update.
        ended: wall-clock second at which each step ended.
        worked: CPU second of the process at the same moments.
    """

    losses: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)

    def note(self, loss: float) -> None:
        """The end of a step."""
        self.losses.append(loss)
        self.ended.append(time.perf_counter())
        self.worked.append(time.process_time())


def make_pairs(model: Path, count: int) -> list[Pair]:
    """Pairs of the lengths that the lab trains on (prompts of 8 to 27 words, answers of 12 to 23), cut from texts that ship.

    Answers end with the spelled end token, as TRL writes them.
    """
    end = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    texts = [text.split() for text in load_benign_text("train")]

    def answer(number: int) -> str:
        words = texts[number % len(texts)]
        return f" {' '.join(words[20 : 32 + number % 12])}{end}"

    prompts = [" ".join(texts[i % len(texts)][: 8 + i % 20]) for i in range(count)]
    return [Pair(prompt, answer(i), answer(i + 7), 0.0, 1.0) for i, prompt in enumerate(prompts)]


def config_of(
    stage: Stage, steps: int, num_virtual_tokens: int, batch_size: int, rate: float = 5e-3, reference: str = "base"
) -> TrainConfig:
    """One stage alone, without what TRL does not do: KL term, checks."""
    return TrainConfig(
        block=0,  # TRL knows no moving seed
        turns=False,
        num_virtual_tokens=num_virtual_tokens,
        sft_steps=steps if stage == "SFT" else 0,
        dpo_steps=steps if stage == "DPO" else 0,
        sft_learning_rate=rate,
        dpo_learning_rate=rate,
        batch_size=batch_size,
        dpo_reference=reference,
        kl_weight=0.0,
        check_every=steps + 1,
        max_tokens=256,
        dtype="float32",
    )


class OwnArm:
    """Our trainer."""

    def __init__(
        self, model: Path, stage: Stage, pairs: Sequence[Pair], config: TrainConfig, start: SoftPrompt | None = None
    ) -> None:
        self.stage, self.config = stage, config
        models = FrozenModels([model], config, "cpu", trusted=True)
        self.policy = SoftPromptPolicy(start or start_of(models, config.num_virtual_tokens), "cpu")
        self.trainer = Trainer(models, self.policy, [pairs], [])

    def plan(self, steps: int) -> list[Pair]:
        """The pairs of all steps in order."""
        kept = self.trainer._tasks[0][0]
        return [kept[i] for step in range(steps) for i in self.trainer._batch_of(self.stage, step, 0)]

    def run(self, after: Callable[[SoftPrompt], None] = lambda _: None) -> Course:
        """Trains; ``after`` is called with the soft prompt behind every step."""
        course = Course()

        def progress(stage: str, step: int, steps: int, /, **figures: float) -> None:
            if "loss" not in figures:
                return  # no step was done
            course.note(figures["loss"])
            after(self.policy.soft_prompt())

        self.trainer.train(progress)
        return course


def start_of(models: FrozenModels, num_virtual_tokens: int) -> SoftPrompt:
    """The soft prompt that both start from."""
    return initial_soft_prompt(models.base, models.tokenizer.encode(INIT_TEXT, bos=False), num_virtual_tokens)


class TrlArm:
    """PEFT prompt tuning in TRL's trainers.

    Args:
        model: Transformers folder.
        stage: "SFT" or "DPO".
        pairs: of all steps in order.
        config: ours, of which TRL gets what it has.
        start: the soft prompt's first values; with ``dpo_reference`` "sft" also the frozen reference.
        folder: for what TRL writes.
    """

    def __init__(
        self, model: Path, stage: Stage, pairs: Sequence[Pair], config: TrainConfig, start: SoftPrompt, folder: Path
    ) -> None:
        import torch
        from datasets import Dataset
        from peft import PromptTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.stage, self.config = stage, config
        base = load_pretrained_model(AutoModelForCausalLM, model, dtype=torch.float32)
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens)
        names = ("prompt", "completion") if stage == "SFT" else ("prompt", "chosen", "rejected")
        rows = [dict(zip(names, (p.prompt, p.chosen, p.rejected), strict=False)) for p in pairs]
        # A trainer that makes the adapter compares with the bare model; one that is given it keeps a frozen copy as the reference.
        arguments: dict[str, Any] = {"model": base, "peft_config": settings}
        if config.dpo_reference == "sft":
            arguments = {"model": get_peft_model(base, settings)}
            self._put(arguments["model"], start)
        self.trainer = self._trainer_class()(
            args=self._arguments(len(rows), folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_pretrained(AutoTokenizer, model),
            **arguments,
        )
        self.put(start)

    def _trainer_class(self) -> Any:
        from trl import DPOTrainer, SFTTrainer

        return SFTTrainer if self.stage == "SFT" else DPOTrainer

    def _arguments(self, num_rows: int, folder: Path) -> Any:
        from trl import DPOConfig, SFTConfig

        shared: dict[str, Any] = {
            "output_dir": str(folder),
            "per_device_train_batch_size": self.config.batch_size,
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "learning_rate": self.config.sft_learning_rate,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "max_length": None,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        if self.stage == "SFT":
            return SFTConfig(**shared)
        return DPOConfig(**shared, beta=self.config.beta, precompute_ref_log_probs=True)

    @staticmethod
    def _put(model: Any, soft_prompt: SoftPrompt) -> None:
        import torch

        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(torch.from_numpy(soft_prompt.embeddings))

    def put(self, soft_prompt: SoftPrompt) -> None:
        """Sets the policy's virtual tokens."""
        self._put(self.trainer.model, soft_prompt)

    def loss(self, step: int) -> float:
        """TRL's loss of the present policy on a step's batch."""
        import torch

        size = self.config.batch_size
        rows = [self.trainer.train_dataset[i] for i in range(step * size, (step + 1) * size)]
        with torch.no_grad():
            return float(self.trainer.compute_loss(self.trainer.model, self.trainer.data_collator(rows)))

    def run(self) -> Course:
        """Trains as our trainer does: same optimizer, same learning rate at every step."""
        import torch

        steps = len(self.trainer.train_dataset) // self.config.batch_size
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.config.sft_learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(min(step, steps - 1), steps))
        self.trainer.optimizer, self.trainer.lr_scheduler = optimizer, schedule
        course = Course()
        plain = self.trainer.training_step

        def noted(*arguments: Any, **named: Any) -> Any:
            # The step before ends here: optimizer and logging belong to it.
            loss = plain(*arguments, **named)
            course.note(float(loss))
            return loss

        self.trainer.training_step = noted
        self.trainer.train()
        return course
