"""The remote span as a differentiable function: what it asks the link for, and what autograd gets of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest, RemoteSpan

MASK = torch.ones(2, 3, dtype=torch.long)
POSITIONS = torch.arange(3)[None]


class Doubler:
    """A link whose span is y = 2 x, plus what a site adds."""

    def __init__(self) -> None:
        self.kept: list[bool] = []
        self.wanted: list[bool] = []
        self.backwards: list[BackwardRequest] = []

    def forward(self, request: ForwardRequest) -> tuple[Tensor, Any]:
        hidden, sites = request.inputs.hidden, request.sites
        self.kept.append(request.keep)
        output = 2 * hidden.float()
        if sites is not None:  # the one site stands at the span's input
            output += sites.forward([0], [hidden.float()])[0]
        return output, f"call {len(self.kept)}"

    def backward(self, request: BackwardRequest) -> Tensor | None:
        gradient, sites, wanted = request.gradient, request.sites, request.wanted
        self.backwards.append(request)
        self.wanted.append(wanted)
        result = 2 * gradient.float()
        for answer in () if sites is None else sites.backward([0], [gradient.float()], wanted=wanted):
            assert answer is not None
            result += answer
        return result if wanted else None


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
    (asked,) = link.backwards
    assert asked.kept == "call 1"
    assert torch.equal(asked.gradient, upstream)
    assert torch.equal(asked.inputs.hidden, hidden)  # the input goes along in case the cloud has forgotten it
    assert asked.inputs.attention_mask is MASK
    assert asked.inputs.position_ids is POSITIONS


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
    assert {asked.kept for asked in link.backwards} == {"call 1", "call 2", "call 3"}


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


# With a site inside ---------------------------------------------------------------------------------------------------


@pytest.fixture
def site() -> Site:
    return Site("model.layers.2.q_proj", SiteSpec(2, "q_proj"), torch.nn.Linear(4, 4))


def test_a_sites_parameters_get_their_gradients_and_the_input_its_own(link: Doubler, site: Site) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    upstream = torch.randn(2, 3, 4)
    RemoteSpan(link).at_sites(hidden, MASK, POSITIONS, [site]).backward(upstream)
    mine = [hidden.grad, *(parameter.grad for parameter in site.parameters)]
    expected = torch.autograd.grad(2 * hidden + site.module(hidden), [hidden, *site.parameters], upstream)
    assert len(mine) == 3
    for given, wanted in zip(mine, expected, strict=True):
        assert given is not None
        assert torch.equal(given, wanted)


def test_a_model_with_nothing_trainable_below_the_span_runs_its_backward(link: Doubler, site: Site) -> None:
    hidden = torch.randn(2, 3, 4)
    RemoteSpan(link).at_sites(hidden, None, None, [site]).sum().backward()
    assert link.kept == [True]
    assert link.wanted == [False]
    assert all(parameter.grad is not None for parameter in site.parameters)


def test_a_frozen_site_asks_for_a_backward_only_if_something_below_does(link: Doubler, site: Site) -> None:
    site.module.requires_grad_(False)
    span = RemoteSpan(link)
    span.at_sites(torch.randn(2, 3, 4), None, None, [site])
    span.at_sites(torch.randn(2, 3, 4, requires_grad=True), None, None, [site]).sum().backward()
    assert link.kept == [False, True]
    assert link.wanted == [True]


def test_without_gradients_nothing_of_a_site_is_kept(link: Doubler, site: Site) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    with torch.no_grad():
        output = RemoteSpan(link).at_sites(hidden, None, None, [site])
    assert link.kept == [False]
    assert torch.equal(output, 2 * hidden + site.module(hidden))


def test_a_second_backward_through_a_site_is_refused(link: Doubler, site: Site) -> None:
    output = RemoteSpan(link).at_sites(torch.randn(2, 3, 4, requires_grad=True), None, None, [site])
    output.sum().backward(retain_graph=True)
    with pytest.raises(UnsupportedCallError, match="runs once"):
        (2 * output).sum().backward()
    assert len(link.backwards) == 1


def test_a_copied_model_talks_over_the_same_link(link: Doubler) -> None:
    span = RemoteSpan(link)
    assert copy.deepcopy(span) is span
