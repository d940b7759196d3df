"""Ladder side-tuning: the side network by itself, on a whole model, and its names on a split one."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import CONFIGS, HIDDEN, N_LAYERS, PAD
from torch import Tensor, nn

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span
from isthmus.backbone.sites.ladder import LadderAdapter, LadderSide, SideLayer, add_ladder, side_width, tap_projection
from isthmus.common.errors import CheckpointError, ConfigError, UnsupportedCallError

from ..conftest import Checkpoints, Pairs, batch, whole_model

TAPS = (1, 3)
REDUCTION = 4


def disturb(module: nn.Module) -> None:
    """Move what is trainable off its start, where a ladder adds nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def side_network(**settings: Any) -> LadderSide:
    torch.manual_seed(0)
    side = LadderSide(HIDDEN, 4, TAPS, **{"reduction": REDUCTION, **settings})
    disturb(side)
    return side


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(length: int = 6, rows: int = 2, tap_width: int = HIDDEN) -> tuple[Tensor, list[Tensor], Tensor]:
    """A span's input, taps and output."""
    taps = [states(rows, length, tap_width, seed=layer) for layer in TAPS]
    return states(rows, length, HIDDEN, seed=7), taps, states(rows, length, HIDDEN, seed=8)


def logits(model: Any, kind: str = "full_mask") -> Tensor:
    result: Tensor = model(**batch(kind), use_cache=False).logits
    return result.detach()


# Projections ----------------------------------------------------------------------------------------------------------


def test_a_projection_is_fixed_for_all_time() -> None:
    """A change of these bits would break every ladder that was saved before."""
    content = tap_projection(3, 64, 16, seed=5).numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == "eceb62f5bd93005585806f20f974721cda5c18b385d6dad1ea19484437475461"


def test_projections_differ_by_layer_and_seed() -> None:
    first = tap_projection(3, 64, 16, seed=5)
    assert first.shape == (16, 64)
    assert torch.equal(first, tap_projection(3, 64, 16, seed=5))
    assert not torch.equal(first, tap_projection(4, 64, 16, seed=5))
    assert not torch.equal(first, tap_projection(3, 64, 16, seed=6))


def test_a_projection_keeps_distances_up_to_one_factor() -> None:
    points = states(40, 576)
    sent = points @ tap_projection(3, 576, 256, seed=0).T
    ratios = torch.pdist(sent) / torch.pdist(points) / (256 / 576) ** 0.5
    assert ratios.mean().item() == pytest.approx(1, abs=0.03)
    assert ratios.min().item() > 0.75
    assert ratios.max().item() < 1.25
    assert sent.var().item() == pytest.approx(points.var().item(), rel=0.1)


@pytest.mark.parametrize("width", [0, -3, 65])
def test_a_projection_that_does_not_fit_is_refused(width: int) -> None:
    with pytest.raises(ConfigError, match=f"width {width} does not fit a hidden size of 64: use 1 to 64"):
        tap_projection(3, 64, width, seed=0)


# The side network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "reduction", "width"), [(576, 8, 72), (768, 8, 96), (2048, 8, 256), (568, 8, 70), (32, 1, 32), (4, 2, 2)]
)
def test_the_width_is_even(hidden: int, reduction: int, width: int) -> None:
    assert side_width(hidden, reduction) == width


def test_too_large_a_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match="reduction 17 leaves nothing of a hidden size of 32: use 16 or less"):
        side_width(32, 17)


@pytest.mark.parametrize(("hidden", "heads", "side_heads"), [(576, 9, 9), (768, 12, 12), (32, 4, 2), (2048, 32, 32)])
def test_the_side_network_has_as_many_heads_as_fit(hidden: int, heads: int, side_heads: int) -> None:
    with torch.device("meta"):
        side = LadderSide(hidden, heads, (0,))
    assert side.body.config.num_attention_heads == side_heads
    assert side.body.config.head_dim % 2 == 0


def test_a_fresh_ladder_changes_nothing() -> None:
    span_input, taps, span_output = given()
    assert torch.equal(LadderSide(HIDDEN, 4, TAPS)(span_input, taps, span_output), span_output)


def test_a_rung_mixes_by_its_gate() -> None:
    """`mu * down(tap) + (1 - mu) * side`, `mu = sigmoid(alpha / 0.1)`."""
    rung = SideLayer(1, HIDDEN, 8, nn.Identity())
    side, tap = states(2, 3, 8), states(2, 3, HIDDEN)
    unused = torch.full_like(tap, torch.nan)
    for alpha, mu in ((0.0, 0.5), (0.1, 0.731058579), (-0.2, 0.119202922)):
        with torch.no_grad():
            rung.gate.fill_(alpha)
        expected = mu * rung.down(tap) + (1 - mu) * side
        assert torch.allclose(rung(side, taps=[unused, tap]), expected, atol=1e-6)


def test_a_tap_of_massive_numbers_is_tamed() -> None:
    """The size of a hidden state says nothing; that of its largest numbers is bounded."""
    rung = SideLayer(0, HIDDEN, 8, nn.Identity())
    tap = states(2, 3, HIDDEN)
    assert torch.allclose(rung.down(tap), rung.down(1000 * tap), atol=1e-4)


def test_what_is_added_follows_the_size_of_the_output() -> None:
    side = side_network()
    span_input, taps, span_output = given()
    change = side(span_input, taps, span_output) - span_output
    larger = side(span_input, taps, 1000 * span_output) - 1000 * span_output
    assert torch.allclose(larger, 1000 * change, rtol=1e-3, atol=0.1)
    assert change.abs().max() > 0.01


@pytest.mark.parametrize("changed", ["input", "first tap", "second tap", "output"])
def test_everything_that_is_given_counts(changed: str) -> None:
    side = side_network()
    span_input, taps, span_output = given()
    before = side(span_input, taps, span_output)
    other = states(2, 6, HIDDEN, seed=99)
    after = side(
        other if changed == "input" else span_input,
        [other if changed == "first tap" else taps[0], other if changed == "second tap" else taps[1]],
        other if changed == "output" else span_output,
    )
    assert (before - after).abs().max() > 0.01


def test_no_token_sees_the_future() -> None:
    side = side_network()
    span_input, taps, span_output = given(length=8)
    before = side(span_input, taps, span_output)
    for tensor in (span_input, *taps):
        tensor[:, 5:] += 1
    after = side(span_input, taps, span_output)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert (before[:, 5:] - after[:, 5:]).abs().min(dim=-1).values.max() > 0


def test_padding_is_not_seen() -> None:
    side = side_network()
    span_input, taps, span_output = given(length=8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    before = side(span_input, taps, span_output, mask, positions)
    for tensor in (span_input, *taps):
        tensor[:, :3] += 1
    after = side(span_input, taps, span_output, mask, positions)
    assert torch.allclose(before[:, 3:], after[:, 3:], atol=1e-5)
    short = side(span_input[:, 3:], [tap[:, 3:] for tap in taps], span_output[:, 3:])
    assert torch.allclose(before[:, 3:], short, atol=1e-5)


def test_packed_texts_do_not_see_each_other() -> None:
    side = side_network()
    span_input, taps, span_output = given(length=8, rows=1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = side(span_input, taps, span_output, None, positions)
    alone = side(span_input[:, 3:], [tap[:, 3:] for tap in taps], span_output[:, 3:])
    assert torch.allclose(packed[:, 3:], alone, atol=1e-5)


def test_gradients_are_those_of_the_numbers() -> None:
    side = LadderSide(8, 2, TAPS, reduction=2).double()
    disturb(side)
    span_input, *taps, span_output = (states(1, 3, 8, seed=seed).double() for seed in range(4))
    parameters = dict(side.named_parameters())

    def run(*values: Tensor) -> Tensor:
        arguments = (span_input, taps, span_output)
        result: Tensor = torch.func.functional_call(side, dict(zip(parameters, values, strict=True)), arguments)
        return result

    # The base model's norms compute in fp32, so the step is large and the tolerance wide.
    assert torch.autograd.gradcheck(run, tuple(parameters.values()), eps=1e-3, atol=2e-3, rtol=2e-2)


def test_nothing_that_is_given_gets_a_gradient() -> None:
    side = side_network()
    span_input, taps, span_output = given()
    for tensor in (span_input, *taps, span_output):
        tensor.requires_grad_(True)
    side(span_input, taps, span_output).pow(2).sum().backward()
    assert all(tensor.grad is None for tensor in (span_input, *taps, span_output))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in side.parameters())


def test_the_result_has_the_dtype_of_the_span() -> None:
    side = side_network()
    span_input, taps, span_output = given()
    exact = side(span_input, taps, span_output)
    half = side(span_input.bfloat16(), [tap.bfloat16() for tap in taps], span_output.bfloat16())
    assert half.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in side.parameters())
    assert (half - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("width", [HIDDEN, 12])
def test_taps_of_another_shape_are_refused(width: int) -> None:
    side = side_network(tap_width=None if width == HIDDEN else width)
    span_input, taps, span_output = given(tap_width=width)
    assert side(span_input, taps, span_output).shape == span_output.shape
    for wrong in (taps[:1], [*taps, taps[0]], [taps[0], taps[1][..., :-1]], [taps[0], taps[1][:, :-1]]):
        with pytest.raises(ConfigError, match=rf"reads layers 1, 3 as \[2, 6, {width}\] each"):
            side(span_input, wrong, span_output)


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
