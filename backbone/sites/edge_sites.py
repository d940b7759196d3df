"""Sites on the edge: the linears and layers of the cloud that carry an adapter of the edge, with these adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from isthmus.backbone.sites.bottleneck import BOTTLENECK, Bottleneck
from isthmus.backbone.sites.low_rank import LOW_RANK, LowRankSite
from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.backbone.skeleton import SkeletonLayer
from isthmus.common.errors import UnsupportedCallError


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One place inside the span where the edge adds something.

    Attributes:
        name: The module's name in the whole model, such as `model.layers.7.self_attn.q_proj`.
        spec: Where it is, and where it runs.
        module: What computes the contribution.
    """

    name: str
    spec: SiteSpec
    module: nn.Module

    @property
    def layer(self) -> int:
        """The decoder layer's index in the whole model."""
        return self.spec.layer

    @property
    def part(self) -> str:
        """The module's name inside the layer; empty for what stands behind the layer as a whole."""
        return self.spec.part

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that are trained here."""
        if self.spec.placement == Placement.LEASED_FROZEN:
            return ()
        return tuple(parameter for parameter in self.module.parameters() if parameter.requires_grad)

    @property
    def acts(self) -> bool:
        """Whether its adapter is switched on.

        Raises:
            UnsupportedCallError: It is merged.
        """
        module: Any = self.module
        if not is_peft_layer(module):
            return True
        if module.merged:
            raise UnsupportedCallError("an adapter of a layer that the cloud holds is merged; merge on the whole model")
        return not module.disable_adapters and bool(adapters_of(module) & set(module.active_adapters))

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the site's input and of its contribution: numbers for a token position."""
        if isinstance(self.module, Bottleneck):
            return self.module.down.in_features, self.module.down.in_features
        if isinstance(self.module, LowRankSite):
            return self.module.rank, self.module.rank
        module: Any = self.module
        base = module.get_base_layer() if is_peft_layer(module) else module
        rows, columns = base.weight.shape
        return (rows, columns) if hasattr(base, "nf") else (columns, rows)  # transformers' Conv1D is transposed

    @property
    def device(self) -> torch.device:
        """Where the contribution is computed."""
        return next(self.module.parameters()).device

    def contribution(self, x: Tensor) -> Tensor:
        """What is added to the output of the linear whose input is `x` `[B, S, in]`: `[B, S, out]`.

        For a layer, `x` is its output `[B, S, h]`; for a low-rank site it is `A x`, and the answer goes through `B`.
        """
        if isinstance(self.module, Bottleneck):
            return self.module.change(x)
        return cast(Tensor, self.module(x))  # its base is a skeleton, which gives zeros


def find_sites(layers: Iterable[SkeletonLayer]) -> Iterator[Site]:
    """The sites in the cloud's layers, layer by layer, in the order of the real layer's modules.

    Those whose adapters are switched off are among them.
    """
    for layer in layers:
        for part, module in layer.named_modules():
            if is_peft_layer(module):
                yield Site(f"{layer.name}.{part}", SiteSpec(layer.index, part), module)
            elif isinstance(module, LowRankSite):
                linear, basis = part.removesuffix(f".{LOW_RANK}"), Basis[module.init.upper()]
                spec = SiteSpec(layer.index, linear, Placement.LOW_RANK, module.rank, module.seed, basis)
                yield Site(f"{layer.name}.{linear}", spec, module)
        block = getattr(layer, BOTTLENECK, None)
        if isinstance(block, Bottleneck):
            yield Site(layer.name, SiteSpec(layer.index, ""), block)


def is_peft_layer(module: nn.Module) -> bool:
    """Whether PEFT has wrapped something here with an adapter."""
    if "peft" not in sys.modules:  # nobody has wrapped anything, and the import takes seconds
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def adapters_of(module: Any) -> set[str]:
    """Names of the adapters on a layer of PEFT, active or not."""
    return {adapter for part in module.adapter_layer_names for adapter in getattr(module, part)}
