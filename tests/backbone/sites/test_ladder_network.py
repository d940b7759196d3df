"""The side network of a ladder by itself, and the projections of its taps."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from support.models.tiny import HIDDEN
from torch import Tensor, nn

from isthmus.backbone.sites.ladder_network import LadderSide, SideLayer, side_width, tap_projection
from isthmus.common.errors import ConfigError

from ..conftest import disturb

TAPS = (1, 3)
REDUCTION = 4


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
