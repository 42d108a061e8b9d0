"""SFT, DPO, KL and distillation losses, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 16
"""Rows of logits that are taken to float32 at once: of a vocabulary of 50,000 they stay in a processor's cache."""


def answer_log_probabilities(logits: Tensor, targets: Tensor, owners: Tensor, num_answers: int) -> Tensor:
    """Log-probability of each answer.

    Args:
        logits: (N, V) at the positions that predict the answers' tokens.
        targets: (N,) int64, those tokens.
        owners: (N,) int64, the answer that each belongs to.
        num_answers: A.

    Returns:
        (A,) sums of log-probabilities, float32.
    """
    rows: Tensor = _TokenLogProbabilities.apply(logits, targets, logits.requires_grad)  # type: ignore[no-untyped-call]
    return torch.zeros(num_answers, dtype=rows.dtype, device=rows.device).index_add(0, owners, rows)


def dpo_losses(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected))) (Rafailov et al. 2023, equation 7).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (B,) answer log-probabilities under policy and reference.
        beta: strength of the tie to the reference.

    Returns:
        (B,) one loss a pair.
    """
    return -F.logsigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))


def kl_to_base(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(base || patched), summed over tokens of benign text (MOSAIC, arXiv 2603.16210).

    Args:
        base_logits: (N, V) of the bare model.
        logits: (N, V) of the patched model at the same positions.
    """
    total: Tensor = _KLDivergence.apply(base_logits, logits, logits.requires_grad)  # type: ignore[no-untyped-call]
    return total


def likeliest(logits: Tensor, top: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """A distribution as its likeliest tokens and the rest.

    Args:
        logits: (N, V).
        top: K; 0, or V and more, keeps all.

    Returns:
        (N, K) int64 ids, or ``None`` where all are kept; their log-probabilities (N, K); and (N,) that of all others together, which is
        minus infinity where there are none.
    """
    logits = logits.float()
    log_probs = logits.log_softmax(-1)
    if not 0 < top < logits.shape[1]:
        return None, log_probs, torch.full_like(log_probs[:, 0], -torch.inf)
    values, ids = log_probs.topk(top, dim=-1)
    return ids, values, log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)


def distillation_losses(logits: Tensor, ids: Tensor | None, log_probs: Tensor, log_rest: Tensor) -> Tensor:
    """KL(teacher || student) of each token, where all tokens that the teacher does not name count as one.

    Args:
        logits: (N, V) of the student.
        ids, log_probs, log_rest: of the teacher, as ``likeliest`` gives them.

    Returns:
        (N,) nats.
    """
    student = logits.float().log_softmax(-1)
    if ids is None:
        return F.kl_div(student, log_probs, log_target=True, reduction="none").sum(-1)
    named = F.kl_div(student.gather(1, ids), log_probs, log_target=True, reduction="none").sum(-1)
    rest = student.scatter(1, ids, -torch.inf).logsumexp(-1)
    return named + F.kl_div(rest, log_rest, log_target=True, reduction="none")


class _TokenLogProbabilities(torch.autograd.Function):
    """Log-probabilities of the targets; all that is kept is the distribution, in the type of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        chosen = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        distribution = torch.empty_like(logits) if needs_gradient else logits[:0]
        for rows in _chunks(len(logits)):
            logs = F.log_softmax(logits[rows].float(), dim=-1)
            chosen[rows] = logs.gather(1, targets[rows, None])[:, 0]
            if needs_gradient:
                distribution[rows] = logs.exp_()
        ctx.save_for_backward(distribution, targets)
        return chosen

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        distribution, targets = ctx.saved_tensors
        outer = gradients[0].to(distribution.dtype)
        gradient = distribution * -outer[:, None]
        gradient[torch.arange(len(targets), device=targets.device), targets] += outer
        return gradient, None, None


class _KLDivergence(torch.autograd.Function):
    """The sum over rows; its gradient is known when it is computed."""

    @staticmethod
    def forward(ctx: Any, base_logits: Tensor, logits: Tensor, needs_gradient: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if needs_gradient else logits[:0]
        for rows in _chunks(len(logits)):
            base, patched = (F.log_softmax(x[rows].float(), dim=-1) for x in (base_logits, logits))
            probabilities = base.exp()
            total += (probabilities * base.sub_(patched)).sum()
            if needs_gradient:
                gradient[rows] = patched.exp_().sub_(probabilities)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * gradients[0].to(gradient.dtype), None


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK_ROWS) for start in range(0, count, CHUNK_ROWS)]
