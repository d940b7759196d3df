"""Ladders on a whole model, and their names on a split one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS, PAD
from torch import Tensor

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span
from isthmus.backbone.sites.ladder import LadderAdapter, add_ladder
from isthmus.backbone.sites.ladder_network import tap_projection
from isthmus.common.errors import CheckpointError, ConfigError, UnsupportedCallError

from ..conftest import Checkpoints, Pairs, batch, disturb, logits, whole_model

TAPS = (1, 3)
REDUCTION = 4


# On a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_training_starts_at_the_pretrained_model(checkpoints: Checkpoints, family: str) -> None:
    model = whole_model(checkpoints(family))
    before = logits(model)
    add_ladder(model, [0, 2, N_LAYERS - 1], reduction=REDUCTION)
    assert torch.equal(before, logits(model))
    disturb(model)
    assert (before - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "kind", "tap_width"),
    [
        ("llama", "no_mask", None),
        ("llama", "left_padded", None),
        ("llama", "packed", None),
        ("llama", "positions", 12),
        ("gemma3_text", "right_padded", 12),
        ("gpt2", "left_padded", None),
        ("opt", "right_padded", 12),
    ],
)
def test_a_whole_model_gives_the_ladder_what_a_cloud_would(
    pairs: Pairs, family: str, kind: str, tap_width: int | None
) -> None:
    pair = pairs(family, "1:2")
    for model in (pair.whole, pair.edge):
        torch.manual_seed(4)
        add_ladder(model, TAPS, span=pair.plan.cloud, reduction=REDUCTION, tap_width=tap_width, seed=3)
        disturb(model)
    entering, leaving, taps = watched(pair.whole, 1), watched(pair.whole, 4), watched_taps(pair.span)
    values = batch(kind)
    pair.whole(**values, use_cache=False)
    mask, positions = values.get("attention_mask"), values.get("position_ids")
    with torch.no_grad():
        output = pair.span(entering[0], mask, positions)
        sent = [
            tap if tap_width is None else tap @ tap_projection(layer, HIDDEN, tap_width, seed=3).T
            for layer, tap in zip(pair.plan.cloud, taps, strict=True)
            if layer in pair.edge.isthmus_ladder.tap_layers
        ]
        result = pair.edge.isthmus_ladder(entering[0], sent, output, mask, positions)
    assert (result - output).abs().max() > 0.01
    assert torch.equal(result, leaving[0])


def watched(model: Any, layer: int) -> list[Tensor]:
    """What gets into a layer of a whole model."""
    seen: list[Tensor] = []
    family = family_of(model.config)
    layers = model.get_submodule(family.layers_path)
    layers[layer].register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    return seen


def watched_taps(span: Any) -> list[Tensor]:
    """What comes out of each of a span's layers."""
    seen: list[Tensor] = []
    for layer in getattr(span.base, family_of(span.config).layers):
        layer.register_forward_hook(
            lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    return seen


def test_a_split_model_has_the_same_names_and_no_hooks(pairs: Pairs) -> None:
    pair = pairs("llama", "1:2")
    for model in (pair.whole, pair.edge):
        add_ladder(model, TAPS, span=Span(1, 4), reduction=REDUCTION)
    shapes = [
        {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
        for model in (pair.whole, pair.edge)
    ]
    assert shapes[0] == shapes[1]
    assert all(name.startswith("isthmus_ladder.") for name in shapes[0])
    assert pair.edge.isthmus_ladder.tap_layers == TAPS
    with pytest.raises(UnsupportedCallError, match="has no taps"):
        logits(pair.edge)


def test_the_span_is_the_clouds_unless_it_is_named(pairs: Pairs) -> None:
    pair = pairs("llama", "1:2")
    add_ladder(pair.edge, TAPS)
    add_ladder(pair.whole, TAPS)
    assert (pair.edge.isthmus_adapter.start, pair.edge.isthmus_adapter.stop) == (1, 4)
    assert (pair.whole.isthmus_adapter.start, pair.whole.isthmus_adapter.stop) == (0, N_LAYERS)


def test_the_ladder_learns_and_the_backbone_has_no_graph(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    add_ladder(model, TAPS, span=Span(1, 4), reduction=REDUCTION)
    entering = watched(model, 3)
    layers = model.model.layers
    has_graph: list[bool] = []
    for layer in layers[:4]:
        layer.register_forward_pre_hook(lambda _module, args: has_graph.append(args[0].requires_grad))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch("right_padded"), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not any(has_graph)
    assert len(has_graph) == 4 * 8
    assert torch.equal(entering[0], entering[-1])
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_a_copy_of_the_model_uses_its_own_ladder(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    add_ladder(model, TAPS, reduction=REDUCTION, tap_width=5)
    before = logits(model)
    other = copy.deepcopy(model)
    disturb(other)
    assert torch.equal(before, logits(model))
    assert not torch.equal(before, logits(other))


def test_a_forward_that_failed_leaves_nothing_behind(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    add_ladder(model, TAPS, reduction=REDUCTION)
    disturb(model)
    before = logits(model)
    handle = model.model.layers[4].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert torch.equal(before, logits(model))


def test_a_key_value_cache_is_refused(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    add_ladder(model, TAPS, reduction=REDUCTION)
    disturb(model)
    ids = batch("no_mask")["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": PAD, "eos_token_id": -1}
    with pytest.raises(UnsupportedCallError, match="use_cache=False"):
        model.generate(ids, **settings)
    tokens = model.generate(ids, use_cache=False, **settings)
    assert tokens.shape == (ids.shape[0], ids.shape[1] + 3)
    assert torch.equal(tokens[:, -1], model(tokens[:, :-1], use_cache=False).logits[:, -1].argmax(-1))


@pytest.mark.parametrize(
    ("taps", "settings", "message"),
    [
        ([], {}, r"taps \[\] do not lie in layers 0:6"),
        ([6], {}, r"taps \[6\] do not lie in layers 0:6: choose among 0 to 5"),
        ([-1], {}, r"taps \[-1\] do not lie"),
        ([0, 1], {"span": Span(1, 4)}, "do not lie in layers 1:4"),
        ([3, 1], {}, "out of order"),
        ([1, 1], {}, "out of order"),
        ([True], {}, "do not lie"),
        ([7], {"span": Span(0, 8)}, "beside layers 0:8 does not fit a model of 6"),
        ([1], {"reduction": 0}, "reduction 0 of a ladder"),
        ([1], {"reduction": HIDDEN}, f"reduction {HIDDEN} leaves nothing"),
        ([1], {"tap_width": 0}, "tap_width 0 of a ladder"),
        ([1], {"tap_width": HIDDEN + 1}, f"width {HIDDEN + 1} does not fit"),
        ([1], {"seed": -1}, "seed -1 of a ladder"),
        ([1], {"seed": None}, "seed None of a ladder"),
    ],
)
def test_bad_values_are_refused_and_change_nothing(
    checkpoints: Checkpoints, taps: list[int], settings: dict[str, Any], message: str
) -> None:
    model = whole_model(checkpoints("llama"))
    before = set(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        add_ladder(model, taps, **settings)
    assert set(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_ladder_beside_another_span_is_refused(pairs: Pairs) -> None:
    pair = pairs("llama", "1:2")
    with pytest.raises(ConfigError, match="beside layers 0:6 does not fit a model whose cloud holds 1:4"):
        add_ladder(pair.edge, TAPS, span=Span(0, N_LAYERS))


def test_a_model_takes_one_ladder(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    add_ladder(model, TAPS, reduction=REDUCTION)
    with pytest.raises(ConfigError, match="has a ladder already"):
        add_ladder(model, TAPS, reduction=REDUCTION)


# On disk --------------------------------------------------------------------------------------------------------------


def test_the_description_comes_back(tmp_path: Path) -> None:
    adapter = LadderAdapter((1, 3), 1, 4, 8, 12, 9)
    info = adapter.info()
    assert info == {
        "method": "ladder",
        "tap_layers": [1, 3],
        "start": 1,
        "stop": 4,
        "reduction": 8,
        "tap_width": 12,
        "seed": 9,
    }
    assert LadderAdapter.from_info({**info, "plan": "1:2"}, tmp_path) == adapter
    assert LadderAdapter.from_info({**info, "tap_width": None}, tmp_path).tap_width is None


@pytest.mark.parametrize(
    "damage",
    [
        {"tap_layers": "13"},
        {"tap_layers": [1, 3.0]},
        {"start": True},
        {"stop": "4"},
        {"reduction": 8.0},
        {"tap_width": "12"},
        {"seed": None},
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    info = LadderAdapter((1, 3), 1, 4).info()
    with pytest.raises(CheckpointError, match="is damaged"):
        LadderAdapter.from_info({**info, **damage}, tmp_path / "isthmus_adapter.json")
    with pytest.raises(CheckpointError, match="is damaged"):
        LadderAdapter.from_info({name: info[name] for name in info if name not in damage}, tmp_path)


def test_places_are_known_before_anything_is_changed(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    adapter = LadderAdapter(TAPS, 1, 4, REDUCTION, 12)
    places = adapter.places(model)
    assert not hasattr(model, "isthmus_ladder")
    adapter.attach(model)
    assert places == {name: parameter.shape for name, parameter in adapter.parameters(model).items()}
    assert set(places) == set(model.state_dict()) - set(whole_model(checkpoints("llama")).state_dict())
