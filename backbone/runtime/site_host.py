"""Sites on the cloud's side: a frozen span that knows its groups of linears and binds lists of sites to its modules.

The linears of a layer that read the same input (q, k and v; gate and up) form a *group*. At a group with sites that run
on the edge, a pass asks for their answers once in the forward and once in the backward (`sited_pass.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from isthmus.backbone.checkpoints.weight_quantization import features_of
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span
from isthmus.backbone.runtime.batched_products import ProductBatches
from isthmus.backbone.runtime.sited_modules import InputRecorder, SitedLayer, SitedLinear, sites_active
from isthmus.backbone.runtime.sited_nodes import Group
from isthmus.backbone.runtime.sited_pass import BoundSites, SiteMatrices
from isthmus.backbone.sites.ladder_network import tap_projection
from isthmus.backbone.sites.low_rank_basis import site_basis
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.backbone.skeleton import named_linears
from isthmus.backbone.split.span import FrozenSpan, empty_layers, sharing_copy
from isthmus.common.errors import PlanError

_Place = tuple[int, str]


class SiteHost:
    """A frozen span, and the same span with stand-ins for its linears and layers, for passes with sites.

    Args:
        span: The span, which stays as it is.

    Attributes:
        sited_span: The span with stand-ins; it shares all tensors, and computes inside of `sites_active`.
        product_batches: Computes the linears' products for several calls at once.
    """

    def __init__(self, span: FrozenSpan) -> None:
        self.span = span
        self._made: WeakValueDictionary[SiteSpec, SiteMatrices] = WeakValueDictionary()
        self._path = family_of(span.config).layers_path
        self._layers: dict[int, nn.Module] = dict(zip(span.layer_span, span.layers, strict=True))
        self._linears: dict[_Place, nn.Module] = {
            (index, name): linear for index, layer in self._layers.items() for name, linear in named_linears(layer)
        }
        self.sited_span = span.with_layers([_with_stand_ins(layer) for layer in span.layers])
        self._groups = self._find_groups()
        self.product_batches = ProductBatches()

    @property
    def groups(self) -> tuple[tuple[tuple[int, str], ...], ...]:
        """The linears that read one input, in running order: layer and name inside it."""
        place_of = {linear: place for place, linear in self._linears.items()}
        return tuple(tuple(place_of[member] for member in members) for members in self._groups)

    @property
    def widest(self) -> int:
        """The most numbers for a token position that the tensors of one group have in one direction."""
        groups = [[self._features(*place) for place in group] for group in self.groups]
        return max(max(sum(n_in for n_in, _ in group), sum(n_out for _, n_out in group)) for group in groups)

    def widths(self, spec: SiteSpec) -> tuple[int, int]:
        """Widths of what a site's adapter is given, and of its contribution: numbers for a token position.

        Raises:
            PlanError: The span has no such module.
        """
        if spec.placement == Placement.LOW_RANK:
            return spec.rank, spec.rank
        if not spec.part and spec.layer in self._layers:
            return self.span.hidden_size, self.span.hidden_size
        return self._features(spec.layer, spec.part)

    def matrix_bytes(self, spec: SiteSpec) -> int:
        """Bytes of the matrices that `matrices` makes for a site, computed from their shapes.

        Raises:
            PlanError: The span has no such module.
        """
        numbers = 0
        if spec.placement == Placement.LOW_RANK:
            n_in, n_out = self._features(spec.layer, spec.part)
            numbers = min(spec.rank, n_in, n_out) * (n_in + n_out)  # a higher rank is refused
        elif spec.placement == Placement.TAP:
            numbers = min(spec.rank, self.span.hidden_size) * self.span.hidden_size
        return numbers * self.span.dtype.itemsize

    def known_matrices(self, spec: SiteSpec) -> SiteMatrices | None:
        """The matrices of a site if they were made before and something still holds them."""
        return self._made.get(spec)

    def matrices(self, spec: SiteSpec) -> SiteMatrices | None:
        """Make the matrices that the cloud has for a site; None for a site without any.

        Raises:
            ConfigError: A rank or a width does not fit.
            PlanError: The span has no such module.
        """
        if spec.placement == Placement.LOW_RANK:
            linear = self._linear(spec.layer, spec.part)
            name, init = f"{self._path}.{spec.layer}.{spec.part}", spec.basis.name.lower()
            made: tuple[Tensor, ...] = site_basis(name, linear, rank=spec.rank, seed=spec.seed, init=init)
        elif spec.placement == Placement.TAP and spec.rank:
            made = (tap_projection(spec.layer, self.span.hidden_size, spec.rank, spec.seed),)
        else:
            return None
        matrices = self._made[spec] = SiteMatrices(tuple(each.to(self.span.device, self.span.dtype) for each in made))
        return matrices

    def bind(self, specs: Sequence[SiteSpec], made: Mapping[SiteSpec, SiteMatrices] | None = None) -> BoundSites:
        """Find the modules of sites, and make the matrices that are not among `made`.

        Raises:
            ConfigError: A rank or a width does not fit.
            PlanError: The span has no such module, or a site stands twice.
        """
        keys = [(spec.layer, spec.part, spec.placement == Placement.TAP) for spec in specs]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise PlanError(f"site {specs[number]} is named twice; name each site once")
        sites: dict[nn.Module, int] = {}
        blocks: dict[nn.Module, int] = {}
        taps: dict[nn.Module, int] = {}
        for number, spec in enumerate(specs):
            if spec.part:
                sites[self._linear(spec.layer, spec.part)] = number
            else:
                (taps if spec.placement == Placement.TAP else blocks)[self._layer(spec)] = number
        groups: dict[nn.Module, Group] = {}
        for number, members in enumerate(self._groups):
            found = {i: sites[member] for i, member in enumerate(members) if member in sites}
            groups |= dict.fromkeys(members, Group(number, members, found))
        known = made or {}
        found_or_made = {
            number: known.get(spec) or self.known_matrices(spec) or self.matrices(spec)
            for number, spec in enumerate(specs)
        }
        matrices = {number: each for number, each in found_or_made.items() if each is not None}
        return BoundSites(tuple(specs), groups, blocks, taps, matrices, self._pauses(specs))

    def _pauses(self, specs: Sequence[SiteSpec]) -> dict[int, int]:
        """Where a pass pauses for each site that asks: before its group, or behind the last group of its layer.

        Group `n` has the place `2 n`, the end of its layer `2 n + 1`.
        """
        at = {place: number for number, group in enumerate(self.groups) for place in group}
        last = {layer: number for (layer, _), number in at.items()}
        asking = ((site, spec) for site, spec in enumerate(specs) if spec.asks)
        return {site: 2 * at[spec.layer, spec.part] if spec.part else 2 * last[spec.layer] + 1 for site, spec in asking}

    def _features(self, layer: int, part: str) -> tuple[int, int]:
        return features_of(self._linear(layer, part))

    def _layer(self, spec: SiteSpec) -> nn.Module:
        if spec.layer not in self._layers:
            raise PlanError(f"there is no {spec} among the cloud's layers {self.span.layer_span}")
        return self._layers[spec.layer]

    def _linear(self, layer: int, part: str) -> nn.Module:
        if (layer, part) not in self._linears:
            raise PlanError(
                f"the cloud's layers {self.span.layer_span} have no site {layer}.{part}; the sites of a layer are "
                f"{', '.join(sorted({name for _, name in self._linears}))}"
            )
        return self._linears[layer, part]

    def _find_groups(self) -> list[tuple[nn.Module, ...]]:
        """Which linears read the same tensor, recorded in one pass over two positions."""
        recorder = InputRecorder()
        device = self.span.device
        hidden = torch.zeros(1, 2, self.span.hidden_size, dtype=self.span.dtype, device=device)
        # A mask of four dimensions is taken as it is; on the meta device none could be made from another.
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
        with torch.no_grad(), sites_active(recorder):
            self.sited_span(hidden, mask)
        return [tuple(members) for _, members in recorder.inputs]


def _with_stand_ins(layer: nn.Module) -> SitedLayer:
    inner = sharing_copy(layer)
    for name, linear in named_linears(layer):
        inner.set_submodule(name, SitedLinear(linear))
    return SitedLayer(layer, inner)


def linear_groups(config: Any) -> tuple[tuple[str, ...], ...]:
    """Which linears of a decoder layer read one input, by their names inside it, in running order.

    It is found out on the meta device, without weights.

    Args:
        config: Configuration of the whole model.
    """
    # Eager attention looks at no values of the mask, which the meta device has not; it reads the same inputs.
    base = empty_layers(config, (0,), dtype=torch.float32, attn_implementation="eager").to("meta")
    span = FrozenSpan(base, Span(0, 1), config, config.hidden_size, torch.float32)
    return tuple(tuple(name for _, name in group) for group in SiteHost(span).groups)
