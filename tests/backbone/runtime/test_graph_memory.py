"""Graphs that keep little: the same bits, less memory, and nothing left behind where something fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models.kept_activations import count_kept, given_by_activations
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS, tiny_checkpoint
from torch import Tensor, nn
from transformers.activations import ACT2FN

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.graph_memory import GraphBytes, counting, keep_little, storages_of
from isthmus.backbone.split.span import FrozenSpan, SpanInput, load_span

GATED = [family for family in CONFIGS if not family.startswith(("gpt2", "opt"))]
"""Those whose MLPs multiply what an activation function gives; with the others, nothing wants it again."""


def both(family: str, folder: Path) -> tuple[FrozenSpan, FrozenSpan]:
    """A span as it is, and the same with graphs that keep little."""
    checkpoint = tiny_checkpoint(family, folder)
    plain, frugal = (load_span(checkpoint, SplitPlan.parse("2:2", N_LAYERS)) for _ in range(2))
    keep_little(frugal)
    keep_little(frugal)  # once more does nothing
    return plain, frugal


def differentiate(span: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    leaf = hidden.clone().requires_grad_(True)
    output = span(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return output.detach(), gradient


def kept_bytes(span: nn.Module, hidden: Tensor) -> int:
    with counting(storages_of(span)) as kept:
        span(hidden.clone().requires_grad_(True))
    return kept.total


@pytest.mark.parametrize("family", CONFIGS)
def test_the_bits_are_the_same(family: str, tmp_path: Path) -> None:
    plain, frugal = both(family, tmp_path / "model")
    hidden = torch.randn(2, 12, HIDDEN)
    expected = differentiate(plain, hidden)
    for _ in range(2):
        assert all(map(torch.equal, differentiate(frugal, hidden), expected))


@pytest.mark.parametrize("family", GATED)
def test_every_family_with_gated_mlps_keeps_little(family: str, tmp_path: Path) -> None:
    kept = {}
    for span, name in zip(both(family, tmp_path / "model"), ("plain", "frugal"), strict=True):
        given = given_by_activations(span)
        output = span(torch.randn(2, 12, HIDDEN, requires_grad=True))
        assert output.requires_grad
        assert len(given) == N_LAYERS - 4
        kept[name] = count_kept(given)
    assert kept == {"plain": N_LAYERS - 4, "frugal": 0}


class Gated(nn.Module):
    """A gated MLP."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.act = ACT2FN[name]
        self.fails: BaseException | None = None
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.act(self.gate(x)) * self.up(x)
        if self.fails is not None:
            raise self.fails
        return self.down(gated)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_what_an_activation_function_gives_is_not_kept(name: str) -> None:
    module = Gated(name)
    x = torch.randn(4, 16)
    expected = differentiate(module, x)
    given = given_by_activations(module)
    kept = module(x.clone().requires_grad_(True))
    assert count_kept(given) == 1
    given.clear()
    keep_little(module)
    kept = module(x.clone().requires_grad_(True))
    assert (count_kept(given), len(given)) == (0, 1)
    assert kept.requires_grad
    assert all(map(torch.equal, differentiate(module, x), expected))


def keeps_all(module: Gated) -> bool:
    """Whether a module that nobody has told to keep little does not."""
    given = given_by_activations(module)
    kept = module(torch.randn(4, 16, requires_grad=True))
    return kept.requires_grad and count_kept(given) == 1


def test_after_a_failure_nothing_of_it_is_left() -> None:
    module = Gated("silu")
    keep_little(module)
    module.fails = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        module(torch.randn(4, 16, requires_grad=True))
    assert keeps_all(Gated("silu"))


class Abandoned(BaseException):
    """What ends a call that pauses: none of its module's hooks is called."""


def test_after_a_call_that_is_abandoned_nothing_of_it_is_left() -> None:
    module = Gated("silu")
    keep_little(module)
    module.fails = Abandoned()
    with pytest.raises(Abandoned), counting({}):
        module(torch.randn(4, 16, requires_grad=True))
    assert keeps_all(Gated("silu"))


def test_where_several_share_an_activation_function_each_keeps_little() -> None:
    first, second = Gated("silu"), Gated("silu")
    second.act = first.act
    both_of_them = nn.Sequential(first, second)
    x = torch.randn(4, 16)
    expected = differentiate(both_of_them, x)
    keep_little(both_of_them)
    assert all(map(torch.equal, differentiate(both_of_them, x), expected))
    given = given_by_activations(both_of_them)
    kept = both_of_them(x.clone().requires_grad_(True))
    assert (count_kept(given), len(given)) == (0, 2)
    assert kept.requires_grad


def test_a_graph_is_counted_within_and_not_after(tmp_path: Path) -> None:
    plain, frugal = both("llama", tmp_path / "model")
    hidden = torch.randn(2, 12, HIDDEN)
    kept = kept_bytes(frugal, hidden)
    assert 0 < kept == kept_bytes(plain, hidden)  # while it counts, every graph keeps little
    with counting(storages_of(frugal)) as counted:
        pass
    differentiate(frugal, hidden)
    assert counted.total == 0


def sequences(rows: int, length: int, *, padded: bool = False) -> SpanInput:
    mask = torch.ones(rows, length, dtype=torch.long)
    if padded:
        mask[:, :2] = 0
    return SpanInput(torch.zeros(rows, length, 8), mask)


def test_graphs_with_longer_or_shorter_sequences_are_counted_and_the_others_are_on_a_line() -> None:
    known, mixed = GraphBytes(), [sequences(1, 10), sequences(1, 20)]
    assert known.expected([sequences(2, 10)]) is None
    known.learn([sequences(2, 10)], 2000)
    assert known.expected([sequences(7, 10)]) == 7000
    assert known.expected([sequences(7, 10), sequences(1, 3)]) is None
    assert known.expected(mixed) is None
    known.learn([sequences(1, 20)], 2400)
    assert known.expected(mixed) == 1000 + 2400
    assert known.expected([sequences(1, 15)]) == 15 * 110
    known.learn([sequences(3, 5)], 15 * 90)
    assert known.expected([sequences(1, 10), sequences(1, 5)]) == 450 + 1000


def test_graphs_of_padded_sequences_are_on_a_line_of_their_own() -> None:
    known, mixed = GraphBytes(), [sequences(1, 10), sequences(2, 10, padded=True)]
    known.learn([sequences(2, 10)], 2000)
    assert known.expected([sequences(2, 10, padded=True)]) is None
    known.learn(mixed, 4000)  # nobody can tell what of that is whose
    assert known.expected(mixed) is None
    known.learn([sequences(1, 10, padded=True)], 1500)
    assert known.expected(mixed) == 4000
    places = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed, shifted = SpanInput(torch.zeros(1, 10, 8), None, places), torch.arange(5, 15)[None]
    assert known.expected([packed]) == 1500  # has a mask, too
    assert known.expected([replace(packed, position_ids=shifted)]) == 1000
    assert known.expected([replace(packed, attention_mask=torch.ones(1, 10))]) == 1000  # is not taken for packed


def test_graphs_of_sequences_that_fill_the_window_are_on_a_line_of_their_own() -> None:
    known = GraphBytes(window=16)
    known.learn([sequences(1, 15)], 1500)
    assert known.expected([sequences(1, 16)]) is None
    known.learn([sequences(1, 16)], 3200)
    known.learn([sequences(1, 32)], 6400)
    assert known.expected([sequences(1, 17), sequences(1, 15)]) == 3400 + 1500
