"""Linear layers as the product of two smaller ones."""

from __future__ import annotations

import pytest
import torch

from isthmus.backbone.families import family_of
from isthmus.backbone.skeleton import named_linears
from isthmus.emulator.compress.svd import LowRankLinear

from ..conftest import Checkpoints, hidden_states, make


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_low_rank_layers_are_the_best_of_their_rank_and_can_be_trained(checkpoints: Checkpoints, family: str) -> None:
    checkpoint = checkpoints(family)
    whole, emulator = make(checkpoint, "uniform", 0.5), make(checkpoint, "uniform+lowrank:0.25", 0.5)
    layer_list = family_of(checkpoint.config).layers
    layer, smaller = (getattr(each.base, layer_list)[0] for each in (whole, emulator))
    seen = 0
    for name, module in named_linears(layer):
        product = smaller.get_submodule(name)
        assert isinstance(product, LowRankLinear)
        rank = round(0.25 * min(module.weight.shape))
        assert product.down.shape[0] == product.up.shape[1] == rank
        weight = module.weight.T if family == "gpt2" else module.weight
        missing = torch.linalg.svdvals(weight)[rank:].square().sum()
        assert (weight - product.up @ product.down).square().sum().item() == pytest.approx(missing.item(), rel=1e-3)
        seen += 1
    assert seen >= 4
    assert emulator.n_params < whole.n_params
    emulator.trainable(True)
    emulator(hidden_states()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in emulator.parameters())
    assert any(name.endswith(".down") for name in emulator.tensors())


def test_factors_that_would_not_be_smaller_are_not_made(checkpoints: Checkpoints) -> None:
    emulator = make(checkpoints("llama"), "uniform+lowrank:0.7", 0.5)
    layer = emulator.base.layers[0]
    assert not isinstance(layer.self_attn.q_proj, LowRankLinear)
    assert not isinstance(layer.mlp.up_proj, LowRankLinear)
