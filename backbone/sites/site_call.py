"""The edge's side of one pass through the span: it computes the sites' contributions and their gradients.

For each site the pass keeps a small graph, from the site's input to its contribution. It also keeps its answers until
the pass is over. A cloud that computes the span again, because a connection broke or memory ran out, gets the same
answers, so dropout acts once and gradients are counted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.leasing import lease_of, leased_parameters
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import NonFiniteError, PlanError


@dataclass(slots=True)
class _Kept:
    """A site's input as a leaf, and its contribution, which holds the graph between the two, if there is one."""

    leaf: Tensor
    contribution: Tensor
    answer: Tensor | None = None  # the input's gradient, once it has been asked for
    asked: bool = False


class SiteCall:
    """Answers for sites, by their numbers in `sites`; the `SiteAdapters` of `isthmus.backbone.runtime.sited_pass`.

    Attributes:
        sites: The sites that are live in this pass.
        specs: The sites and, behind them, the taps, as the cloud numbers them.
        parameters: The parameters that are trained at the sites, each once.
        lease: The weights of leased sites as they are at the beginning of the pass.
        lease_key: Changes with the leased sites and with every change of their weights.
        turn: A context in which all of this pass is computed; several passes may be on their way at a time.
        tapped: The outputs of the taps, `[B, S, h or width]` each, once the forward is over.
        closed: Whether the pass is over.

    Args:
        sites: The sites that are live in this pass.
        keep: Whether a backward will follow.
        taps: The taps of this pass.
        summed: Whether a backward answers one gradient for all sites of a group, which saves traffic and adds up in
            another order than a single process does.
    """

    def __init__(
        self, sites: Sequence[Site], *, keep: bool, taps: Sequence[SiteSpec] = (), summed: bool = False
    ) -> None:
        self.sites = tuple(sites)
        self.specs = (*(site.spec for site in sites), *taps)
        leased = [site for site in self.sites if site.spec.is_leased]
        self.lease = tuple(map(lease_of, leased))
        self.lease_key = tuple((id(p), p._version) for site in leased for p in leased_parameters(site))
        self.turn: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.tapped: tuple[Tensor, ...] = ()
        self.parameters = tuple(dict.fromkeys(p for site in self.sites for p in site.parameters))
        self.closed = False
        self._keep = keep
        self._summed = summed
        self._kept: dict[int, _Kept] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    @property
    def leased_parameters(self) -> list[nn.Parameter]:
        """The leased matrices whose gradients come back: `A` and `B` of each trained site in turn."""
        trained = (site for site in self.sites if site.spec.placement == Placement.LEASED)
        return [parameter for site in trained for parameter in leased_parameters(site)]

    def forward(self, sites: Sequence[int], inputs: Sequence[Tensor] | None) -> list[Tensor]:
        """The contributions `[B, S, out]` of `sites` to `inputs` `[B, S, in]`; without inputs the same as before.

        Raises:
            NonFiniteError: A contribution has NaN or infinity.
            PlanError: A site was not answered before, there is no such site, or an input has another width.
        """
        given = inputs if inputs is not None else [None] * len(sites)
        with self.turn():
            return [self._contribution(number, x).detach() for number, x in zip(sites, given, strict=True)]

    def backward(self, sites: Sequence[int], gradients: Sequence[Tensor], *, wanted: bool) -> list[Tensor | None]:
        """The gradients `[B, S, in]` of the sites' inputs, of the `gradients` `[B, S, out]` of their contributions.

        The parameters' gradients are added up as well. The answer is empty unless the inputs' gradients are `wanted`;
        with `summed` the first site has the sum, and the others None.

        Raises:
            NonFiniteError: A gradient has NaN or infinity.
            PlanError: A site has not been answered in the forward, there is no such site, or a gradient has another
                shape than its contribution.
        """
        answers: list[Tensor | None] = []
        with self.turn():
            for number, gradient in zip(sites, gradients, strict=True):
                kept = self._known(number)
                if not kept.asked:
                    self._differentiate(number, kept, gradient, wanted=wanted)
                answers.append(kept.answer)
            if not wanted:
                return []
            return self._summed_up(sites, answers) if self._summed else answers

    def take_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add the gradients of `leased_parameters`, in their order.

        Raises:
            PlanError: There are more or fewer, or one has another shape.
        """
        leased = self.leased_parameters
        if [each.shape for each in gradients] != [parameter.shape for parameter in leased]:
            raise PlanError(f"{len(gradients)} gradients came back for {len(leased)} leased matrices")
        for parameter, gradient in zip(leased, gradients, strict=True):
            if parameter.requires_grad:
                self._add(parameter, gradient.to(parameter))

    def gradients(self) -> list[Tensor | None]:
        """The gradients of `parameters`, in their order; None for one that got none."""
        return [self._gradients.get(parameter) for parameter in self.parameters]

    def close(self) -> None:
        """End the pass and forget what was kept for it."""
        self._kept.clear()
        self.closed = True

    def _contribution(self, number: int, x: Tensor | None) -> Tensor:
        known = self._kept.get(number)
        if known is not None:
            return known.contribution
        if x is None:
            raise PlanError(f"site {number} was asked for its contribution again and never gave one")
        site = self._site(number)
        n_in, _ = site.widths
        if x.shape[-1] != n_in:
            raise PlanError(f"a tensor of shape {list(x.shape)} came for site {number}, whose input is {n_in} wide")
        leaf = x.detach().to(site.device).requires_grad_(self._keep)
        with torch.set_grad_enabled(self._keep):
            contribution = site.contribution(leaf)
        _check(contribution, site, "contribution")
        self._kept[number] = _Kept(leaf, contribution)
        return contribution

    def _differentiate(self, number: int, kept: _Kept, gradient: Tensor, *, wanted: bool) -> None:
        site = self._site(number)
        if gradient.shape != kept.contribution.shape:
            raise PlanError(
                f"a gradient of shape {list(gradient.shape)} came for site {number}, whose contribution has shape "
                f"{list(kept.contribution.shape)}"
            )
        parameters = site.parameters
        inputs = (kept.leaf, *parameters) if wanted else parameters
        if inputs and kept.contribution.requires_grad:
            given = gradient.to(kept.contribution)
            found = list(torch.autograd.grad(kept.contribution, inputs, given, allow_unused=True))
            if wanted:
                kept.answer = found.pop(0)
            for parameter, value in zip(parameters, found, strict=True):
                if value is not None:
                    self._add(parameter, value)
        if wanted and kept.answer is None:
            kept.answer = torch.zeros_like(kept.leaf)
        if kept.answer is not None:
            _check(kept.answer, site, "gradient")
        kept.asked = True

    def _add(self, parameter: nn.Parameter, value: Tensor) -> None:
        before = self._gradients.get(parameter)
        self._gradients[parameter] = value if before is None else before + value

    def _summed_up(self, sites: Sequence[int], answers: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for all sites whose input is the group's own, at the first of them."""
        alike = [i for i, number in enumerate(sites) if self._site(number).spec.placement == Placement.EDGE]
        result = list(answers)
        if len(alike) > 1:
            result[alike[0]] = torch.stack([answer for i in alike if (answer := answers[i]) is not None]).sum(0)
            for i in alike[1:]:
                result[i] = None
        return result

    def _known(self, number: int) -> _Kept:
        if number not in self._kept:
            raise PlanError(f"a gradient came for site {number}, which has not contributed")
        return self._kept[number]

    def _site(self, number: int) -> Site:
        if not 0 <= number < len(self.sites):
            raise PlanError(f"there is no site {number} among {len(self.sites)}")
        return self.sites[number]


def _check(tensor: Tensor, site: Site, what: str) -> None:
    if not all(map(math.isfinite, torch.aminmax(tensor.detach()))):  # NaN passes through both
        raise NonFiniteError(
            f"the {what} of {site.name} holds NaN or infinity: lower the learning rate, or look for bad values in the "
            "adapter"
        )
