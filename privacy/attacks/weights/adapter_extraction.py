"""Adapters inside the span, from what crosses at their sites: the product of an adapter's matrices by least squares.

At a site on the edge the cloud sends the inputs `X` and gets the contributions `C = X M^T`, with `M = scale * B A`.
Backward it sends the gradients `G` of the contributions and gets those of the inputs, `R = G M`. `M` has rank r, so r
independent token positions each way are enough: `M = C^T (G C^T)^+ R` (generalized Nystrom, Nakatsukasa 2020). Without
a backward, least squares on `X` and `C` finds `M` where the inputs lead, and all of it from as many positions as the
linear has inputs. What the weights were at each step is seen anew, as they stay the same within a step.

A low-rank site is the same with inputs and contributions of r numbers. Leased weights are sent as they are. Dropout
adds noise to `C` and `R`; an adapter with a nonlinearity has no such `M`. Both show in the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.privacy.recording.traffic import Asked, Traffic
from isthmus.protocol.site_messages import SitePhase

_CUTOFFS = (1e-5, 1e-3, 1e-1)  # of singular values: for the rounding of fp32, of fp16 or int8, of int4
_HELD_OUT = 4  # one position in so many


@dataclass(frozen=True, slots=True, eq=False)
class ExtractedAdapter:
    """An adapter at one site, or at several that read one input and answer one gradient for all.

    Attributes:
        sites: The sites; their outputs follow each other in `product`.
        step: The optimizer step whose weights they are; -1 for leased ones.
        product: `M` `[out, in]`; of a low-rank site `[r, r]`.
        error: Relative error, by the Frobenius norm, of the contributions that it predicts for positions that it was
            not made of. 0 where the weights were sent.
    """

    sites: tuple[SiteSpec, ...]
    step: int
    product: Tensor
    error: float

    def rank(self, cutoff: float = 1e-3) -> int:
        """How many singular values are above `cutoff` of the largest one."""
        return int(torch.linalg.matrix_rank(self.product, rtol=cutoff))


class AdapterExtraction:
    """The adapters of each step at each site."""

    name: ClassVar[str] = "adapter-extraction"
    sees: ClassVar[str] = "questions and answers at sites, and leases"
    knows: ClassVar[str] = "nothing"

    def run(self, traffic: Traffic) -> tuple[ExtractedAdapter, ...]:
        """Extract what there is, in the order of the steps; a site that never contributed is left out."""
        found = [
            ExtractedAdapter((site,), -1, scale * (up @ down), 0.0)
            for lease in traffic.leased
            for site, (down, up, scale) in zip(lease.sites, lease.weights, strict=True)
        ]
        for (_, step, sites), pairs in _collect(traffic).items():
            if pairs.inputs and (made := _solve(pairs)) is not None:
                found.append(ExtractedAdapter(sites, step, *made))
        return tuple(found)


@dataclass(slots=True)
class _Pairs:
    """What a site was asked and answered in a step, as lists of `[positions, width]`."""

    inputs: list[Tensor] = field(default_factory=list)
    contributions: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)


def _collect(traffic: Traffic) -> dict[tuple[str, int, tuple[SiteSpec, ...]], _Pairs]:
    """By session, step and sites that share a gradient."""
    summed = {  # by session and group: whether one gradient answers for several sites
        (asked.session, asked.sites): len(asked.answer) < len(asked.sites)
        for asked in traffic.asked
        if asked.phase == SitePhase.BACKWARD
    }
    found: dict[tuple[str, int, tuple[SiteSpec, ...]], _Pairs] = {}
    for asked in traffic.asked:
        for sites, question, answer in _units(asked, summed.get((asked.session, asked.sites), False)):
            pairs = found.setdefault((asked.session, asked.step, sites), _Pairs())
            if asked.phase == SitePhase.FORWARD:
                pairs.inputs.append(question)
                pairs.contributions.append(answer)
            else:
                pairs.gradients.append(question)
                pairs.answers.append(answer)
    return found


def _units(asked: Asked, summed: bool) -> Iterator[tuple[tuple[SiteSpec, ...], Tensor, Tensor]]:
    """The sites of a question one by one, or those together that share a gradient, with what went down and came up."""
    if asked.phase not in (SitePhase.FORWARD, SitePhase.BACKWARD):
        return
    forward = asked.phase == SitePhase.FORWARD
    inner = _of_each(asked.sites, asked.question if forward else asked.answer)
    outer = [each.flatten(0, -2) for each in (asked.answer if forward else asked.question)]
    together = [index for index, site in enumerate(asked.sites) if summed and site.placement == Placement.EDGE]
    units = [together] * bool(together) + [[index] for index in range(len(asked.sites)) if index not in together]
    for unit in units:
        outputs = torch.cat([outer[index] for index in unit], -1)
        sites = tuple(asked.sites[index] for index in unit)
        yield (sites, inner[unit[0]], outputs) if forward else (sites, outputs, inner[unit[0]])


def _of_each(sites: Sequence[SiteSpec], tensors: Sequence[Tensor]) -> list[Tensor]:
    """A tensor `[positions, in]` for each site, where those at a linear's input may share the first of theirs."""
    own = (each.flatten(0, -2) for each in tensors)
    shared: Tensor | None = None
    result = []
    for site in sites:
        if shared is None or site.placement != Placement.EDGE or len(tensors) == len(sites):
            result.append(next(own))
            shared = result[-1] if site.placement == Placement.EDGE else shared
        else:
            result.append(shared)
    return result


def _solve(pairs: _Pairs) -> tuple[Tensor, float] | None:
    """The best product by its error on positions that are held out; None where nothing was contributed."""
    inputs, contributions = torch.cat(pairs.inputs).double(), torch.cat(pairs.contributions).double()
    held_out = torch.arange(len(inputs)) % _HELD_OUT == _HELD_OUT - 1
    if not contributions[held_out].any():
        return None
    x, c = inputs[~held_out], contributions[~held_out]
    products = [torch.linalg.pinv(x, rtol=cutoff) @ c for cutoff in _CUTOFFS]
    if pairs.gradients:
        g, r = torch.cat(pairs.gradients).double(), torch.cat(pairs.answers).double()
        core = g @ c.T
        products += [(c.T @ (torch.linalg.pinv(core, rtol=cutoff) @ r)).T for cutoff in _CUTOFFS]
    wanted = contributions[held_out]
    errors = [((inputs[held_out] @ product - wanted).norm() / wanted.norm()).item() for product in products]
    best = min(range(len(errors)), key=errors.__getitem__)
    return products[best].T.float(), errors[best]
