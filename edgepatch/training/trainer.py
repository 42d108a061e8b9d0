"""Trains a soft prompt on a frozen model: SFT, then DPO with a KL tie to the bare model on benign text."""

from __future__ import annotations

import hashlib
import platform
import random
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepatch.canonical import canonical_json
from edgepatch.converters import fingerprints, hf
from edgepatch.errors import InputError, MissingExtraError, TrainingError
from edgepatch.patches import Patch
from edgepatch.tensors import SoftPrompt
from edgepatch.tokenizers import FolderTokenizer
from edgepatch.training.preferences import Pair

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called with (stage, step, steps of the stage, metrics) after every step."""


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters.

    Attributes:
        num_virtual_tokens: P.
        init_text: its token embeddings, repeated or cut to P rows, start the soft prompt.
        sft_steps, sft_learning_rate: stage 1.
        dpo_steps, dpo_learning_rate, beta: stage 2.
        batch_size: pairs a step.
        dpo_reference: whose log-probabilities DPO compares with: the bare model ("base") or the frozen result of
            stage 1 ("sft").
        kl_weight: weight of the KL term to the bare model on benign text, in both stages; 0 leaves it out.
        kl_batch_size: benign texts a step.
        max_tokens: longer examples are cut at the end.
        held_out: share of the pairs kept for the preference accuracy.
        rng_seed: of the order of examples.
    """

    num_virtual_tokens: int = 50
    init_text: str = "Continue in a kind, calm and respectful way, without insults or swearing."
    sft_steps: int = 150
    sft_learning_rate: float = 1e-2
    dpo_steps: int = 150
    dpo_learning_rate: float = 5e-3
    beta: float = 0.1
    batch_size: int = 8
    dpo_reference: str = "base"
    kl_weight: float = 1.0
    kl_batch_size: int = 4
    max_tokens: int = 96
    held_out: float = 0.1
    rng_seed: int = 1

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1 or self.batch_size < 1 or self.sft_steps < 0 or self.dpo_steps < 0:
            raise InputError("training: num_virtual_tokens and batch_size must be at least 1, steps at least 0")
        if self.dpo_reference not in ("base", "sft"):
            raise InputError(f"dpo_reference: expected base or sft, found {self.dpo_reference!r}")


@dataclass
class History:
    """Curves, one value a step (preference accuracy: one value a check)."""

    sft_loss: list[float] = field(default_factory=list)
    dpo_loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    preference_accuracy: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Right-padded examples: ``ids`` (B, T) int64, ``attention`` (B, T) int64, ``answer`` (B, T) bool."""

    ids: torch.Tensor
    attention: torch.Tensor
    answer: torch.Tensor


class PreferenceTrainer(ABC):
    """SFT and DPO of something trainable against the frozen model that it starts from.

    Args:
        folder: Transformers folder of the base model, or a GGUF file of it, whose weights are dequantized.
        config: hyperparameters.
        device: "cpu" or "cuda"; the default is a GPU where there is one.

    Raises:
        InputError: the folder cannot be read.
        MissingExtraError: torch, transformers or peft is not installed.
    """

    num_virtual_positions = 0
    """Positions that the trained model puts in front of the text."""

    def __init__(self, folder: Path, config: TrainConfig, device: str | None = None) -> None:
        try:
            import torch
        except ImportError:
            raise MissingExtraError("torch", "train") from None
        self.config, self.folder = config, folder
        self.spec = hf.read_spec(folder)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.base = hf.load_model(folder, self.device)
        torch.manual_seed(config.rng_seed)
        with hf.tokenizer_folder(folder) as self._tokenizer_folder:
            self.tokenizer = FolderTokenizer(self._tokenizer_folder)
            self.model = self._trainable_model()
        self.history = History()
        self._rng = random.Random(config.rng_seed)

    @abstractmethod
    def _trainable_model(self) -> Any:
        """A model called like the base model, in evaluation mode; what is trained in it has ``requires_grad``."""

    # Batches.

    def _encode(self, text: str, bos: bool) -> list[int]:
        return self.tokenizer.encode(text, bos)

    def _batch(self, examples: Sequence[tuple[str, str]]) -> Batch:
        import torch

        rows = [(self._encode(prompt, bos=True), self._encode(answer, bos=False)) for prompt, answer in examples]
        longest = min(self.config.max_tokens, max(len(p) + len(a) for p, a in rows))
        ids, attention, mask = (np.zeros((len(rows), longest), dtype=np.int64) for _ in range(3))
        for row, (start, end) in enumerate(rows):
            tokens = (start + end)[:longest]
            ids[row, : len(tokens)] = tokens
            attention[row, : len(tokens)] = 1
            mask[row, len(start) : len(tokens)] = 1
        as_tensors = [torch.from_numpy(a).to(self.device) for a in (ids, attention, mask)]
        return Batch(as_tensors[0], as_tensors[1], as_tensors[2].bool())

    def _draws(self, items: Sequence[Any], size: int) -> Iterator[list[Any]]:
        """Endless batches; every item comes once before one comes again."""
        order: list[Any] = []
        while True:
            while len(order) < size:
                order += self._rng.sample(list(items), len(items))
            yield order[:size]
            order = order[size:]

    # Forward passes.

    def _logits(self, batch: Batch) -> torch.Tensor:
        """(B, T, V) of the patched model, virtual positions removed."""
        output: torch.Tensor = self.model(input_ids=batch.ids, attention_mask=batch.attention).logits
        return output[:, self.num_virtual_positions :]

    def _base_logits(self, batch: Batch) -> torch.Tensor:
        import torch

        with torch.no_grad():
            output: torch.Tensor = self.base(input_ids=batch.ids, attention_mask=batch.attention).logits
        return output

    def _kl(self, texts: list[str]) -> torch.Tensor:
        from edgepatch.training.losses import kl_to_base

        batch = self._batch([("", text) for text in texts])
        return kl_to_base(self._base_logits(batch), self._logits(batch), batch.attention.bool())

    def _pair_log_probabilities(self, pairs: Sequence[Pair], patched: bool) -> torch.Tensor:
        """(2, B): chosen and rejected."""
        from edgepatch.training.losses import answer_log_probabilities

        batch = self._batch([(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs])
        logits = self._logits(batch) if patched else self._base_logits(batch)
        return answer_log_probabilities(logits, batch.ids, batch.answer).view(2, -1)

    # The two stages.

    def _optimize(
        self, stage: str, steps: int, learning_rate: float, loss_of: Callable[[], tuple[torch.Tensor, dict[str, float]]],
        texts: Sequence[str], progress: Progress,
    ) -> None:  # fmt: skip
        import torch

        if not steps:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        warmup = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, max(0.02, (steps - step) / (steps - warmup + 1)))
        )
        benign = self._draws(texts, self.config.kl_batch_size) if texts and self.config.kl_weight else None
        for step in range(1, steps + 1):
            loss, metrics = loss_of()
            if benign is not None:
                kl = self._kl(next(benign))
                loss = loss + self.config.kl_weight * kl
                metrics["kl"] = float(kl.detach())
                self.history.kl.append(metrics["kl"])
            if not torch.isfinite(loss):
                raise TrainingError(f"{stage}: the loss became {loss.item()} at step {step}", hint="lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress(stage, step, steps, metrics)

    def _run_sft(self, pairs: Sequence[Pair], texts: Sequence[str], progress: Progress) -> None:
        from edgepatch.training.losses import sft_loss

        draws = self._draws(pairs, self.config.batch_size)

        def loss_of() -> tuple[torch.Tensor, dict[str, float]]:
            batch = self._batch([(p.prompt, p.chosen) for p in next(draws)])
            loss = sft_loss(self._logits(batch), batch.ids, batch.answer)
            self.history.sft_loss.append(float(loss.detach()))
            return loss, {"loss": float(loss.detach())}

        self._optimize("SFT", self.config.sft_steps, self.config.sft_learning_rate, loss_of, texts, progress)

    def _run_dpo(self, pairs: Sequence[Pair], held_out: Sequence[Pair], texts: Sequence[str], progress: Progress) -> None:
        from edgepatch.training.losses import dpo_loss

        against_base = self.config.dpo_reference == "base"
        reference = self._reference_log_probabilities([*pairs, *held_out], patched=not against_base)
        draws = self._draws(list(zip(pairs, reference[: len(pairs)], strict=True)), self.config.batch_size)
        checks = 0

        def loss_of() -> tuple[torch.Tensor, dict[str, float]]:
            nonlocal checks
            import torch

            drawn = next(draws)
            policy = self._pair_log_probabilities([p for p, _ in drawn], patched=True)
            ref = torch.stack([r for _, r in drawn], dim=1)  # (2, B)
            loss = dpo_loss(policy[0], policy[1], ref[0], ref[1], self.config.beta)
            self.history.dpo_loss.append(float(loss.detach()))
            metrics = {"loss": float(loss.detach())}
            if checks % 25 == 0:
                self.history.preference_accuracy.append(self._accuracy(held_out, reference[len(pairs) :]))
            checks += 1
            return loss, {**metrics, "accuracy": self.history.preference_accuracy[-1]}

        self._optimize("DPO", self.config.dpo_steps, self.config.dpo_learning_rate, loss_of, texts, progress)
        self.history.preference_accuracy.append(self._accuracy(held_out, reference[len(pairs) :]))

    def _reference_log_probabilities(self, pairs: Sequence[Pair], patched: bool) -> list[torch.Tensor]:
        """(2,) chosen and rejected of each pair, computed once."""
        import torch

        rows: list[torch.Tensor] = []
        with torch.no_grad():
            for start in range(0, len(pairs), 16):
                rows += list(self._pair_log_probabilities(pairs[start : start + 16], patched).T)
        return rows

    def _accuracy(self, pairs: Sequence[Pair], reference: Sequence[torch.Tensor]) -> float:
        """Share of pairs whose implicit reward prefers the chosen answer (paired with the reference)."""
        policy = self._reference_log_probabilities(pairs, patched=True)
        wins = [float(p[0] - r[0] > p[1] - r[1]) for p, r in zip(policy, reference, strict=True)]
        return float(np.mean(wins)) if wins else float("nan")

    def train(self, pairs: Sequence[Pair], benign_texts: Sequence[str], progress: Progress = lambda *_: None) -> None:
        """SFT, then DPO; the result is in ``model``.

        Args:
            pairs: at least ten.
            benign_texts: for the KL term; may be empty only where ``kl_weight`` is 0.
            progress: see ``Progress``.

        Raises:
            InputError: too few pairs, or no benign text for the KL term.
            TrainingError: the loss became NaN or infinite.
        """
        if len(pairs) < 10:
            raise InputError(f"training needs at least 10 pairs, found {len(pairs)}", hint="make more with `edgepatch pairs`")
        if self.config.kl_weight and not benign_texts:
            raise InputError("the KL term needs benign text", hint="give benign text, or set the KL weight to 0")
        shuffled = self._rng.sample(list(pairs), len(pairs))
        count = max(1, int(len(pairs) * self.config.held_out))
        held_out, kept = shuffled[:count], shuffled[count:]
        self._run_sft(kept, benign_texts, progress)
        self._run_dpo(kept, held_out, benign_texts, progress)


class PatchTrainer(PreferenceTrainer):
    """A frozen model with a trainable soft prompt (PEFT prompt tuning)."""

    def __init__(self, folder: Path, config: TrainConfig, device: str | None = None) -> None:
        super().__init__(folder, config, device)
        self.num_virtual_positions = config.num_virtual_tokens

    def _trainable_model(self) -> PeftModel:
        try:
            from peft import PromptTuningConfig, get_peft_model
        except ImportError:
            raise MissingExtraError("peft", "train") from None
        settings = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.config.num_virtual_tokens,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=self.config.init_text,
            tokenizer_name_or_path=str(self._tokenizer_folder),
        )
        with warnings.catch_warnings():  # PEFT 0.21 asks Transformers 5.23 by an old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            return get_peft_model(self.base, settings).eval()

    def soft_prompt(self) -> SoftPrompt:
        """The current virtual tokens."""
        weight = self.model.get_prompt_embedding_to_save("default")
        return SoftPrompt(weight.detach().float().cpu().numpy())


def train_patch(
    folder: Path,
    pairs: Sequence[Pair],
    benign_texts: Sequence[str],
    config: TrainConfig,
    name: str,
    version: str = "0.1.0",
    progress: Progress = lambda *_: None,
) -> tuple[Patch, History]:
    """Trains a patch for the model in ``folder``, or in a GGUF file, and computes its seed.

    Returns:
        The patch, with soft prompt and float16 seed, and the curves.

    Raises:
        InputError, MissingExtraError, TrainingError: see ``PatchTrainer``.
    """
    import peft
    import torch
    import transformers

    began = time.monotonic()
    trainer = PatchTrainer(folder, config)
    trainer.train(pairs, benign_texts, progress)
    soft_prompt = trainer.soft_prompt()
    record = {
        "config": asdict(config),
        "num_pairs": len(pairs),
        "data": {"pairs_sha256": _digest([asdict(pair) for pair in pairs]), "benign_texts_sha256": _digest(list(benign_texts))},
        "seconds": round(time.monotonic() - began, 1),
        "device": trainer.device,
        "final": {name: curve[-1] for name, curve in asdict(trainer.history).items() if curve},
        "software": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip
    patch = Patch(
        name, version, trainer.spec, soft_prompt, training=record, weight_sketch=fingerprints.sketch_of(folder),
        chat_template=trainer.tokenizer.chat_template_digest,
    )  # fmt: skip
    patch = hf.complete(patch, trainer.base)
    return patch, trainer.history


def _digest(data: object) -> str:
    """SHA-256 of the canonical JSON: names what a patch was trained on without shipping it."""
    return hashlib.sha256(canonical_json(data)).hexdigest()
