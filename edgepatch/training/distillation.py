"""Distillation: what a teacher would answer next, at every token of the chosen answers, as the targets of the first stage.

The teacher is the same frozen model behind a safety text that the patch has to do without, or with a LoRA adapter. It reads the very
answers that the patch is trained on, behind the same texts and turns, so that its distributions are targets token by token. They are
computed once and kept in the run folder.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.converters.peft.lora import require_lora_of
from edgepatch.errors import InputError, TrainingError
from edgepatch.files.pretrained import load_adapter
from edgepatch.files.writing import write_atomically
from edgepatch.progress import Progress, silent
from edgepatch.training import parallel
from edgepatch.training.contexts import Contexts
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.frozen.rows import Example
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.pairs.provenance import digest_of, digest_of_json
from edgepatch.training.pairs.teacher_safety import paired_interval
from edgepatch.training.pairs.teachers import instructed, text_of

if TYPE_CHECKING:
    import torch

TARGETS_FILE = "teacher.safetensors"
FORMAT = "edgepatch-teacher/1"
EARLY_TOKENS, EARLY_WEIGHT = 8, 2.0
"""The first tokens of an answer decide what becomes of it (Qi et al., arXiv 2406.05946)."""

ROWS_AT_ONCE = 8


@dataclass(frozen=True)
class Teacher:
    """Who gives the targets.

    Attributes:
        texts: safety texts, of which each prompt's teacher reads one; may be empty beside an adapter.
        adapter: PEFT folder of a LoRA for the frozen model.
        is_any: go on where the teacher does not prefer the chosen answers more than the bare model does.
    """

    texts: tuple[str, ...] = ()
    adapter: Path | None = None
    is_any: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the targets."""
        adapter = {"adapter_sha256": digest_of(self.adapter)} if self.adapter else {}
        return {"texts": list(self.texts), **adapter}

    def model(self, base: Any) -> Any:
        """What evaluates the text: the base, or a copy of it with the adapter beside its weights.

        Raises:
            InputError: the adapter cannot be read, or is for another base.
        """
        if self.adapter is None:
            return base
        from peft import PeftModel

        require_lora_of(self.adapter, {name: tuple(value.shape) for name, value in base.named_parameters()})
        with warnings.catch_warnings():  # PEFT 0.21 asks Transformers 5.23 by an old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            return load_adapter(PeftModel, copy.deepcopy(base), self.adapter).eval()


@dataclass(frozen=True)
class Targets:
    """The teacher's distribution at each token of each example's first answer.

    Attributes:
        ids: (N, K) int32, the likeliest tokens; ``None`` where all V tokens are held, in their order.
        log_probs: (N, K) float16.
        log_rest: (N,) float16, of all other tokens together.
        starts: (E + 1,) int64: example i has the rows ``starts[i]`` to ``starts[i + 1]``.
        gain: nats by which the teacher prefers chosen to rejected answers more than the bare model; mean, and its 95 % interval.
    """

    ids: NDArray[np.int32] | None
    log_probs: NDArray[np.float16]
    log_rest: NDArray[np.float16]
    starts: NDArray[np.int64]
    gain: tuple[float, float, float]

    def of(self, examples: Sequence[int], device: str) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(ids, log-probabilities, log of the rest) of some examples, one after the other; float32, and of mass 1 together."""
        import torch

        rows = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in examples])
        ids = None if self.ids is None else torch.from_numpy(self.ids[rows].astype(np.int64)).to(device)
        top = torch.from_numpy(self.log_probs[rows].astype(np.float32)).to(device)
        rest = torch.from_numpy(self.log_rest[rows].astype(np.float32)).to(device)
        mass = torch.logaddexp(top.logsumexp(1), rest) if ids is not None else top.logsumexp(1)
        return ids, top - mass[:, None], rest - mass

    def weights(self, examples: Sequence[int], device: str) -> torch.Tensor:
        """(N,) weights of their tokens."""
        import torch

        places = torch.cat([torch.arange(int(self.starts[i + 1] - self.starts[i])) for i in examples])
        return torch.where(places < EARLY_TOKENS, EARLY_WEIGHT, 1.0).to(device)


def teacher_examples(
    models: FrozenModels, teacher: Teacher, pairs: Sequence[Pair], contexts: Contexts | None
) -> list[Example]:
    """The rows that the teacher reads: the student's answers, behind the safety text and what stands in front of the student's prompt.

    Raises:
        InputError: a row does not fit the model's context.
    """
    examples = []
    for i, pair in enumerate(pairs):
        placed = contexts.pair(pair, i) if contexts else pair
        plain = models.pair_example(placed)
        student = contexts.begun(plain, i) if contexts else plain
        prompt = plain.prompt
        if teacher.texts:
            prompt = models.encode_prompt(instructed(placed.prompt, text_of(pair.prompt, teacher.texts)))
        row = Example(prompt + student.prompt[len(plain.prompt) :], student.answers)
        longest = len(row.prompt) + max(map(len, row.answers))
        if longest > models.context:
            raise InputError(
                f"behind the teacher's safety text a pair has {longest} tokens, and the model's context holds {models.context}: "
                f"{str(pair.prompt)[:60]!r}",
                hint="shorten the safety text (--teacher-text) or what stands in front (--front-tokens)",
            )
        examples.append(row)
    return examples


def find_targets(
    models: FrozenModels,
    teacher: Teacher,
    examples: Sequence[Example],
    bare: NDArray[np.float32],
    top: int,
    folder: Path | None,
    progress: Progress = silent,
) -> Targets:
    """The targets, from the run folder where it has them.

    Args:
        models: the first of them teaches.
        teacher: who gives them.
        examples: of ``teacher_examples``.
        bare: (E, 2) log-probabilities of the answers under the bare model.
        top: so many likeliest tokens are kept; 0 keeps all.
        folder: of the run; ``None`` keeps nothing.
        progress: told of the rows.

    Raises:
        InputError: the run folder holds the targets of other pairs, another teacher or other settings.
        TrainingError: the teacher does not clearly prefer the chosen answers more than the bare model does.
    """
    digest = digest_of_json(
        {
            "base": [models.spec.as_dict(), models.folders[0].name, str(models.base.dtype)],
            "teacher": teacher.identity,
            "rows": [[list(e.prompt), [list(a) for a in e.answers]] for e in examples],
            "top": top,
        }
    )
    path = folder / TARGETS_FILE if folder else None
    if path is not None and path.is_file():
        targets = _read(path, digest)
    else:
        targets = _compute(models, teacher, examples, bare, top, progress)
        if path is not None and parallel.world()[0] == 0:
            _write(targets, path, digest)
    if not teacher.is_any:
        _require_better(targets.gain, len(examples))
    return targets


def _require_better(gain: tuple[float, float, float], num_pairs: int) -> None:
    mean, low, high = gain
    if not low > 0:
        raise TrainingError(
            f"the teacher does not clearly prefer the chosen answers: its margin over the rejected ones is {mean:+.3f} nats more than the bare "
            f"model's on {num_pairs} pairs (95 % interval {low:+.3f} to {high:+.3f})",
            hint="take the teacher that made the pairs, or a stronger one; or go on with --any-teacher",
        )


def _compute(
    models: FrozenModels,
    teacher: Teacher,
    examples: Sequence[Example],
    bare: NDArray[np.float32],
    top: int,
    progress: Progress,
) -> Targets:
    import torch

    from edgepatch.training.losses import answer_log_probabilities, likeliest

    model = teacher.model(models.base)
    rows: dict[int, tuple[Any, ...]] = {}
    margins = np.empty(len(examples))
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    with torch.no_grad():
        for start in range(0, len(order), ROWS_AT_ONCE):
            progress("teacher", start, len(order))
            for i in order[start : start + ROWS_AT_ONCE]:
                logits, targets, owners = models.predictions([examples[i]], model)
                sums = answer_log_probabilities(logits, targets, owners, 2)
                margins[i] = float(sums[0] - sums[1])
                rows[i] = tuple(
                    None if part is None else part.cpu().numpy() for part in likeliest(logits[owners == 0], top)
                )
    progress("teacher", len(order), len(order))
    parts = [rows[i] for i in range(len(examples))]
    ids = None if parts[0][0] is None else np.concatenate([part[0] for part in parts]).astype(np.int32)
    log_probs, log_rest = (np.concatenate([part[n] for part in parts]).astype(np.float16) for n in (1, 2))
    starts = np.concatenate([[0], np.cumsum([len(part[2]) for part in parts])]).astype(np.int64)
    return Targets(ids, log_probs, log_rest, starts, paired_interval(margins - (bare[:, 0] - bare[:, 1])))


def _write(targets: Targets, path: Path, digest: str) -> None:
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {} if targets.ids is None else {"ids": targets.ids}
    tensors |= {"log_probs": targets.log_probs, "log_rest": targets.log_rest, "starts": targets.starts}
    notes = {"format": FORMAT, "digest": digest, "gain": json.dumps(targets.gain)}
    write_atomically(path, save(tensors, metadata=notes))


def _read(path: Path, digest: str) -> Targets:
    from safetensors import SafetensorError, safe_open

    hint = "delete it to compute them again, or name another run folder"
    try:
        with safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the teacher's targets {path}: {error}", hint=hint) from None
    if notes.get("format") != FORMAT or notes.get("digest") != digest:
        raise InputError(
            f"{path} holds the targets of other pairs, another teacher or other settings: expected the digest {digest[:12]}, "
            f"found {str(notes.get('digest'))[:12]}",
            hint=hint,
        )
    mean, low, high = json.loads(notes["gain"])
    return Targets(tensors.get("ids"), tensors["log_probs"], tensors["log_rest"], tensors["starts"], (mean, low, high))
