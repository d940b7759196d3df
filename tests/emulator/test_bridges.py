"""Bridges: where they stand, that they are the best linear maps, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import CONFIGS, HIDDEN, N_LAYERS
from torch import Tensor

from isthmus.backbone.errors import CheckpointError, ConfigError, NonFiniteError
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sources import Checkpoint
from isthmus.backbone.span import load_span
from isthmus.emulator.bridges import Bridge, bridge_places
from isthmus.emulator.ends import Ends
from isthmus.emulator.measure import relative_error
from isthmus.emulator.model import Emulator, build_emulator, load_emulator, save_emulator
from isthmus.emulator.recipe import Recipe

from .conftest import Checkpoints

PLAN = SplitPlan.parse("1:1", N_LAYERS)  # the middle is 1, 2, 3, 4


def make(checkpoint: Checkpoint, text: str, keep: float, blocks: Tensor | None) -> Emulator:
    return build_emulator(checkpoint, PLAN, Recipe.parse(text, keep), blocks)


@pytest.mark.parametrize(
    ("layers", "places"),
    [
        ((1, 2, 3, 4), ()),
        ((1, 4), (1,)),
        ((1, 3), (1, 3)),
        ((1,), (1,)),
        ((4,), (0,)),
        ((2, 3), (0, 3)),
        ((3,), (0, 3)),
    ],
)
def test_a_bridge_stands_before_each_run_that_is_dropped(layers: tuple[int, ...], places: tuple[int, ...]) -> None:
    assert bridge_places(layers, PLAN) == places


@pytest.mark.parametrize("family", CONFIGS)
def test_bridges_bring_the_output_nearer_to_the_middles(checkpoints: Checkpoints, blocks: Tensor, family: str) -> None:
    checkpoint = checkpoints(family)
    entry = Ends(checkpoint, PLAN, with_top=False).entry(blocks)
    target = load_span(checkpoint, PLAN)(entry)
    for keep in (0.25, 0.5):
        plain, bridged = (make(checkpoint, text, keep, blocks) for text in ("uniform", "uniform+bridged"))
        assert bridged.layers == plain.layers
        errors = [relative_error(emulator(entry), target).item() for emulator in (plain, bridged)]
        assert errors[1] < 0.9 * errors[0]
        added = len(bridged.bridges) * HIDDEN * (HIDDEN + 1)
        assert bridged.n_params == plain.n_params + added
        assert not any(parameter.requires_grad for parameter in bridged.parameters())


def test_a_middle_of_linear_layers_is_matched_by_one_layer(checkpoints: Checkpoints, blocks: Tensor) -> None:
    """Where the dropped layers add a constant, the fitted map adds it too, before the first kept layer and after it."""
    checkpoint = checkpoints("llama")
    emulator = make(checkpoint, "uniform+bridged", 0.25, blocks)  # keeps layer 2
    assert (emulator.layers, emulator.bridges) == ((2,), (0, 2))
    layer = emulator.base.layers[0]
    assert isinstance(layer.entry, Bridge)
    assert isinstance(layer.bridge, Bridge)
    hidden = torch.randn(2, 5, HIDDEN)
    plain = make(checkpoint, "uniform", 0.25, None)
    assert torch.equal(emulator(hidden), layer.bridge(plain(layer.entry(hidden))))
    with torch.no_grad():
        for bridge in (layer.entry, layer.bridge):
            bridge.weight.zero_()
            bridge.bias.zero_()
    assert torch.equal(emulator(hidden), plain(hidden))


def test_the_map_is_the_weighted_least_squares_solution(checkpoints: Checkpoints, blocks: Tensor) -> None:
    """Any other map near it has a larger error on the text that it was fitted to."""
    checkpoint = checkpoints("llama")
    emulator = make(checkpoint, "uniform+bridged", 0.5, blocks)
    assert (emulator.layers, emulator.bridges) == ((1, 4), (1,))
    bridge = emulator.base.layers[0].bridge
    before = load_span(checkpoint, SplitPlan(N_LAYERS, 1, N_LAYERS - 2))
    dropped = load_span(checkpoint, SplitPlan(N_LAYERS, 2, N_LAYERS - 4))
    x = before(Ends(checkpoint, PLAN, with_top=False).entry(blocks))
    target = dropped(x)

    def error() -> float:
        each = (bridge(x) - target).square().mean(-1) / target.square().mean(-1)
        return each.mean().item()

    least = error()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (bridge.weight, bridge.bias):
            kept = parameter.clone()
            for _ in range(5):
                parameter.copy_(kept + 0.05 * torch.randn(kept.shape, generator=generator))
                assert error() > least
            parameter.copy_(kept)


def test_nothing_is_added_where_nothing_is_dropped(checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    emulator = make(checkpoint, "importance+bridged", 1.0, blocks)
    hidden = torch.randn(2, 5, HIDDEN)
    assert emulator.bridges == ()
    assert torch.equal(emulator(hidden), load_span(checkpoint, PLAN)(hidden))
    save_emulator(emulator, tmp_path)
    assert load_emulator(tmp_path, checkpoint.config).bridges == ()


def test_bridges_need_text(checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match="--text"):
        make(checkpoints("llama"), "uniform+bridged", 0.5, None)


def test_a_model_that_gives_nan_is_refused(checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama").folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match="linear map"):
        make(Checkpoint(tmp_path, "nan"), "uniform+bridged", 0.5, blocks)


@pytest.mark.parametrize("bridges", [[2], [0, 2], [4, 1], [1, 1], ["1"], [True], [6], 1, [-2]])
def test_bridges_that_do_not_fit_are_refused(
    checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path, bridges: Any
) -> None:
    checkpoint = checkpoints("llama")
    save_emulator(make(checkpoint, "uniform+bridged", 0.5, blocks), tmp_path)  # keeps 1 and 4
    path = tmp_path / "emulator.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bridges": bridges}))
    with pytest.raises(CheckpointError):
        load_emulator(tmp_path, checkpoint.config)
