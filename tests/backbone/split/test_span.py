"""Layers of a model in any choice and number: what each computes stays what it is in the whole model."""

from __future__ import annotations

import pytest
import torch
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS

from isthmus.backbone.plan import Span
from isthmus.backbone.split.span import distinct_layers, load_layers, load_span, run_layers
from isthmus.common.errors import CheckpointError, ConfigError, PlanError

from ..conftest import Checkpoints


def hidden_states() -> torch.Tensor:
    return torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(0))


def left_padded() -> torch.Tensor:
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :5] = 0
    return mask


@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 4, 5), (0, 3, 5), (2, 2, 4, 4, 4), (1,)])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_each_layer_does_what_it_does_alone(checkpoints: Checkpoints, family: str, layers: tuple[int, ...]) -> None:
    folder = checkpoints(family)
    expected = hidden_states()
    for layer in layers:
        expected = load_span(folder, Span(layer, layer + 1))(expected, left_padded())
    assert torch.equal(run_layers(load_layers(folder, layers), hidden_states(), left_padded()), expected)


def test_a_layer_that_stands_twice_is_one_module(checkpoints: Checkpoints) -> None:
    base = load_layers(checkpoints("llama"), (2, 2, 4))
    held = distinct_layers(base, (2, 2, 4))
    assert list(held) == [2, 4]
    assert base.layers[0] is base.layers[1] is held[2]
    once = sum(parameter.numel() for parameter in load_layers(checkpoints("llama"), (2, 4)).parameters())
    assert sum(parameter.numel() for parameter in base.parameters()) == once


@pytest.mark.parametrize(("layers", "named"), [((), "none"), ((0, N_LAYERS), "6"), ((-1,), "-1")])
def test_layers_that_are_not_there_are_refused(checkpoints: Checkpoints, layers: tuple[int, ...], named: str) -> None:
    with pytest.raises(PlanError, match=rf"6 layers.* {named}|6 layers.*\({named}\)"):
        load_layers(checkpoints("llama"), layers)


def test_a_missing_tensor_and_a_wrong_attention_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match="gemma2"):
        load_layers(checkpoints("gemma2"), (1,), attn_implementation="sdpa")
    with pytest.raises(CheckpointError):
        load_layers(checkpoints("llama").parent, (1,))
