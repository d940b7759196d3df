"""Sites whose LoRA the edge leases to the cloud, which runs it: nothing crosses the wire for a token then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import UnsupportedCallError


@dataclass(frozen=True, slots=True, eq=False)
class LeasedLora:
    """The LoRA of a leased site: `scale * B A x`, with `A` `[r, in]` (`down`) and `B` `[out, r]` (`up`)."""

    down: Tensor
    up: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """The contribution `[B, S, out]` to `x` `[B, S, in]`, in PEFT's order of operations."""
        return functional.linear(functional.linear(x, self.down), self.up) * self.scale


def leased(site: Site, *, trained: bool = True) -> Site:
    """The same site with its LoRA leased to the cloud; unless it is `trained`, no gradients come back.

    Raises:
        UnsupportedCallError: Its adapter is not a plain LoRA, of which one acts and drops nothing out.
    """
    module: Any = site.module
    active = [adapter for adapter in getattr(module, "active_adapters", ()) if adapter in getattr(module, "lora_A", ())]
    if type(module).__module__ != "peft.tuners.lora.layer" or len(active) != 1:
        raise UnsupportedCallError(
            f"{site.name} cannot be leased: the cloud runs plain LoRA, one at a site; place it on the edge"
        )
    if any(isinstance(each, nn.Dropout) and each.p > 0 for each in module.lora_dropout.values()):
        raise UnsupportedCallError(
            f"{site.name} cannot be leased with dropout, whose masks are drawn on the edge: give lora_dropout=0, or "
            "place it on the edge"
        )
    if module.lora_A[active[0]].bias is not None or module.lora_B[active[0]].bias is not None:
        raise UnsupportedCallError(f"{site.name} cannot be leased with lora_bias=True: leave the bias out")
    placement = Placement.LEASED if trained else Placement.LEASED_FROZEN
    return Site(site.name, SiteSpec(site.spec.layer, site.spec.part, placement), module)


def leased_parameters(site: Site) -> tuple[nn.Parameter, nn.Parameter]:
    """`A` `[r, in]` and `B` `[out, r]` of a leased site."""
    module: Any = site.module
    adapter = _adapter(module)
    return module.lora_A[adapter].weight, module.lora_B[adapter].weight


def lease_of(site: Site) -> LeasedLora:
    """Copies of a leased site's weights: a call that is repeated gets those that it began with."""
    module: Any = site.module
    down, up = leased_parameters(site)
    return LeasedLora(down.detach().clone(), up.detach().clone(), float(module.scaling[_adapter(module)]))


def _adapter(module: Any) -> str:
    (adapter,) = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    return str(adapter)
