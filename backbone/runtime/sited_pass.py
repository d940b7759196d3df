"""One pass through a span whose linears and layers ask for what sites add to their output.

Bit for bit: a single process with PEFT adds up the gradients of a shared input in the reverse order of the modules, an
adapter's before its linear's. The graph that is built here has the same nodes in the same order, and one node more
behind each group (see `isthmus.backbone.runtime.sited_nodes`).

Where a pass may run beside others, the products of a group's linears and leased LoRAs may be computed together with
those of other calls (see `isthmus.backbone.runtime.batched_products`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.backbone.runtime.batched_products import BatchingPartners, Product
from isthmus.backbone.runtime.sited_nodes import (
    Group,
    GroupState,
    edge_contribution,
    frozen_product,
    group_outputs,
    leased_contribution,
)
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.sites.site_spec import Placement, SiteSpec


class SiteAdapters(Protocol):
    """The adapters of the sites that run on the edge. Sites are numbered as they were bound.

    An adapter is given its site's own input `[B, S, in]` if it is placed on the edge, and `A x` `[B, S, r]` if it is a
    low-rank one; its contribution is `[B, S, out]`, or `[B, S, r]`, in any floating point dtype.
    """

    def forward(self, sites: Sequence[int], inputs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """The contributions of `sites`, one for each of `inputs`.

        Without inputs the span is computed again, and the answer is the same as the first time.
        """

    def backward(self, sites: Sequence[int], gradients: Sequence[Tensor], *, wanted: bool) -> Sequence[Tensor | None]:
        """The gradients of the inputs, of the `gradients` of the contributions.

        Unless they are `wanted`, nothing below needs them, and the answer may be empty.
        """


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SiteMatrices:
    """The frozen matrices that the cloud has for a site.

    Attributes:
        each: `A` `[r, in]` and `B` `[out, r]` of a low-rank site; the projection `[width, h]` of a tap.
    """

    each: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BoundSites:
    """A list of sites, bound to the modules of a span.

    Attributes:
        specs: The sites; a site's number is its index here.
        groups: Linear -> its group.
        blocks: Layer -> the number of the site behind it.
        taps: Layer -> the number of the tap behind it.
        matrices: Number of a site -> its matrices, for sites that have any.
        pauses: Number of a site that asks -> where a pass pauses for it, a number that grows in running order; sites
            that are asked about together have the same.
    """

    specs: tuple[SiteSpec, ...]
    groups: Mapping[nn.Module, Group]
    blocks: Mapping[nn.Module, int]
    taps: Mapping[nn.Module, int]
    matrices: Mapping[int, SiteMatrices]
    pauses: Mapping[int, int]


@dataclass(slots=True, eq=False)
class SitedPass:
    """A pass through a span with sites.

    Attributes:
        sites: The sites.
        adapters: Answers for the sites that run on the edge.
        leased: The weights of leased sites, by number.
        again: Whether this repeats a forward whose questions have been answered.
        partners: The way to batched products; None for a pass that never runs beside others.
        anchor: A scalar that every contribution depends on. The gradient of an output with respect to it runs the
            backward through all sites even where the gradient of the span's input is not wanted.
        tapped: The outputs of the taps so far, by number.
    """

    sites: BoundSites
    adapters: SiteAdapters
    leased: Mapping[int, LeasedLora] = field(default_factory=dict)
    again: bool = False
    partners: BatchingPartners | None = None
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    tapped: dict[int, Tensor] = field(default_factory=dict)
    _shape: torch.Size = field(default_factory=torch.Size)  # `[B, S]` of what the linears read
    _ready: dict[nn.Module, Tensor] = field(default_factory=dict)

    @property
    def taps(self) -> tuple[Tensor, ...]:
        """The outputs of the taps, in their order."""
        return tuple(self.tapped[number] for number in sorted(self.tapped))

    def linear(self, linear: nn.Module, x: Tensor) -> Any:
        """The output of a linear for `x` `[B, S, in]`, with what its site adds: `[B, S, out]`.

        OPT's feed-forward part, behind its attention, reads `[B * S, in]` and gives `[B * S, out]`.
        """
        if x.dim() == 3:
            self._shape = x.shape[:2]
        group = self.sites.groups.get(linear)
        if group is None or (self.partners is None and not group.sites):
            return linear(x)
        if linear not in self._ready:
            self._ready.update(zip(group.members, self._outputs(group, x), strict=True))
        return self._ready.pop(linear)

    def layer(self, layer: nn.Module, output: Any) -> Any:
        """The output of a decoder layer, a tensor or a tuple that opens with one, with what the site behind it adds."""
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        tap = self.sites.taps.get(layer)
        if tap is not None:
            projection = self.sites.matrices.get(tap)
            tapped = hidden.detach()
            self.tapped[tap] = tapped if projection is None else functional.linear(tapped, projection.each[0])
        site = self.sites.blocks.get(layer)
        if site is None:
            return output
        state = GroupState(None, (site,), hidden.requires_grad, hidden.shape[:2])
        (answer,) = self._answers(state, [hidden])
        contribution = edge_contribution(self.anchor, hidden, answer, state, 0).to(hidden.dtype)
        (result,) = group_outputs(state, (0,), [hidden + contribution])
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def ask_gradients(self, state: GroupState, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Ask the edge for the gradients of its sites' inputs, of the `gradients` of these sites' outputs."""
        given = [
            functional.linear(gradient, self.sites.matrices[site].each[1].T) if self._is_low_rank(site) else gradient
            for site, gradient in zip(state.sites, gradients, strict=True)
        ]
        given = [each.reshape(*state.shape, each.shape[-1]) for each in given]
        answers = self.adapters.backward(state.sites, given, wanted=state.wanted)
        rows = gradients[0].shape[:-1]
        return [None if answer is None else answer.reshape(*rows, answer.shape[-1]) for answer in answers]

    def backward_products(self, state: GroupState, gradients: Sequence[Tensor]) -> dict[int, Product]:
        """Batched products by member, of the `gradients` of a group's outputs; none where no other call runs beside."""
        group = state.group
        if group is None or self.partners is None or not self.partners.present:
            return {}
        x, state.x = state.x, None
        return dict(enumerate(self.partners.backward(group.number, group.members, state.leased, x, gradients)))

    def _outputs(self, group: Group, x: Tensor) -> list[Tensor]:
        """The outputs of all linears of a group, in the order in which a single process computes them."""
        asked = {index: site for index, site in group.sites.items() if self.sites.specs[site].asks}
        leased = tuple(self.leased.get(group.sites.get(index, -1)) for index in range(len(group.members)))
        state = GroupState(group, tuple(asked.values()), x.requires_grad, self._shape, leased)
        inputs = [self._site_input(site, x) for site in state.sites]
        answers = self._answers(state, inputs) if asked else ()
        if self.partners is not None and self.partners.present:
            state.products = dict(enumerate(self.partners.forward(group.number, group.members, leased, x)))
        if self.partners is not None and any(leased) and x.requires_grad:
            state.x = x.detach()
        outputs = []
        for index, member in enumerate(group.members):
            output = member(x) if self.partners is None else frozen_product(x, state, index)
            site, lora = group.sites.get(index), leased[index]
            if lora is not None:
                output = output + (lora(x) if self.partners is None else leased_contribution(x, lora, state, index))
            elif site is not None:
                at = state.sites.index(site)
                added = edge_contribution(self.anchor, inputs[at], answers[at], state, at)
                if self._is_low_rank(site):
                    added = functional.linear(added.to(output.dtype), self.sites.matrices[site].each[1])
                output = (output + added).to(output.dtype)  # as PEFT does: the sum is rounded, not the contribution
            outputs.append(output)
        state.products = {}
        may_batch = self.partners is not None and len(outputs) > 1
        return group_outputs(state, tuple(asked), outputs) if asked or may_batch else outputs

    def _is_low_rank(self, site: int) -> bool:
        return self.sites.specs[site].placement == Placement.LOW_RANK

    def _site_input(self, site: int, x: Tensor) -> Tensor:
        return functional.linear(x, self.sites.matrices[site].each[0]) if self._is_low_rank(site) else x

    def _answers(self, state: GroupState, inputs: Sequence[Tensor]) -> list[Tensor]:
        # Sites that share an input still do, and the edge is sent it once.
        asked = {id(x): x.reshape(*state.shape, x.shape[-1]) for x in inputs}
        answers = self.adapters.forward(state.sites, None if self.again else [asked[id(x)] for x in inputs])
        return [answer.reshape(*x.shape[:-1], answer.shape[-1]) for answer, x in zip(answers, inputs, strict=True)]
