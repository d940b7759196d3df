"""Sites as the cloud sees them: a frozen span that finds its modules for them.

The linears of a layer that read the same input (q, k and v; gate and up) form a *group*. At a group with sites that run
on the edge, the span turns to a *visitor*, once on the way forward and once on the way back (`site_visit.py`). How the
visitor gets its answers, over a network for one, is its own business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span
from isthmus.backbone.runtime.shared_linears import Meetings
from isthmus.backbone.runtime.site_visit import (
    AskingLinear,
    BoundSites,
    Group,
    SiteMatrices,
    Spotter,
    ask_behind,
    asking_linear,
    visiting,
)
from isthmus.backbone.sites.ladder import tap_projection
from isthmus.backbone.sites.low_rank import site_basis
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.backbone.skeleton import named_linears
from isthmus.backbone.split.span import FrozenSpan, empty_layers
from isthmus.common.errors import PlanError

_Place = tuple[int, str]


class SiteHost:
    """A frozen span with its linears and layers made able to ask.

    Args:
        span: The span; its linears are replaced by ones that share their weights and compute the same where nobody
            visits.

    Attributes:
        meetings: Where passes that run beside each other compute the linears' products.
    """

    def __init__(self, span: FrozenSpan) -> None:
        self.span = span
        self._made: WeakValueDictionary[SiteSpec, SiteMatrices] = WeakValueDictionary()
        config: Any = span.config
        family = family_of(config)
        self._path = family.layers_path
        layers = getattr(span.base, family.layers)
        self._layers: dict[int, nn.Module] = dict(zip(span.layer_span, layers, strict=True))
        self._linears: dict[_Place, nn.Module] = {}
        for index, layer in self._layers.items():
            for name, linear in list(named_linears(layer)):
                if not isinstance(linear, AskingLinear):
                    layer.set_submodule(name, asking_linear(linear))
                self._linears[index, name] = layer.get_submodule(name)
            if ask_behind not in layer._forward_hooks.values():
                layer.register_forward_hook(ask_behind)
        self._groups = self._find_groups()
        self.meetings = Meetings()

    @property
    def groups(self) -> tuple[tuple[tuple[int, str], ...], ...]:
        """The linears that read one input, in running order: layer and name inside it."""
        place_of = {linear: place for place, linear in self._linears.items()}
        return tuple(tuple(place_of[member] for member in members) for members in self._groups)

    @property
    def widest(self) -> int:
        """Numbers for a token position that a group's tensors have at most, one way."""
        groups = [[self._features(*place) for place in group] for group in self.groups]
        return max(max(sum(n_in for n_in, _ in group), sum(n_out for _, n_out in group)) for group in groups)

    def widths(self, spec: SiteSpec) -> tuple[int, int]:
        """Numbers for a token position that a site is asked about, and that it contributes.

        Raises:
            PlanError: The span has no such module.
        """
        if spec.placement == Placement.LOW_RANK:
            return spec.rank, spec.rank
        if not spec.part and spec.layer in self._layers:
            return self.span.hidden_size, self.span.hidden_size
        return self._features(spec.layer, spec.part)

    def matrix_bytes(self, spec: SiteSpec) -> int:
        """Bytes of what `matrices` makes for a site, by its shape.

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
        """The matrices of a site as long as anything holds those that were made for somebody."""
        return self._made.get(spec)

    def matrices(self, spec: SiteSpec) -> SiteMatrices | None:
        """Make the matrices of a site that are the cloud's; None where there are none.

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
        """Find the modules of sites, and make those matrices that are the cloud's and not `made` yet.

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
        """Where a pass pauses for each site that asks: before its group, or behind the last group of its layer."""
        at = {place: number for number, group in enumerate(self.groups) for place in group}
        last = {layer: number for (layer, _), number in at.items()}
        asking = ((site, spec) for site, spec in enumerate(specs) if spec.asks)
        return {site: 2 * at[spec.layer, spec.part] if spec.part else 2 * last[spec.layer] + 1 for site, spec in asking}

    def _features(self, layer: int, part: str) -> tuple[int, int]:
        linear: Any = self._linear(layer, part)
        if isinstance(linear, nn.Linear):
            return linear.in_features, linear.out_features
        return linear.nx, linear.nf

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

    def _find_groups(self) -> list[tuple[AskingLinear, ...]]:
        """Which linears read the same tensor: one pass over two positions tells."""
        seen = Spotter()
        device = self.span.device
        hidden = torch.zeros(1, 2, self.span.hidden_size, dtype=self.span.dtype, device=device)
        # A mask of four dimensions is taken as it is; on the meta device none could be made from another.
        mask = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
        with torch.no_grad(), visiting(seen):
            self.span(hidden, mask)
        return [tuple(members) for _, members in seen.inputs]


def linear_groups(config: Any) -> tuple[tuple[str, ...], ...]:
    """Which linears of a decoder layer read one input, by their names inside it, in running order.

    Found out on the meta device: no weight is needed.

    Args:
        config: Configuration of the whole model.
    """
    # Eager attention looks at no values of the mask, which the meta device has not; it reads the same inputs.
    base = empty_layers(config, (0,), dtype=torch.float32, attn_implementation="eager").to("meta")
    span = FrozenSpan(base, Span(0, 1), config, config.hidden_size, torch.float32)
    return tuple(tuple(name for _, name in group) for group in SiteHost(span).groups)
