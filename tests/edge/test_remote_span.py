"""The remote span as a differentiable function: what it asks the link for, and what autograd gets of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.edge.remote_span import RemoteSpan

MASK = torch.ones(2, 3, dtype=torch.long)
POSITIONS = torch.arange(3)[None]


class Doubler:
    """A link whose span is y = 2 x."""

    def __init__(self) -> None:
        self.kept: list[bool] = []
        self.backwards: list[tuple[Any, Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def forward_span(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, *, keep: bool
    ) -> tuple[Tensor, Any]:
        self.kept.append(keep)
        return 2 * hidden.float(), f"call {len(self.kept)}"

    def backward_span(
        self, kept: Any, gradient: Tensor, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        self.backwards.append((kept, gradient, hidden, attention_mask, position_ids))
        return 2 * gradient.float()


@pytest.fixture
def link() -> Doubler:
    return Doubler()


def test_values_and_gradient_pass_through(link: Doubler) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    output = RemoteSpan(link)(hidden, MASK, POSITIONS)
    assert torch.equal(output, 2 * hidden)
    upstream = torch.randn(2, 3, 4)
    output.backward(upstream)
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, 2 * upstream)
    kept, gradient, again, mask, positions = link.backwards[0]
    assert kept == "call 1"
    assert torch.equal(gradient, upstream)
    assert torch.equal(again, hidden)  # the input goes along in case the cloud has forgotten it
    assert mask is MASK
    assert positions is POSITIONS


def test_the_cloud_keeps_nothing_where_no_backward_comes(link: Doubler) -> None:
    span = RemoteSpan(link)
    span(torch.randn(2, 3, 4), None, None)
    with torch.no_grad():
        span(torch.randn(2, 3, 4, requires_grad=True), None, None)
    span(torch.randn(2, 3, 4, requires_grad=True), None, None)
    assert link.kept == [False, False, True]


def test_several_calls_may_wait_for_their_backwards(link: Doubler) -> None:
    span = RemoteSpan(link)
    a, b = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    (span(a, None, None).sum() + 3 * span(span(b, None, None), None, None).sum()).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, torch.full_like(a, 2))
    assert torch.equal(b.grad, torch.full_like(b, 12))
    assert {call[0] for call in link.backwards} == {"call 1", "call 2", "call 3"}


def test_results_come_in_the_inputs_dtype(link: Doubler) -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    output = RemoteSpan(link)(hidden, None, None)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_a_changed_input_is_noticed(link: Doubler) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    below = hidden * 1
    output = RemoteSpan(link)(below, None, None)
    with torch.no_grad():
        below.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_second_derivative_is_refused(link: Doubler) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    output = RemoteSpan(link)(hidden, None, None)
    (first,) = torch.autograd.grad((output**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_copied_model_talks_over_the_same_link(link: Doubler) -> None:
    span = RemoteSpan(link)
    assert copy.deepcopy(span) is span
