"""The choice of codecs: the fewest bytes that keep to the target, in few trials, whatever the gradients do."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

from isthmus.common.errors import ConfigError, NonFiniteError
from isthmus.edge.codecs.codec_choice import Choice, choose_codecs, cosine
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS, Role, decode, encode

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
HIDDEN = 576
# What each codec loses in each direction, roughly as measured on a model of 30 layers.
LOSSES = {
    "fp32": (0.0, 0.0, 0.0, 0.0),
    "bf16": (1e-6, 1e-6, 1e-6, 1e-6),
    "fp16": (1e-7, 1e-7, 1e-7, 1e-7),
    "int8": (2e-3, 1e-4, 1e-5, 1e-4),
    "int4": (9e-2, 3e-3, 1e-3, 5e-3),
    "int4-outliers": (2.6e-2, 1.6e-3, 1e-3, 4.8e-3),
}


class Wire:
    """Gradients whose loss is the sum of the directions' losses, times `worse` where directions come together."""

    def __init__(self, losses: dict[str, tuple[float, ...]] = LOSSES, worse: float = 1.0) -> None:
        self.losses = losses
        self.worse = worse
        self.asked: list[WireCodecs] = []

    def loss(self, codecs: WireCodecs) -> float:
        parts = [self.losses[name][place] for place, name in enumerate(codecs.names)]
        return sum(parts) * (self.worse if sum(name != "fp32" for name in codecs.names) > 1 else 1.0)

    def __call__(self, codecs: WireCodecs) -> torch.Tensor:
        self.asked.append(codecs)
        kept = max(-1.0, 1.0 - self.loss(codecs))
        return 3.0 * torch.tensor([kept, math.sqrt(1.0 - kept**2)], dtype=torch.float64)


def choose(wire: Wire, target: float = 0.99, offered: tuple[str, ...] = ACTIVATION_CODECS) -> Choice:
    choice = choose_codecs(wire, offered, HIDDEN, target)
    assert len(wire.asked) == len(set(wire.asked))  # nothing is measured twice
    assert wire.asked[0] == WireCodecs()
    return choice


def test_each_direction_gets_what_it_can_bear() -> None:
    wire = Wire()
    choice = choose(wire)
    assert str(choice.codecs) == "forward=int4-outliers,forward_up=int8,backward=int4"
    assert choice.cosine == pytest.approx(1 - wire.loss(choice.codecs), abs=1e-9)
    assert choice.cosine >= 0.99
    assert len(wire.asked) <= 12


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.5, "int4"), (0.96, "forward=int4,forward_up=int4-outliers,backward=int4"), (1 - 1e-9, "fp32")],
)
def test_the_target_decides(target: float, expected: str) -> None:
    assert str(choose(Wire(), target).codecs) == expected


@QUICK
@given(st.lists(st.tuples(*[st.floats(1e-6, 0.3)] * 4), min_size=3, max_size=3), st.sampled_from([0.9, 0.99]))
def test_nothing_cheaper_keeps_to_the_target_where_losses_add_up(
    losses: list[tuple[float, float, float, float]], target: float
) -> None:
    offered = ("fp32", "int8", "int4-outliers", "int4")
    wire = Wire(dict(zip(offered, [(0.0,) * 4, *losses], strict=True)))
    choice = choose(wire, target, offered)
    best = choice.codecs.bytes_per_token(HIDDEN)
    assert wire.loss(choice.codecs) <= 1 - target + 1e-9
    for codecs in (WireCodecs(*names) for names in product(offered, repeat=4)):
        assert codecs.bytes_per_token(HIDDEN) >= best or wire.loss(codecs) > 1 - target - 1e-9


@pytest.mark.parametrize("worse", [1.5, 4.0, 50.0])
def test_it_steps_back_where_directions_make_each_other_worse(worse: float) -> None:
    wire = Wire(worse=worse)
    choice = choose(wire)
    assert wire.loss(choice.codecs) <= 0.01
    assert choice.codecs != WireCodecs()
    assert len(wire.asked) <= 20


def test_only_what_the_cloud_and_this_version_speak_is_tried() -> None:
    wire = Wire()
    choice = choose(wire, 0.5, offered=("fp32", "int8", "from-the-future"))
    assert str(choice.codecs) == "int8"
    assert {name for codecs in wire.asked for name in codecs.names} == {"fp32", "int8"}
    with pytest.raises(ConfigError, match="'fp32'"):
        choose_codecs(wire, ("int8",), HIDDEN, 0.99)


def test_fp32_alone_takes_one_trial() -> None:
    wire = Wire()
    assert choose(wire, offered=("fp32",)) == Choice(WireCodecs(), 1.0)
    assert len(wire.asked) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_a_miss(bad: float) -> None:
    def gradients(codecs: WireCodecs) -> torch.Tensor:
        if "int4" in codecs.names:
            return torch.tensor([1.0, bad])
        if "int4-outliers" in codecs.names:
            raise NonFiniteError("too large.")
        return torch.tensor([1.0, 2.0])

    choice = choose_codecs(gradients, ACTIVATION_CODECS, HIDDEN, 0.9)
    assert choice.codecs == WireCodecs.parse("int8")
    assert choice.cosine == pytest.approx(1.0)


def test_codecs_that_fail_only_together_lead_to_wider_ones() -> None:
    def gradients(codecs: WireCodecs) -> torch.Tensor:
        narrow = sum(name.startswith("int4") for name in codecs.names)
        return torch.tensor([float("nan") if narrow > 1 else 1.0, 1.0])

    choice = choose_codecs(gradients, ACTIVATION_CODECS, HIDDEN, 0.9)
    assert sum(name.startswith("int4") for name in choice.codecs.names) <= 1


def test_every_other_error_ends_the_choice() -> None:
    def gradients(codecs: WireCodecs) -> torch.Tensor:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        choose_codecs(gradients, ACTIVATION_CODECS, HIDDEN, 0.9)


def test_a_reference_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="all zero"):
        choose_codecs(lambda codecs: torch.zeros(3), ACTIVATION_CODECS, HIDDEN, 0.9)
    with pytest.raises(NonFiniteError, match="already with fp32"):
        choose_codecs(lambda codecs: torch.tensor([math.nan]), ACTIVATION_CODECS, HIDDEN, 0.9)


def test_the_reference_may_be_overwritten_by_the_next_gradients() -> None:
    buffer = torch.zeros(2, dtype=torch.float64)
    wire = Wire()
    choice = choose_codecs(lambda codecs: buffer.copy_(wire(codecs)), ACTIVATION_CODECS, HIDDEN, 0.96)
    assert choice == choose(Wire(), 0.96)


def test_a_true_wire_between_two_layers() -> None:
    """Real codecs on a linear layer, a frozen middle and a second linear layer, as across the wire."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator)
    first, middle, last = (torch.randn(64, 64, generator=generator) / 8 for _ in range(3))

    def way(value: torch.Tensor, codec: str, role: Role) -> torch.Tensor:
        return decode(encode(value, codec, role))

    def gradients(codecs: WireCodecs) -> torch.Tensor:
        up = way(torch.tanh(x @ first), codecs.forward_up, Role.ACTIVATION)
        down = way(torch.tanh(up @ middle), codecs.forward_down, Role.ACTIVATION)
        out = way((down @ last) @ last.T, codecs.backward_up, Role.GRADIENT)
        back = way((out * (1 - down**2)) @ middle.T, codecs.backward_down, Role.GRADIENT)
        return torch.cat([(x.T @ (back * (1 - up**2))).flatten(), (down.T @ (down @ last)).flatten()])

    reference = gradients(WireCodecs())
    loose, tight = (choose_codecs(gradients, ACTIVATION_CODECS, 64, target) for target in (0.9, 0.9999))
    assert str(loose.codecs) == "int4"
    assert loose.codecs.bytes_per_token(64) < tight.codecs.bytes_per_token(64) < WireCodecs().bytes_per_token(64)
    for choice, target in ((loose, 0.9), (tight, 0.9999)):
        assert choice.cosine == cosine(gradients(choice.codecs), reference) >= target


def test_cosine() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert cosine(a, 5 * a) == pytest.approx(1.0)
    assert cosine(a, -a) == pytest.approx(-1.0)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    assert cosine(a, torch.zeros(4)) == 0.0
    assert cosine(a * 1e-30, a * 1e30) == pytest.approx(1.0)  # the squares do not fit fp32
    assert math.isnan(cosine(a, torch.tensor([1.0, 1.0, 1.0, math.inf])))
