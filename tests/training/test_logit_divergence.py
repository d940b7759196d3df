"""The KL divergence of logits: its value, its gradient, its direction; and their top-1 agreement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from isthmus.training.logit_divergence import agreement, logit_divergence


def logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_definition(dtype: torch.dtype) -> None:
    student, teacher = logits(1, dtype).requires_grad_(), logits(2, dtype)
    divergence = logit_divergence(student, teacher)
    divergence.backward()
    p, q = (values.detach().double().softmax(-1) for values in (teacher, student))
    assert divergence.dtype == torch.float32
    assert divergence.item() == pytest.approx((p * (p.log() - q.log())).sum(-1).mean().item(), rel=1e-5)
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad, ((q - p) / 7).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
    )


def test_gradient_is_that_of_torchs_divergence_of_probabilities() -> None:
    mine, other = logits(1).requires_grad_(), logits(1).double().requires_grad_()
    logit_divergence(mine, logits(2)).backward()
    kl_div(other.softmax(-1).log(), logits(2).double().softmax(-1), reduction="batchmean").backward()
    assert mine.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-7)


def test_equal_distributions_do_not_diverge_and_the_direction_counts() -> None:
    one, other = logits(1), logits(2)
    assert logit_divergence(one + 5, one).item() == pytest.approx(0, abs=1e-6)
    assert logit_divergence(one, other).item() != pytest.approx(logit_divergence(other, one).item(), rel=1e-3)


def test_agreement_is_the_share_of_rows_with_the_same_likeliest_token() -> None:
    one = logits(1)
    other = one.clone()
    other[[1, 4], one[[1, 4]].argmin(-1)] = 100.0
    assert agreement(one, one) == 1.0
    assert agreement(other, one) == agreement(one, 2 * other) == 5 / 7
