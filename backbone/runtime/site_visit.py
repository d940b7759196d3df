"""One pass through a span whose linears and layers ask a visitor what to add to their output.

Bit for bit: a single process with PEFT adds up the gradients of a shared input in the reverse order of the modules, an
adapter's before its linear's. The graph that is built here has the same nodes in the same order, and one node more
behind each group, which waits for all its gradients before it asks.

A pass that may run beside others (`isthmus.backbone.runtime.shared_linears`) has nodes of its own for each frozen
linear and for what is lent there, in the place of torch's. The products of a group may be computed at one time, on the
way back by the node behind the group; each node hands on its own, so that gradients add up one linear at a time, in the
same order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.backbone.runtime.leased_lora import LeasedWeights, LoanGradients, loan_gradients
from isthmus.backbone.runtime.shared_linears import Company, Product, product_back, rows_of
from isthmus.backbone.sites.site_spec import Placement, SiteSpec


class Visitor(Protocol):
    """Answers for the sites of a group. Sites are numbered as they were bound.

    What a site is asked about is its own input `[B, S, in]` if it is placed on the edge, and `A x` `[B, S, r]` if it is
    a low-rank one; its contribution is `[B, S, out]`, or `[B, S, r]`, in any floating point dtype.
    """

    def forward(self, sites: Sequence[int], inputs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """The contributions of `sites`, one for each of `inputs`.

        Without them it is the second time, as the span has to be computed again: the answer is the same as before.
        """

    def backward(self, sites: Sequence[int], gradients: Sequence[Tensor], *, wanted: bool) -> Sequence[Tensor | None]:
        """What the `gradients` of the contributions give the inputs.

        Unless they are `wanted`, nothing below needs them, and the answer may be empty.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Linears that read one input, in running order.

    Attributes:
        number: The group's own, in the running order of the span's groups.
        members: The linears.
        sites: Which of them are sites: place among them -> site.
    """

    number: int
    members: tuple[AskingLinear, ...]
    sites: Mapping[int, int]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SiteMatrices:
    """What the cloud has of a site.

    Attributes:
        each: Of a low-rank one its `A` `[r, in]` and `B` `[out, r]`; of a tap what makes it narrower, `[width, h]`.
    """

    each: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BoundSites:
    """Sites that a span knows the modules of.

    Attributes:
        specs: What was asked for.
        groups: Linear -> its group.
        blocks: Layer -> the site behind it.
        taps: Layer -> the tap behind it.
        matrices: Site -> what the cloud has of it, where that is anything.
        pauses: Site that asks -> where a pass pauses for it, a number that grows in running order; sites that are asked
            about together have the same.
    """

    specs: tuple[SiteSpec, ...]
    groups: Mapping[nn.Module, Group]
    blocks: Mapping[nn.Module, int]
    taps: Mapping[nn.Module, int]
    matrices: Mapping[int, SiteMatrices]
    pauses: Mapping[int, int]


@dataclass(slots=True, eq=False)
class Visit:
    """A pass with a visitor.

    Attributes:
        sites: Where to ask.
        visitor: Whom.
        leased: The weights of sites on loan.
        again: Whether this repeats a forward whose questions have been answered.
        company: Where it may meet others that run beside it; None for a pass that never does.
        anchor: A scalar that every contribution depends on: the gradient of an output with respect to it runs the
            backward through all sites, also where the span's own input wants none.
        tapped: What has come out of the taps so far.
    """

    sites: BoundSites
    visitor: Visitor
    leased: Mapping[int, LeasedWeights] = field(default_factory=dict)
    again: bool = False
    company: Company | None = None
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    tapped: dict[int, Tensor] = field(default_factory=dict)
    _ready: dict[nn.Module, Tensor] = field(default_factory=dict)

    def linear(self, module: AskingLinear, x: Tensor) -> Tensor:
        """The output of a linear, with what its site adds."""
        group = self.sites.groups.get(module)
        if group is None or (self.company is None and not group.sites):
            return module.plain(x)
        if module not in self._ready:
            self._ready.update(zip(group.members, self._outputs(group, x), strict=True))
        return self._ready.pop(module)

    def layer(self, module: nn.Module, output: Any) -> Any:
        """The output of a decoder layer, with what the site behind it adds."""
        if module in self.sites.taps:
            tap = self.sites.taps[module]
            hidden = (output[0] if isinstance(output, tuple) else output).detach()
            made = self.sites.matrices.get(tap)
            self.tapped[tap] = hidden if made is None else functional.linear(hidden, made.each[0])
        site = self.sites.blocks.get(module)
        if site is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        exchange = _Exchange(None, (site,), hidden.requires_grad)
        (answer,) = self._answers(exchange, [hidden])
        contribution = self._contribution(hidden, answer, exchange, 0).to(hidden.dtype)
        (result,) = self._joined(exchange, [hidden + contribution], (0,))
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _outputs(self, group: Group, x: Tensor) -> list[Tensor]:
        """The outputs of all linears of a group, in the order in which a single process computes them."""
        asked = {place: site for place, site in group.sites.items() if self.sites.specs[site].asks}
        loans = tuple(self.leased.get(group.sites.get(place, -1)) for place in range(len(group.members)))
        exchange = _Exchange(group, tuple(asked.values()), x.requires_grad, loans)
        inputs = [self._input(site, x) for site in exchange.sites]
        answers = self._answers(exchange, inputs) if asked else ()
        if self.company is not None and self.company.present:
            exchange.products = dict(enumerate(self.company.forward(group.number, group.members, loans, x)))
        if self.company is not None and any(loans) and x.requires_grad:
            exchange.x = x.detach()
        outputs = []
        for place, member in enumerate(group.members):
            output = member.plain(x) if self.company is None else _frozen(x, exchange, place)
            site = group.sites.get(place)
            loan = loans[place]
            if loan is not None:
                output = output + (loan(x) if self.company is None else _lent(x, loan, exchange, place))
            elif site is not None:
                at = exchange.sites.index(site)
                added = self._contribution(inputs[at], answers[at], exchange, at)
                if self._is_low(site):
                    added = functional.linear(added.to(output.dtype), self.sites.matrices[site].each[1])
                output = (output + added).to(output.dtype)  # as PEFT does: the sum is rounded, and not what is added
            outputs.append(output)
        exchange.products = {}
        together = self.company is not None and len(outputs) > 1
        return self._joined(exchange, outputs, tuple(asked)) if asked or together else outputs

    def _is_low(self, site: int) -> bool:
        return self.sites.specs[site].placement == Placement.LOW_RANK

    def _input(self, site: int, x: Tensor) -> Tensor:
        return functional.linear(x, self.sites.matrices[site].each[0]) if self._is_low(site) else x

    def _answers(self, exchange: _Exchange, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.visitor.forward(exchange.sites, None if self.again else inputs)

    def _contribution(self, x: Tensor, answer: Tensor, exchange: _Exchange, at: int) -> Tensor:
        result: Tensor = _Contribution.apply(self.anchor, x, answer, exchange, at)  # type: ignore[no-untyped-call]  # torch
        return result

    def _joined(self, exchange: _Exchange, outputs: list[Tensor], places: tuple[int, ...]) -> list[Tensor]:
        if not torch.is_grad_enabled():
            return outputs
        return list(_Joined.apply(exchange, places, *outputs))  # type: ignore[no-untyped-call]  # torch

    def products_back(self, exchange: _Exchange, gradients: Sequence[Tensor]) -> dict[int, Product]:
        """What the `gradients` of a group's outputs give its input, by place, where others run beside this pass.

        Without company the linears compute for themselves.
        """
        group = exchange.group
        if group is None or self.company is None or not self.company.present:
            return {}
        x, exchange.x = exchange.x, None
        return dict(enumerate(self.company.backward(group.number, group.members, exchange.loans, x, gradients)))

    def gradients(self, exchange: _Exchange, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Ask for what the `gradients` of the outputs of the asked linears give their inputs."""
        given = [
            functional.linear(gradient, self.sites.matrices[site].each[1].T) if self._is_low(site) else gradient
            for site, gradient in zip(exchange.sites, gradients, strict=True)
        ]
        return list(self.visitor.backward(exchange.sites, given, wanted=exchange.wanted))


@dataclass(slots=True, eq=False)
class _Exchange:
    """What a group's nodes share."""

    group: Group | None  # None for the place behind a layer
    sites: tuple[int, ...]
    wanted: bool  # whether the input's gradient leads anywhere
    loans: tuple[LeasedWeights | None, ...] = ()  # by place
    x: Tensor | None = None  # the group's input, where a meeting on the way back will need it
    gradients: list[Tensor | None] = field(default_factory=list)
    products: dict[int, Product] = field(default_factory=dict)  # by place, as long as their nodes need them


class _Contribution(torch.autograd.Function):
    """What the edge adds at one site. On the way back it hands on what the edge has answered for the input."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, _x: Tensor, answer: Tensor, exchange: _Exchange, at: int) -> Tensor:
        ctx.exchange, ctx.at = exchange, at
        return answer.view_as(answer)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        answered = ctx.exchange.gradients
        return None, answered[ctx.at] if answered else None, None, None, None


class _Frozen(torch.autograd.Function):
    """The plain output of a linear `[..., out]` of its input `[..., in]`. Keeps nothing but the linear's place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange, place: int) -> Tensor:
        ctx.exchange, ctx.place = exchange, place
        found = exchange.products.get(place)
        return _member(exchange, place).plain(x) if found is None else found.plain.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        exchange, place = ctx.exchange, ctx.place
        _meet_alone(exchange, gradient)
        found = exchange.products.pop(place, None)  # what is lent here has had its turn
        if found is None:
            return product_back(_member(exchange, place), gradient), None, None
        return found.plain.view(*gradient.shape[:-1], -1), None, None


def _frozen(x: Tensor, exchange: _Exchange, place: int) -> Tensor:
    result: Tensor = _Frozen.apply(x, exchange, place)  # type: ignore[no-untyped-call]  # torch
    return result


class _Lent(torch.autograd.Function):
    """What is added `[..., out]` by what is lent at a linear, of the linear's input `[..., in]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, scale: float, exchange: _Exchange, place: int) -> Tensor:
        ctx.exchange, ctx.place, ctx.scale = exchange, place, scale
        ctx.save_for_backward(x, down, up)
        found = exchange.products.get(place)
        if found is None or not isinstance(found.lent, Tensor):
            return LeasedWeights(down, up, scale)(x)
        return found.lent.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        exchange, place = ctx.exchange, ctx.place
        x, down, up = ctx.saved_tensors
        if exchange.wanted:
            _meet_alone(exchange, gradient)
        product = exchange.products.get(place)
        found = None if product is None else product.lent
        if not isinstance(found, LoanGradients):
            (found,) = loan_gradients([LeasedWeights(down, up, ctx.scale)], [rows_of(x)], [rows_of(gradient)])
        return found.x.view(x.shape) if ctx.needs_input_grad[0] else None, found.down, found.up, None, None, None


def _lent(x: Tensor, loan: LeasedWeights, exchange: _Exchange, place: int) -> Tensor:
    result: Tensor = _Lent.apply(x, loan.down, loan.up, loan.scale, exchange, place)  # type: ignore[no-untyped-call]
    return result


def _meet_alone(exchange: _Exchange, gradient: Tensor) -> None:
    """On the way back, have the products of a group of one linear computed: no node stands behind it that does."""
    if not exchange.products and len(exchange.loans) == 1:
        visit: Visit = _thread.visit  # the present call's
        exchange.products = visit.products_back(exchange, [gradient])


def _member(exchange: _Exchange, place: int) -> AskingLinear:
    if exchange.group is None:
        raise RuntimeError("there is no linear behind a layer")
    return exchange.group.members[place]


class _Joined(torch.autograd.Function):
    """The outputs of a group as they are.

    On the way back, once all their gradients are there, it asks, and has the linears' products computed where several
    passes do that together.
    """

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, places: tuple[int, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.places = exchange, places
        ctx.set_materialize_grads(True)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        visit: Visit = _thread.visit  # the present call's: it may be another than the forward's
        if ctx.places:
            asked = [gradients[place].detach() for place in ctx.places]
            ctx.exchange.gradients = visit.gradients(ctx.exchange, asked)
        if ctx.exchange.wanted:
            ctx.exchange.products = visit.products_back(ctx.exchange, gradients)
        return None, None, *gradients


# The present thread's pass ------------------------------------------------------------------------------------------

_thread = threading.local()


@contextmanager
def visiting(visit: Visit | Spotter) -> Iterator[None]:
    """Let the span's modules ask in what this thread computes inside, forward or backward."""
    before = getattr(_thread, "visit", None)
    _thread.visit = visit
    try:
        yield
    finally:
        _thread.visit = before


class Spotter:
    """Takes down which linears read which input, instead of asking."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, list[AskingLinear]]] = []  # the tensors stay alive, so that they stay different

    def linear(self, module: AskingLinear, x: Tensor) -> Tensor:
        """The plain output."""
        for known, members in self.inputs:
            if known is x and module not in members:
                members.append(module)
                break
        else:
            self.inputs.append((x, [module]))
        return module.plain(x)

    def layer(self, _module: nn.Module, output: Any) -> Any:
        """The plain output."""
        return output


class AskingLinear(nn.Module):
    """Stands before the class of a linear in the bases of its subclass."""

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output, with what a site adds where a visit goes on."""
        visit: Visit | Spotter | None = getattr(_thread, "visit", None)
        return self.plain(x) if visit is None else visit.linear(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The linear itself."""
        return cast(Tensor, super().forward(x))  # that of the class that stands behind


def asking_linear(linear: nn.Module) -> nn.Module:
    """The same linear, sharing its weights, as an `AskingLinear` too; it computes the same where nobody visits."""
    cls = _asking_class(type(linear))
    asking = cls.__new__(cls)
    asking.__dict__.update(linear.__dict__)
    return asking


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _asking_class(real: type[nn.Module]) -> type[nn.Module]:
    if real not in _classes:
        _classes[real] = type(real.__name__, (AskingLinear, real), {"__module__": real.__module__})
    return _classes[real]


def ask_behind(layer: nn.Module, _args: Any, output: Any) -> Any:
    """A decoder layer's forward hook: its output, with what a site adds where a visit goes on."""
    visit: Visit | Spotter | None = getattr(_thread, "visit", None)
    return output if visit is None else visit.layer(layer, output)
