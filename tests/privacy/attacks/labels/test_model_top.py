"""Each position's own gradient, beside what autograd gives for the layers as they are."""

from __future__ import annotations

import pytest
import torch
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS
from support.privacy.attacked import tiny_model
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.privacy.attacks.labels.model_top import ModelTop

LENGTH, PADDING = 18, 3  # longer than two windows


def given(seed: int) -> Tensor:
    return torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_positions_own_result_and_gradient_are_those_of_the_layers(name: str, padded: bool) -> None:
    top = ModelTop(tiny_model(name), SplitPlan.parse("2:2", N_LAYERS))
    mask, positions, first = None, None, 0
    if padded:
        mask, first = torch.ones(1, LENGTH, dtype=torch.long), PADDING
        mask[:, :PADDING] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
    hidden, weights = given(0).requires_grad_(), given(1)
    output = top.through(hidden, mask, positions)
    own, alone = top.alone(hidden, mask, positions)
    torch.testing.assert_close(alone[:, first:], output[:, first:], rtol=1e-4, atol=1e-5)
    (found,) = torch.autograd.grad(alone[:, first:], own, weights[:, first:])
    for place in range(first, LENGTH):
        (expected,) = torch.autograd.grad(output[0, place], hidden, weights[0, place], retain_graph=True)
        torch.testing.assert_close(found[0, place], expected[0, place], rtol=1e-3, atol=1e-4)
    (together,) = torch.autograd.grad(output[:, first:], hidden, weights[:, first:])
    assert not torch.allclose(found[0, first:], together[0, first:], rtol=1e-2, atol=1e-2)  # with what later ones give
