"""Bridges: where they stand, that they are the best linear maps, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import FrozenSpan, load_span
from isthmus.common.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from isthmus.emulator.compress import bridges
from isthmus.emulator.compress.bridges import Bridge, RidgeSums, bridge_places
from isthmus.emulator.compress.emulator_files import load_emulator, save_emulator
from isthmus.emulator.compress.layer_measures import relative_error
from isthmus.emulator.compress.outer_layers import OuterLayers
from isthmus.emulator.distill.distillation import DistillConfig, distill

from ..conftest import PLAN, Checkpoints, make


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


@pytest.mark.parametrize(
    ("layers", "places"), [((1, 4), (1, 4)), ((1, 3), (1, 3)), ((4,), (0, 4)), ((1, 2, 3, 4), (4,))]
)
def test_a_closing_bridge_stands_at_the_end_in_any_case(layers: tuple[int, ...], places: tuple[int, ...]) -> None:
    assert bridge_places(layers, PLAN, closed=True) == places


def test_a_closing_bridge_corrects_the_end(checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    entry = OuterLayers(checkpoint, PLAN, with_top=False).entry(blocks)
    target = load_span(checkpoint, PLAN)(entry)
    bridged, closed = (make(checkpoint, f"uniform+bridged{end}", 0.5, blocks) for end in ("", "+closed"))
    assert (bridged.bridges, closed.bridges) == ((1,), (1, 4))
    assert relative_error(closed(entry), target) < 0.95 * relative_error(bridged(entry), target)
    save_emulator(closed, tmp_path)
    assert torch.equal(load_emulator(tmp_path, checkpoint.config)(entry), closed(entry))
    path = tmp_path / "emulator.json"
    path.write_text(path.read_text().replace("+closed", ""))
    load_emulator(tmp_path, checkpoint.config)  # a bridge at the end may stand for layers
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": "uniform+bridged+closed", "bridges": [1]}))
    with pytest.raises(CheckpointError, match="its bridges do not fit"):
        load_emulator(tmp_path, checkpoint.config)


@pytest.mark.parametrize("family", CONFIGS)
def test_bridges_bring_the_output_nearer_to_the_middles(checkpoints: Checkpoints, blocks: Tensor, family: str) -> None:
    checkpoint = checkpoints(family)
    entry = OuterLayers(checkpoint, PLAN, with_top=False).entry(blocks)
    target = load_span(checkpoint, PLAN)(entry)
    for keep in (0.25, 0.5):
        plain, bridged = (make(checkpoint, text, keep, blocks) for text in ("uniform", "uniform+bridged"))
        assert bridged.layers == plain.layers
        errors = [relative_error(emulator(entry), target).item() for emulator in (plain, bridged)]
        assert errors[1] < 0.9 * errors[0]
        added = len(bridged.bridges) * HIDDEN * (HIDDEN + 1)
        assert bridged.n_params == plain.n_params + added
        assert not any(parameter.requires_grad for parameter in bridged.parameters())


def test_a_bridge_acts_before_the_first_layer_and_after_the_last(checkpoints: Checkpoints, blocks: Tensor) -> None:
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
            bridge.reset_parameters()
    assert torch.equal(emulator(hidden), plain(hidden))


def regression(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """W and b of the weighted ridge regression, as an ordinary least squares problem with one more row an unknown."""
    x, residual = hidden.flatten(0, 1).double(), (target - hidden).flatten(0, 1).double()
    root = target.flatten(0, 1).double().square().mean(-1, keepdim=True).rsqrt()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1) * root
    ridge = torch.diag((1e-3 * x.square().sum(0)).sqrt())
    rows = torch.cat([residual * root, torch.zeros(len(ridge), HIDDEN, dtype=torch.float64)])
    solution = torch.linalg.lstsq(torch.cat([x, ridge]), rows).solution.float()
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_each_map_is_the_regression_on_what_the_emulator_gives(
    checkpoints: Checkpoints, blocks: Tensor, family: str
) -> None:
    checkpoint = checkpoints(family)

    def span(start: int, stop: int) -> FrozenSpan:
        return load_span(checkpoint, SplitPlan(N_LAYERS, start, N_LAYERS - stop))

    emulator = make(checkpoint, "uniform+bridged", 0.25, blocks)
    assert (emulator.layers, emulator.bridges) == ((2,), (0, 2))
    entry, bridge = (
        next(module for name, module in emulator.named_modules() if name.endswith(f".{place}"))
        for place in ("entry", "bridge")
    )
    with torch.no_grad():
        x = OuterLayers(checkpoint, PLAN, with_top=False).entry(blocks)
        given = span(2, 3)(entry(x))
        wanted = (regression(x, span(1, 2)(x)), regression(given, span(1, 5)(x)))
    for module, (weight, bias) in zip((entry, bridge), wanted, strict=True):
        torch.testing.assert_close(module.weight, weight, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(module.bias, bias, atol=1e-3, rtol=1e-3)


def test_text_is_summed_up_in_parts(checkpoints: Checkpoints, blocks: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoints("llama")
    at_once = make(checkpoint, "uniform+bridged", 0.25, blocks)
    seen: list[int] = []
    add = RidgeSums.add
    monkeypatch.setattr(bridges, "_TOKENS_AT_ONCE", 48)
    monkeypatch.setattr(
        RidgeSums, "add", lambda sums, x, target: seen.append(x[..., 0].numel()) or add(sums, x, target)
    )
    in_parts = make(checkpoint, "uniform+bridged", 0.25, blocks)
    assert seen == [48] * (2 * blocks.numel() // 48)
    for name, weight in at_once.tensors().items():
        torch.testing.assert_close(in_parts.tensors()[name], weight)


def test_too_little_text_is_refused(checkpoints: Checkpoints, blocks: Tensor) -> None:
    with pytest.raises(DataError, match=f"{8 * HIDDEN} or more"):
        make(checkpoints("llama"), "uniform+bridged", 0.5, blocks[: 8 * HIDDEN // 16 - 1])
    make(checkpoints("llama"), "uniform+bridged", 0.5, blocks[: 8 * HIDDEN // 16])


def test_a_distillation_does_not_go_on_with_bridges_of_another_text(
    checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path
) -> None:
    checkpoint = checkpoints("llama")
    emulator = make(checkpoint, "uniform+bridged", 0.5, blocks)
    distill(checkpoint, PLAN, emulator, blocks, DistillConfig(steps=1), tmp_path)
    other = make(checkpoint, "uniform+bridged", 0.5, blocks.flip(0))
    with pytest.raises(CheckpointError, match="the text of the bridges"):
        distill(checkpoint, PLAN, other, blocks, DistillConfig(steps=1), tmp_path)


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


@pytest.mark.parametrize(
    "change",
    [
        *({"bridges": bridges} for bridges in ([2], [0, 1], [-2, 1], [1, 5], [1, 1], ["1"], [True], 1, [], None, {})),
        {"layers": [1, 2]},
        {"layers": [1, 1, 4]},
        {"recipe": "uniform"},
    ],
)
def test_bridges_that_do_not_fit_are_refused(
    checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path, change: dict[str, Any]
) -> None:
    checkpoint = checkpoints("llama")
    save_emulator(make(checkpoint, "uniform+bridged", 0.5, blocks), tmp_path)  # keeps 1 and 4, with a bridge after 1
    path = tmp_path / "emulator.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match="its bridges do not fit"):
        load_emulator(tmp_path, checkpoint.config)
