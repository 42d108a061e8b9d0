"""SFT, DPO and KL losses on right-padded batches, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_log_probabilities(logits: Tensor, ids: Tensor, answer_mask: Tensor) -> Tensor:
    """Log-probability of each row's answer.

    Args:
        logits: (B, T, V); ``logits[:, t]`` predicts ``ids[:, t + 1]``.
        ids: (B, T) int64.
        answer_mask: (B, T) bool, true on answer tokens; false on prompt and padding.

    Returns:
        (B,) sums of log-probabilities, float32.
    """
    mask = answer_mask[:, 1:]
    rows = F.cross_entropy(logits[:, :-1][mask].float(), ids[:, 1:][mask], reduction="none")  # (N,)
    sums = torch.zeros(mask.shape, dtype=rows.dtype, device=rows.device)
    sums[mask] = -rows
    return sums.sum(dim=1)


def sft_loss(logits: Tensor, ids: Tensor, answer_mask: Tensor) -> Tensor:
    """Cross-entropy per answer token (method section 2, stage 1); arguments as ``answer_log_probabilities``."""
    return -answer_log_probabilities(logits, ids, answer_mask).sum() / answer_mask[:, 1:].sum()


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected))) (Rafailov et al. 2023, equation 7).

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (B,) answer log-probabilities under policy and reference.
        beta: strength of the tie to the reference.

    Returns:
        The mean loss.
    """
    return -F.logsigmoid(beta * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()


def kl_to_base(base_logits: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """KL(base || patched) per token of benign text (MOSAIC, arXiv 2603.16210).

    Args:
        base_logits: (B, T, V) of the bare model.
        logits: (B, T, V) of the patched model.
        mask: (B, T) bool, true on real tokens.
    """
    base, patched = (F.log_softmax(x[mask].float(), dim=-1) for x in (base_logits, logits))
    return F.kl_div(patched, base, log_target=True, reduction="batchmean")
