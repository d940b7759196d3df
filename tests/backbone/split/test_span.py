"""Layers of a model in any choice and number: what each computes stays what it is in the whole model."""

from __future__ import annotations

import pytest
import torch
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS

from isthmus.backbone.plan import Span
from isthmus.backbone.split.span import (
    check_length,
    check_position_ids,
    distinct_layers,
    load_layers,
    load_span,
    run_layers,
)
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


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_part_of_a_span_does_what_these_layers_do_alone(checkpoints: Checkpoints, family: str) -> None:
    span = load_span(checkpoints(family), Span(1, 6))
    for layers in (Span(1, 4), Span(2, 6), Span(3, 4)):
        alone = load_span(checkpoints(family), layers)(hidden_states(), left_padded())
        assert torch.equal(span.part(layers)(hidden_states(), left_padded()), alone)
        assert not torch.equal(span(hidden_states(), left_padded()), alone)
    whole = load_span(checkpoints(family), Span(1, 6))(hidden_states(), left_padded())
    assert torch.equal(span(hidden_states(), left_padded()), whole)  # parts leave it as it is


@pytest.mark.parametrize("layers", [Span(0, 3), Span(4, 6), Span(2, 2)])
def test_a_part_of_other_layers_is_refused(checkpoints: Checkpoints, layers: Span) -> None:
    with pytest.raises(PlanError, match=f"layers {layers} are not all among 1:5"):
        load_span(checkpoints("llama"), Span(1, 5)).part(layers)


def test_a_layer_that_stands_twice_is_one_module(checkpoints: Checkpoints) -> None:
    base = load_layers(checkpoints("llama"), (2, 2, 4))
    held = distinct_layers(base, (2, 2, 4))
    assert list(held) == [2, 4]
    assert base.layers[0] is base.layers[1] is held[2]
    once = sum(parameter.numel() for parameter in load_layers(checkpoints("llama"), (2, 4)).parameters())
    assert sum(parameter.numel() for parameter in base.parameters()) == once


def test_a_layer_keeps_its_index_and_the_model_its_configuration(checkpoints: Checkpoints) -> None:
    span = load_span(checkpoints("gemma2"), Span(1, 4))  # its layers' attentions take turns
    types = span.config.layer_types
    assert types[1] != types[2]
    assert [layer.self_attn.layer_type for layer in span.base.layers] == types[1:4]
    assert span.base.config.layer_types == types[1:4]
    assert [layer.self_attn.layer_idx for layer in span.base.layers] == [1, 2, 3]
    assert span.base.config.num_hidden_layers == span.base.layers[0].config.num_hidden_layers == N_LAYERS
    assert len(span.base.layers[0].config.layer_types) == N_LAYERS


@pytest.mark.parametrize(("layers", "named"), [((), "none"), ((0, N_LAYERS), "6"), ((-1,), "-1")])
def test_layers_that_are_not_there_are_refused(checkpoints: Checkpoints, layers: tuple[int, ...], named: str) -> None:
    with pytest.raises(PlanError, match=rf"6 layers.* {named}|6 layers.*\({named}\)"):
        load_layers(checkpoints("llama"), layers)


def test_more_layers_than_the_model_has_are_refused(checkpoints: Checkpoints) -> None:
    load_layers(checkpoints("llama"), (1,) * N_LAYERS)  # the control
    with pytest.raises(PlanError, match="7 layers are more than the 6"):
        load_layers(checkpoints("llama"), (1,) * (N_LAYERS + 1))


def test_a_sequence_or_positions_beyond_the_model_are_refused_with_the_number() -> None:
    check_length(128, 128)
    check_position_ids(128, torch.arange(128)[None] - 1)
    with pytest.raises(ConfigError, match="129 tokens is longer than the 128"):
        check_length(128, 129)
    for wrong, says in ((torch.tensor([[0, 128]]), "0 to 128"), (torch.tensor([[-2, 3]]), "-2 to 3")):
        with pytest.raises(ConfigError, match=says):
            check_position_ids(128, wrong)


def test_a_missing_tensor_and_a_wrong_attention_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match="gemma2"):
        load_layers(checkpoints("gemma2"), (1,), attn_implementation="sdpa")
    with pytest.raises(CheckpointError):
        load_layers(checkpoints("llama").parent, (1,))
