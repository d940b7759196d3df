"""The edge's sites that a call goes through: its pass over the span, there and back. No other call comes here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.backbone.runtime.batched_products import BatchingPartners
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.runtime.sited_modules import sites_active
from isthmus.backbone.runtime.sited_pass import BoundSites, SiteAdapters, SitedPass
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.backbone.split.span import SpanInput


@dataclass(frozen=True, slots=True)
class CallSites:
    """The sites of one call.

    Attributes:
        bound: The sites, bound to the span's modules.
        adapters: Answers for those that run on the edge.
        leased: The weights of leased sites, by the site's number.
        partners: The way to batched products; None for a call that never runs beside others.
    """

    bound: BoundSites
    adapters: SiteAdapters
    leased: Mapping[int, LeasedLora] = field(default_factory=dict)
    partners: BatchingPartners | None = None

    @property
    def specs(self) -> tuple[SiteSpec, ...]:
        """The sites as the edge has named them."""
        return self.bound.specs

    @property
    def have_gradients(self) -> bool:
        """Whether a backward gives any of them a gradient; a tap gets none."""
        return any(spec.placement != Placement.TAP for spec in self.specs)

    def run(self, host: SiteHost, inputs: SpanInput, *, again: bool) -> tuple[Tensor, SitedPass]:
        """The span's output `[B, S, h]`, and the pass that it comes from.

        Args:
            host: The span.
            inputs: Its input.
            again: Whether this repeats a forward whose questions have been answered.
        """
        sited = self._pass(again=again)
        with sites_active(sited):
            return host.sited_span(inputs.hidden, inputs.attention_mask, inputs.position_ids), sited

    def differentiate(
        self, hidden: Tensor, output: Tensor, forward: SitedPass, gradient: Tensor, *, wanted: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The gradients of the span's input, where that is `wanted`, and of the leased matrices, A and B of each site.

        Args:
            hidden: The span's input `[B, S, h]`.
            output: Its output.
            forward: The pass that gave the output. Its leased weights count: the lease may have been renewed since.
            gradient: The output's.
            wanted: See above.
        """
        leased = [weights for _, weights in sorted(forward.leased.items())]
        matrices = [matrix for weights in leased for matrix in (weights.down, weights.up) if matrix.requires_grad]
        inputs = [hidden if wanted else forward.anchor, *matrices]
        # The engine has one thread for each device, and a call that pauses would keep it from all others.
        with sites_active(self._pass(again=False)), torch.autograd.set_multithreading_enabled(False):
            result, *found = torch.autograd.grad(output, inputs, gradient, allow_unused=True)
        back = tuple(
            torch.zeros_like(matrix) if each is None else each for matrix, each in zip(matrices, found, strict=True)
        )
        return result if wanted else None, back

    def _pass(self, *, again: bool) -> SitedPass:
        return SitedPass(self.bound, self.adapters, self.leased, again, self.partners)
