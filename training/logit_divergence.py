"""How near a model's next-token distribution is to that of another, which it is distilled from or drafts for."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def logit_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of `KL(teacher || student)` over rows of logits, in nats; a scalar, computed in fp32.

    A draft's token is accepted with probability `1 - TV(teacher, student)` (Leviathan et al. 2023), and
    `TV <= sqrt(KL / 2)` (Pinsker), so a draft with a small divergence is accepted often.

    Args:
        student: Logits `[N, V]` of any floating point dtype; gradients flow into these.
        teacher: Logits `[N, V]` of the same positions.
    """
    return kl_div(
        log_softmax(student.float(), -1), log_softmax(teacher.float(), -1), reduction="batchmean", log_target=True
    )


def agreement(student: Tensor, teacher: Tensor) -> float:
    """Top-1 agreement: the share of rows of logits, `[N, V]` each, where both have the same likeliest token."""
    return (student.argmax(-1) == teacher.argmax(-1)).sum().item() / len(student)
