"""SFT, DPO and KL losses, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    rows = F.cross_entropy(logits.float(), targets, reduction="none")
    return torch.zeros(num_answers, dtype=rows.dtype, device=rows.device).index_add(0, owners, -rows)


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
    base, patched = (F.log_softmax(x.float(), dim=-1) for x in (base_logits, logits))
    return F.kl_div(patched, base, log_target=True, reduction="sum")
