"""Graphs that keep little: the same bits, less memory, and nothing left behind where something fails."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from support.tiny import HIDDEN, N_LAYERS, tiny_checkpoint
from torch import Tensor, nn
from transformers.activations import ACT2FN

from isthmus.backbone.graph_memory import PositionBytes, counting, keep_little, storages_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.span import FrozenSpan, SpanInput, load_span


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_bits_are_the_same(family: str, tmp_path: Path) -> None:
    plain, frugal = both(family, tmp_path / "model")
    hidden = torch.randn(2, 12, HIDDEN)
    expected = differentiate(plain, hidden)
    for _ in range(2):
        assert all(map(torch.equal, differentiate(frugal, hidden), expected))


class Gated(nn.Module):
    """A gated MLP, and a loss of it that keeps nothing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.act = ACT2FN[name]
        self.fails = False
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.act(self.gate(x)) * self.up(x)
        if self.fails:
            raise ValueError("no")
        return self.down(gated)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_what_an_activation_function_gives_is_not_kept(name: str) -> None:
    module = Gated(name)
    x = torch.randn(4, 16)
    expected = differentiate(module, x)
    given: list[weakref.ref[Tensor]] = []
    module.act.register_forward_hook(lambda *args: given.append(weakref.ref(args[2].untyped_storage())))

    def output() -> Tensor:
        return module(x.clone().requires_grad_(True))

    kept = output()
    gc.collect()
    assert given[-1]() is not None
    del kept
    keep_little(module)
    kept = output()
    gc.collect()
    assert given[-1]() is None
    assert kept.requires_grad
    assert all(map(torch.equal, differentiate(module, x), expected))


def test_after_a_failure_nothing_of_it_is_left() -> None:
    module, other = Gated("silu"), Gated("silu")
    keep_little(module)
    module.fails = True
    with pytest.raises(ValueError, match="no"):
        module(torch.randn(4, 16, requires_grad=True))
    x = torch.randn(4, 16)
    given: list[weakref.ref[Tensor]] = []
    other.act.register_forward_hook(lambda *args: given.append(weakref.ref(args[2].untyped_storage())))
    kept = other(x.clone().requires_grad_(True))  # which nobody has told to keep little
    gc.collect()
    assert given[-1]() is not None
    assert kept.requires_grad


def test_where_several_share_an_activation_function_each_keeps_little() -> None:
    first, second = Gated("silu"), Gated("silu")
    second.act = first.act
    both_of_them = nn.Sequential(first, second)
    x = torch.randn(4, 16)
    expected = differentiate(both_of_them, x)
    keep_little(both_of_them)
    assert all(map(torch.equal, differentiate(both_of_them, x), expected))
    given: list[weakref.ref[Tensor]] = []
    first.act.register_forward_hook(lambda *args: given.append(weakref.ref(args[2].untyped_storage())))
    kept = both_of_them(x.clone().requires_grad_(True))
    gc.collect()
    assert [each() for each in given] == [None, None]
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


def test_a_position_is_counted_anew_where_sequences_are_longer_or_masked() -> None:
    def given(rows: int, length: int, *, masked: bool = False) -> SpanInput:
        return SpanInput(torch.zeros(rows, length, 8), torch.ones(rows, length) if masked else None)

    known, mixed = PositionBytes(), [given(1, 10), given(1, 20)]
    assert known.expected([given(2, 10)]) is None
    known.learn([given(2, 10)], 100.0)
    assert known.expected([given(7, 10), given(1, 3)]) == 100.0
    assert known.expected([given(2, 10, masked=True)]) is None
    assert known.expected(mixed) is None  # on average, a position is in a sequence of 17
    known.learn([given(1, 20)], 120.0)
    assert known.expected(mixed) == 120.0
    known.learn([given(1, 4)], 10.0)  # by somebody who counts in any case
    assert known.expected([given(1, 4)]) == 120.0
