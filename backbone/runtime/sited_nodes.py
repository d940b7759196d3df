"""The autograd nodes of a pass with sites.

A group's graph has these nodes, for each linear from the input to the output:

    frozen_product        the frozen linear, where products may be batched (else torch's own node)
    leased_contribution   a leased LoRA, where products may be batched (else torch's own nodes)
    edge_contribution     what the edge adds at a site
    group_outputs         one for the whole group, behind all of its outputs

In a backward, `group_outputs` comes first. Once the gradients of all outputs are there it asks the edge, and has the
group's products computed where calls are batched. The other nodes hand on their own share of that, one linear at a
time, so that gradients add up in the order in which a single process adds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.backbone.runtime.batched_products import Product, input_gradient, rows_of
from isthmus.backbone.runtime.leased_lora import LoraGradients, lora_gradients
from isthmus.backbone.runtime.sited_modules import current_pass
from isthmus.backbone.sites.leasing import LeasedLora


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Linears that read one input, in running order.

    Attributes:
        number: The group's number in the span's running order.
        members: The linears.
        sites: The members that are sites: index among the members -> number of the site.
    """

    number: int
    members: tuple[nn.Module, ...]
    sites: Mapping[int, int]


@dataclass(slots=True, eq=False)
class GroupState:
    """What the nodes of one group share in one pass.

    Attributes:
        group: The group; None for the site behind a layer.
        sites: The sites that the edge is asked about.
        wanted: Whether the input's gradient leads anywhere.
        shape: `[B, S]`, which the group's tensors may have as one dimension (OPT), and the edge's never.
        leased: The LoRA that is leased at each member, None where there is none.
        x: The group's input, where a backward with batched products needs it.
        gradients: The edge's answers in the backward, one for each of `sites`.
        products: Batched products by member, as long as the members' nodes need them.
    """

    group: Group | None
    sites: tuple[int, ...]
    wanted: bool
    shape: torch.Size
    leased: tuple[LeasedLora | None, ...] = ()
    x: Tensor | None = None
    gradients: list[Tensor | None] = field(default_factory=list)
    products: dict[int, Product] = field(default_factory=dict)

    def member(self, index: int) -> nn.Module:
        """The linear at `index` in the group."""
        if self.group is None:
            raise RuntimeError("there is no linear behind a layer")
        return self.group.members[index]


class _EdgeContribution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, _x: Tensor, answer: Tensor, state: GroupState, index: int) -> Tensor:
        ctx.state, ctx.index = state, index
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        answered = ctx.state.gradients
        return None, answered[ctx.index] if answered else None, None, None, None


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, state: GroupState, index: int) -> Tensor:
        ctx.state, ctx.index = state, index
        found = state.products.get(index)
        output: Tensor = state.member(index)(x) if found is None else found.plain.view(*x.shape[:-1], -1)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        state, index = ctx.state, ctx.index
        _compute_products_of_single(state, gradient)
        found = state.products.pop(index, None)  # a leased LoRA's backward runs before its linear's
        if found is None:
            return input_gradient(state.member(index), gradient), None, None
        return found.plain.view(*gradient.shape[:-1], -1), None, None


class _LeasedContribution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, scale: float, state: GroupState, index: int) -> Tensor:
        ctx.state, ctx.index, ctx.scale = state, index, scale
        ctx.save_for_backward(x, down, up)
        found = state.products.get(index)
        if found is None or not isinstance(found.leased, Tensor):
            return LeasedLora(down, up, scale)(x)
        return found.leased.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        state = ctx.state
        x, down, up = ctx.saved_tensors
        if state.wanted:
            _compute_products_of_single(state, gradient)
        product = state.products.get(ctx.index)
        found = None if product is None else product.leased
        if not isinstance(found, LoraGradients):
            (found,) = lora_gradients([LeasedLora(down, up, ctx.scale)], [rows_of(x)], [rows_of(gradient)])
        return found.x.view(x.shape) if ctx.needs_input_grad[0] else None, found.down, found.up, None, None, None


class _GroupOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: GroupState, asked: tuple[int, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.state, ctx.asked = state, asked
        ctx.set_materialize_grads(True)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        sited = current_pass()
        if ctx.asked:
            ctx.state.gradients = sited.ask_gradients(ctx.state, [gradients[index].detach() for index in ctx.asked])
        if ctx.state.wanted:
            ctx.state.products = sited.backward_products(ctx.state, gradients)
        return None, None, *gradients


def _compute_products_of_single(state: GroupState, gradient: Tensor) -> None:
    """In a backward, have the products of a group of one linear batched, which may lack the node `group_outputs`."""
    if not state.products and len(state.leased) == 1:
        state.products = current_pass().backward_products(state, [gradient])


# `torch.autograd.Function.apply` is not typed ------------------------------------------------------------------------


def edge_contribution(anchor: Tensor, x: Tensor, answer: Tensor, state: GroupState, index: int) -> Tensor:
    """What the edge adds at one site, its `answer`; the backward hands on the edge's gradient of the input."""
    result: Tensor = _EdgeContribution.apply(anchor, x, answer, state, index)  # type: ignore[no-untyped-call]  # torch
    return result


def frozen_product(x: Tensor, state: GroupState, index: int) -> Tensor:
    """The plain output `[..., out]` of a linear for its input `[..., in]`. The node saves no tensor."""
    result: Tensor = _FrozenProduct.apply(x, state, index)  # type: ignore[no-untyped-call]  # torch
    return result


def leased_contribution(x: Tensor, lora: LeasedLora, state: GroupState, index: int) -> Tensor:
    """What a leased LoRA adds, `[..., out]`, for the linear's input `[..., in]`."""
    arguments = (x, lora.down, lora.up, lora.scale, state, index)
    result: Tensor = _LeasedContribution.apply(*arguments)  # type: ignore[no-untyped-call]  # torch
    return result


def group_outputs(state: GroupState, asked: tuple[int, ...], outputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a group, unchanged.

    Args:
        state: The group's.
        asked: Indices of the outputs that have a contribution of the edge.
        outputs: `[..., out]` each.
    """
    if not torch.is_grad_enabled():
        return outputs
    return list(_GroupOutputs.apply(state, asked, *outputs))  # type: ignore[no-untyped-call]  # torch
