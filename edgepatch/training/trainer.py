"""The two stages of training: SFT or distillation, then DPO, with a KL tie to the bare model on benign text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepatch.errors import InputError, TrainingError
from edgepatch.interrupts import held_back
from edgepatch.progress import Progress, silent, stage
from edgepatch.training import parallel
from edgepatch.training.config import History, TrainConfig
from edgepatch.training.contexts import Contexts
from edgepatch.training.distillation import Teacher, find_targets, teacher_examples
from edgepatch.training.frozen.forward import BenignText, FrozenModels, tokenizer_of
from edgepatch.training.frozen.memory import Memory
from edgepatch.training.frozen.rows import Example, batch_plan
from edgepatch.training.objectives import CrossEntropy, Distillation, Objective, Preference, Student, answer_table
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.policies import Policy
from edgepatch.training.runs import Checkpoint, Run

if TYPE_CHECKING:
    import torch

LEAST_PAIRS = 10
HELD_OUT_TEXTS = 16


def require_trainable(
    config: TrainConfig, tasks: Sequence[Sequence[Pair]], benign_texts: Sequence[BenignText], has_reference: bool
) -> None:
    """Checks what is known before a model is loaded; arguments as of ``Trainer``.

    Raises:
        InputError: too few pairs, no benign text for the KL term, or a reference without its use.
    """
    for pairs in tasks:
        if len(pairs) < LEAST_PAIRS:
            raise InputError(
                f"training needs at least {LEAST_PAIRS} pairs, found {len(pairs)}",
                hint="make more with `edgepatch pairs`",
            )
    if config.kl_weight and not benign_texts:
        raise InputError("the KL term needs benign text", hint="give benign text, or set the KL weight to 0")
    if (config.dpo_reference == "model") != has_reference:
        raise InputError(
            f"dpo_reference {config.dpo_reference}: the reference model is {'not used' if has_reference else 'missing'}",
            hint="name a safer model together with dpo_reference model",
        )


class Trainer:
    """Trains one policy.

    Args:
        models: the frozen models; each step draws one of them.
        policy: what is trained.
        tasks: pairs of each task: one for a patch, one a segment for a composition. At least ten pairs each.
        benign_texts: for the KL term; may be empty only where ``kl_weight`` is 0.
        run: where checkpoints go.
        reference: the safer model, where ``config.dpo_reference`` is "model"; it may have another tokenizer.
        teacher: whose distributions stage 1 learns in place of the chosen tokens; ``None`` for SFT.

    Raises:
        InputError: too few pairs, no benign text for the KL term, or a pair that cannot be trained on.
    """

    def __init__(
        self,
        models: FrozenModels,
        policy: Policy,
        tasks: Sequence[Sequence[Pair]],
        benign_texts: Sequence[BenignText],
        run: Run | None = None,
        reference: Path | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        config = models.config
        require_trainable(config, tasks, benign_texts, reference is not None)
        processes = parallel.world()[1]
        if processes > min(config.batch_size, *(len(pairs) for pairs in tasks)):
            raise InputError(
                f"{processes} processes share batches of {config.batch_size} pairs: each needs at least one",
                hint="start fewer processes, or raise the batch size",
            )
        self.models, self.policy, self.config, self.reference = models, policy, config, reference
        self.teacher, self.teacher_gain = teacher, tuple[float, ...]()
        self.run, self.history = run or Run(None), History()
        self._tasks = [_split(config, pairs, f"task {i}") for i, pairs in enumerate(tasks)]
        texts, held_out = _split(config, benign_texts, "benign", HELD_OUT_TEXTS) if config.kl_weight else ([], [])
        self._contexts = _contexts(models, [pair for kept, _ in self._tasks for pair in kept], texts, reference)
        self._benign, self._held_benign = (self._benign_examples(part) for part in (texts, held_out))
        examples = iter(self._pair_examples(models))
        self._pairs = [[next(examples) for _ in kept] for kept, _ in self._tasks]
        self._held_pairs = list(examples)
        self._reference: list[torch.Tensor] = []
        self._objectives: list[Objective] = [CrossEntropy(pairs) for pairs in self._pairs]
        self._best: dict[str, torch.Tensor] = {}
        self._best_check, self._checks_since = -np.inf, 0
        self._place: tuple[str, int, torch.optim.Optimizer | None] = "SFT", 0, None  # stage, its steps that are done

    def _benign_examples(self, texts: Sequence[BenignText]) -> list[Example]:
        contexts = self._contexts
        placed = [contexts.benign(text, i) for i, text in enumerate(texts)] if contexts else texts
        return [self.models.benign_example(text) for text in placed]

    def _pair_examples(self, models: FrozenModels) -> list[Example]:
        """All pairs in their places: those of each task, then the held-out ones."""
        pairs = [p for kept, _ in self._tasks for p in kept] + [p for _, held in self._tasks for p in held]
        contexts = self._contexts
        if contexts is None:
            return [models.pair_example(pair) for pair in pairs]
        return [contexts.begun(models.pair_example(contexts.pair(pair, i)), i) for i, pair in enumerate(pairs)]

    def train(self, progress: Progress = silent) -> None:
        """SFT, then DPO; the result is in the policy. Goes on from the run's checkpoint where it has one.

        Args:
            progress: told of every step, with the terms of the loss and the last held-out accuracy.

        Raises:
            TrainingError: a loss became NaN or infinite; the last checkpoint is kept.
            KeyboardInterrupt: as raised; the present state is kept.
        """
        checkpoint = self.run.load(self.models.device)
        stage, step, optimizer = ("SFT", 0, {}) if checkpoint is None else self._restore(checkpoint)
        self._place = stage, step, None
        try:
            if self.teacher and self.config.sft_steps and stage != "done":
                self._objectives = self._taught(self.teacher, progress)
            if stage == "SFT":
                self._optimize("SFT", step, optimizer, progress)
                stage, step, optimizer = "DPO", 0, {}
            if stage == "DPO":
                self._place = stage, step, None
                if self.config.dpo_steps:
                    self._reference = self._reference or self._reference_table(progress)
                self._optimize("DPO", step, optimizer, progress)
                with held_back():
                    if self._best and self.config.patience:
                        self.policy.load_state(self._best)
                    self._place = "done", 0, None
            self.run.save(self._checkpoint("done", 0, {}))
        except KeyboardInterrupt:
            self._keep(checkpoint)
            raise

    # The loop.

    def _keep(self, checkpoint: Checkpoint | None) -> None:
        """Saves what is done since the run began or went on."""
        stage, step, optimizer = self._place
        if optimizer is None and checkpoint is not None and (checkpoint.stage, checkpoint.step) == (stage, step):
            return  # the checkpoint holds an optimizer's state that was not read yet
        with held_back():
            self.run.save(self._checkpoint(stage, step, {} if optimizer is None else optimizer.state_dict()))

    def _optimize(self, stage: str, start: int, state: dict[str, Any], progress: Progress) -> None:
        import torch

        steps, rate = (
            (self.config.sft_steps, self.config.sft_learning_rate)
            if stage == "SFT"
            else (self.config.dpo_steps, self.config.dpo_learning_rate)
        )
        label = "distillation" if stage == "SFT" and self.teacher else stage
        parameters = self.policy.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        if state:
            optimizer.load_state_dict(state)
        self._place = stage, start, optimizer
        if start < steps:
            progress(label, start, steps)
        for step in range(start, steps):
            # A run that goes on where a check had just been made does not repeat it.
            num_checks, every = len(self.history.preference_accuracy), self.config.check_every
            if stage == "DPO" and step % every == 0 and num_checks == step // every:
                self._check()
            if stage == "DPO" and 0 < self.config.patience <= self._checks_since:
                return
            optimizer.param_groups[0]["lr"] = rate * _rate_factor(step, steps)
            metrics = self._step(stage, step, parameters)
            with held_back():  # whoever goes on needs a whole step, and its curves
                optimizer.step()
                self.history.record(label, metrics)
                self._place = stage, step + 1, optimizer
            progress(label, step + 1, steps, **metrics, **self.history.last_accuracy())
            if self.run.is_due(step + 1):
                self.run.save(self._checkpoint(stage, step + 1, optimizer.state_dict()))
        if stage == "DPO" and steps and len(self.history.preference_accuracy) == -(-steps // self.config.check_every):
            self._check()

    def _step(self, stage: str, step: int, parameters: Sequence[torch.nn.Parameter]) -> dict[str, float]:
        """Leaves the gradient of one step in the parameters; the metrics."""
        import torch

        rng = random.Random(f"{self.config.rng_seed}-{stage}-{step}")
        which, task = rng.randrange(len(self.models.bases)), step % len(self._tasks)
        self.policy.prepare(rng, task)
        for parameter in parameters:
            parameter.grad = None
        with self._shared_memory(which) as (memory, embeddings):
            metrics = {"loss": self._preference_gradient(stage, step, which, task, memory, embeddings)}
            if self._benign:
                metrics["kl"] = self._kl_gradient(stage, step, which, memory, embeddings)
        gradients = [p.grad for p in parameters if p.grad is not None]
        parallel.add_up(gradients)
        if not all(np.isfinite(value) for value in metrics.values()):
            prompts = [str(self._tasks[task][0][i].prompt)[:40] for i in self._batch_of(stage, step, task)]
            raise TrainingError(
                f"{stage}, step {step + 1}: the loss became {metrics}; "
                f"the batch is task {task}: {'; '.join(map(repr, prompts))}",
                hint="lower the learning rate; the last checkpoint is kept",
            )
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return metrics

    @contextmanager
    def _shared_memory(self, which: int) -> Iterator[tuple[Memory, torch.Tensor | None]]:
        """The virtual tokens, evaluated once: the terms of the loss add to the gradient of their keys and values, which is passed on at the end."""
        import torch

        tensors: list[torch.Tensor]
        if self.models.packs:
            memory = self.policy.memory(self.models.bases[which])
            tensors = [t for pair in memory for t in pair]
        else:
            embeddings = self.policy.embeddings()
            tensors = [] if embeddings is None else [embeddings]
        leaves = [t.detach().requires_grad_() for t in tensors]
        if self.models.packs:
            yield list(zip(leaves[::2], leaves[1::2], strict=True)), None
        else:
            yield [], leaves[0] if leaves else None
        moved = [
            (t, leaf.grad) for t, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None and t.requires_grad
        ]
        if moved:
            torch.autograd.backward([t for t, _ in moved], [g for _, g in moved])

    # The terms of the loss; each leaves its gradient and returns its value over the whole batch.

    def _batch_of(self, stage: str, step: int, task: int) -> list[int]:
        lengths = [e.length for e in self._pairs[task]]
        size = min(self.config.batch_size, len(lengths))
        return batch_plan(lengths, size, step // len(self._tasks), f"{self.config.rng_seed}-{stage}-{task}")

    def _preference_gradient(
        self, stage: str, step: int, which: int, task: int, memory: Memory, embeddings: torch.Tensor | None
    ) -> float:
        batch = self._batch_of(stage, step, task)
        student = Student(self.models, self.policy.model(self.models.bases[which]), memory, embeddings)
        objective, total = self._objective(stage, which, task), 0.0
        for part in _parts(parallel.share(batch), self.config.micro_batch_size):
            loss = objective.loss(student, part, batch)
            loss.backward()
            total += float(loss.detach())
        return parallel.summed(total, self.models.device)

    def _objective(self, stage: str, which: int, task: int) -> Objective:
        if stage == "SFT":
            return self._objectives[task]
        first = sum(map(len, self._pairs[:task]))
        reference = self._reference[which][first : first + len(self._pairs[task])]
        return Preference(self._pairs[task], reference, self.config.beta, self.config.nll_weight)

    def _taught(self, teacher: Teacher, progress: Progress) -> list[Objective]:
        """Stage 1 with a teacher, one objective a task; it is asked here, or its targets come from the run folder."""
        examples = [e for pairs in self._pairs for e in pairs]
        if self.config.dpo_reference == "base":  # which DPO needs anyway
            self._reference = self._reference or self._reference_table(progress)
            bare = self._reference[0][: len(examples)]
        else:
            bare = answer_table(self._student(0, patched=False), examples, progress)
        rows = teacher_examples(self.models, teacher, [p for kept, _ in self._tasks for p in kept], self._contexts)
        top, folder = self.config.distill_top, self.run.folder
        targets = find_targets(self.models, teacher, rows, bare.cpu().numpy(), top, folder, progress)
        self.teacher_gain = targets.gain
        starts = [sum(map(len, self._pairs[:task])) for task in range(len(self._pairs))]
        return [Distillation(pairs, targets, start) for pairs, start in zip(self._pairs, starts, strict=True)]

    def _kl_gradient(self, stage: str, step: int, which: int, memory: Memory, embeddings: torch.Tensor | None) -> float:
        import torch

        from edgepatch.training.losses import kl_to_base

        lengths = [e.length for e in self._benign]
        drawn = batch_plan(
            lengths, min(self.config.kl_batch_size, len(lengths)), step, f"{self.config.rng_seed}-{stage}-benign"
        )
        num_tokens = sum(len(self._benign[i].answers[0]) for i in drawn)
        mine = parallel.share(drawn)
        if not mine:
            return parallel.summed(0.0, self.models.device)
        bare = torch.cat([self.models.bare_logits(which, i, self._benign[i]) for i in mine])
        logits = self.models.logits_of(
            [self._benign[i] for i in mine], self.policy.model(self.models.bases[which]), memory, embeddings
        )
        kl = kl_to_base(bare, logits) / num_tokens
        (self.config.kl_weight * kl).backward()
        return parallel.summed(float(kl.detach()), self.models.device)

    # The reference of DPO.

    def _reference_table(self, progress: Progress) -> list[torch.Tensor]:
        """For each frozen model (N, 2): chosen and rejected of all pairs, then of the held-out ones; computed once."""
        if self.config.dpo_reference == "model":
            assert self.reference is not None  # checked at the start
            with stage(progress, "load reference"):
                bare = replace(self.config, block=0, turns=False)  # no seed is in front of it
                other = FrozenModels([self.reference], bare, self.models.device, self.models.trusted)
            table = answer_table(Student(other, other.base, []), self._pair_examples(other), progress)
            return [table] * len(self.models.bases)
        patched = self.config.dpo_reference == "sft"
        self.policy.prepare_whole()
        examples = [e for pairs in self._pairs for e in pairs] + self._held_pairs
        return [
            answer_table(self._student(which, patched), examples, progress) for which in range(len(self.models.bases))
        ]

    def _student(self, which: int, patched: bool = True) -> Student:
        """A frozen model with the policy as it is now, without a gradient, or bare."""
        import torch

        base = self.models.bases[which]
        if not patched:
            return Student(self.models, base, [])
        with torch.no_grad():
            memory = self.policy.memory(base) if self.models.packs else []
        embeddings = None if self.models.packs else self.policy.embeddings()
        return Student(self.models, self.policy.model(base), memory, embeddings)

    # Checks on what is held out.

    def _check(self) -> None:
        """Measures, and remembers the best state."""
        self.policy.prepare_whole()
        accuracy, kl = self._accuracy(), self._held_out_kl()
        with held_back():
            self.history.preference_accuracy.append(accuracy)
            self.history.held_out_kl.append(kl)
            if accuracy - kl > self._best_check:
                self._best, self._best_check, self._checks_since = self.policy.state(), accuracy - kl, 0
            else:
                self._checks_since += 1

    def _accuracy(self) -> float:
        """Share of held-out pairs whose implicit reward prefers the chosen answer, on the first frozen model."""
        if not self._held_pairs or not self._reference:
            return float("nan")
        policy = answer_table(self._student(0), self._held_pairs)
        gain = policy - self._reference[0][len(self._reference[0]) - len(self._held_pairs) :]
        return float((gain[:, 0] > gain[:, 1]).float().mean())

    def _held_out_kl(self) -> float:
        """KL to the bare model in nats a token on held-out benign text, on the first frozen model; 0 without any."""
        import torch

        from edgepatch.training.losses import kl_to_base

        if not self._held_benign:
            return 0.0
        with torch.no_grad():
            logits = self._student(0).logits(self._held_benign)
            bare = self.models.logits_of(self._held_benign, self.models.base, [], None)
            return float(kl_to_base(bare, logits) / len(bare))

    # Checkpoints.

    def _checkpoint(self, stage: str, step: int, optimizer: dict[str, Any]) -> Checkpoint:
        return Checkpoint(
            stage,
            step,
            self.policy.state(),
            optimizer,
            self._best,
            float(self._best_check),
            self._checks_since,
            self._reference,
            asdict(self.history),
        )

    def _restore(self, checkpoint: Checkpoint) -> tuple[str, int, dict[str, Any]]:
        self.policy.load_state(checkpoint.policy)
        self._best, self._best_check, self._checks_since = (
            checkpoint.best,
            checkpoint.best_check,
            checkpoint.checks_since,
        )
        self._reference, self.history = checkpoint.reference, History(**checkpoint.history)
        return checkpoint.stage, checkpoint.step, checkpoint.optimizer


def _contexts(
    models: FrozenModels, pairs: Sequence[Pair], benign_texts: Sequence[BenignText], reference: Path | None
) -> Contexts | None:
    """What stands in front of pairs and texts, where something does; earlier turns only where every model knows turns."""
    config = models.config
    if not config.front_tokens:
        return None
    others = [tokenizer_of(reference)] if reference else []
    has_turns = all(tokenizer.chat_template for tokenizer in (models.tokenizer, *others))
    return Contexts(pairs, benign_texts, config.front_tokens, config.rng_seed, has_turns)


def _split(config: TrainConfig, items: Sequence[Any], name: str, most: int = 1 << 30) -> tuple[list[Any], list[Any]]:
    """(for training, held out)."""
    order = random.Random(f"{config.rng_seed}-{name}").sample(list(items), len(items))
    count = min(most, max(1, int(len(order) * config.held_out))) if len(order) > 1 else 0
    return order[count:], order[:count]


def _rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then linear decay to 2 %."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, max(0.02, (steps - step) / (steps - warmup + 1)))


def _parts(items: Sequence[int], size: int) -> list[list[int]]:
    """Runs of at most ``size``; 0 takes all at once."""
    size = size or len(items) or 1
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
