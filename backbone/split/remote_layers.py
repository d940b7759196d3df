"""Where the cloud's layers stand in the edge's model: one module that calls the span, and layers that pass through."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from isthmus.backbone.families import check_positions
from isthmus.backbone.sites.edge_sites import Site, find_sites
from isthmus.backbone.sites.ladder_network import LadderSide
from isthmus.backbone.sites.leasing import leased
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.backbone.skeleton import SkeletonLayer
from isthmus.common.errors import UnsupportedCallError

SpanFn = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""`(hidden [B, S, h], attention_mask [B, S] or None, position_ids [B, S] or [1, S] or None) -> hidden [B, S, h]`"""


@runtime_checkable
class SitedSpan(Protocol):
    """A span that can turn to the edge at sites inside it. It is a `SpanFn` too."""

    def at_sites(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site]
    ) -> Tensor:
        """As a `SpanFn`, with what `sites` add inside."""

    def expect_sites(self, sites: Sequence[Site]) -> None:
        """Adapters have just been put on the cloud's layers; called before a first pass."""


# Arguments that act inside every layer, or replace what the base model computes for it, and that the span never sees.
_REFUSED = ("cache", "past_key_values", "encoder_hidden_states", "encoder_attention_mask", "is_causal", "position_bias")
_RECORDED = ("output_attentions", "output_hidden_states")


@runtime_checkable
class TappedSpan(Protocol):
    """A span that can tell what comes out of layers inside it. It is a `SpanFn` too."""

    def tapped(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, taps: Sequence[SiteSpec]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As a `SpanFn`, and what comes out of `taps`, `[B, S, h or width]` each. No gradient flows through it."""


class _Held:
    """Keeps a callable out of a module's submodules, weights and copies: a copied model talks to the same span."""

    def __init__(self, span: SpanFn) -> None:
        self.span = span

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self


class RemoteLayers(SkeletonLayer):
    """The first cloud layer: sends the hidden states through the whole span, and tells it the sites inside.

    A decoder layer sees only the mask that the base model made of the caller's, so two hooks on the base model keep
    the caller's own mask and positions for the length of one forward.

    It is no transformers layer on purpose: a checkpointing layer would run the span twice.

    Args:
        real: The layer that it stands for.
        span: What runs the layers.
        layers: Name of the list of decoder layers in the base model.
        path: Path of that list in the whole model.
        cloud: Indices of the cloud's layers.

    Attributes:
        live_sites: Names of the sites that are trained; None for all.
        lend_dead: Whether all others act as well, lent to the cloud as they are; else they do not act.
    """

    def __init__(self, real: nn.Module, span: SpanFn, layers: str, path: str, cloud: Iterable[int]) -> None:
        super().__init__(real, f"{path}.{next(iter(cloud))}")
        self._held = _Held(span)
        self._layers, self._path, self._cloud = layers, path, tuple(cloud)
        self.live_sites: frozenset[str] | None = None
        self.lend_dead = False
        self._ladder: tuple[LadderSide, tuple[SiteSpec, ...]] | None = None
        self._sites: tuple[Site, ...] = ()
        self._attention_mask: Tensor | None = None
        self._position_ids: Tensor | None = None
        self._inside = False

    @property
    def span(self) -> SpanFn:
        """What runs the layers. May be replaced, by one that counts or records, for instance."""
        return self._held.span

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "span":
            self._held = _Held(value)  # torch would register a module as a part of this one
        else:
            super().__setattr__(name, value)

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Run the cloud's layers on `hidden_states`, `[B, S, h]`.

        Raises:
            UnsupportedCallError: called outside the base model's forward, where mask and positions are not known.
        """
        if not self._inside:
            raise UnsupportedCallError(
                "a cloud layer was called by itself; call the model, which knows mask and positions"
            )
        if self._ladder is not None:
            return self._climb(hidden_states, *self._ladder)
        if not self._sites:
            return self.span(hidden_states, self._attention_mask, self._position_ids)
        sited = _sited(self.span)
        if sited is None:
            raise UnsupportedCallError(_no_sites(self._sites[0].name))
        return sited.at_sites(hidden_states, self._attention_mask, self._position_ids, self._sites)

    def attach_ladder(self, ladder: LadderSide, taps: Sequence[SiteSpec]) -> None:
        """Let what comes back of the span pass through a side network, which reads `taps`.

        The network is a submodule of the model, not of this module; a deep copy of the model uses the copy's.
        """
        self._ladder = (ladder, tuple(taps))

    def _climb(self, hidden: Tensor, ladder: LadderSide, taps: tuple[SiteSpec, ...]) -> Tensor:
        span: object = self.span
        if self._sites:
            raise UnsupportedCallError(
                f"{self._sites[0].name} carries an adapter beside a ladder, through which no gradient reaches it: "
                "use one of the two"
            )
        if not isinstance(span, TappedSpan):
            raise UnsupportedCallError("what stands for the cloud's layers here has no taps: use another method")
        output, tapped = span.tapped(hidden, self._attention_mask, self._position_ids, taps)
        result: Tensor = ladder(hidden, tapped, output, self._attention_mask, self._position_ids)
        return result

    def find_sites(self, base: nn.Module) -> Iterator[Site]:
        """The sites in the cloud's layers of the base model, dead ones too.

        Raises:
            UnsupportedCallError: An adapter is merged.
        """
        layers = getattr(base, self._layers)
        here = [index for index in self._cloud if index < len(layers)]  # a model may be cut behind its cloud layers
        return find_sites(layers, self._path, here)

    def check_span(self, base: nn.Module) -> None:
        """Make sure that the span takes the adapters that are on the cloud's layers, and let it know them.

        Raises:
            UnsupportedCallError: It takes none.
        """
        sites, sited = tuple(self.find_sites(base)), _sited(self.span)
        if sites and sited is None:
            raise UnsupportedCallError(_no_sites(sites[0].name))
        if sites and sited is not None:
            sited.expect_sites(sites)

    def attach(self, base: nn.Module) -> None:
        """Put the two hooks on the base model."""
        # Bound methods: a deep copy of the model binds them to those of the copy.
        base.register_forward_pre_hook(self._enter, with_kwargs=True)
        base.register_forward_hook(self._leave, always_call=True)

    def _enter(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        if args:
            named.update(zip(inspect.signature(base.forward).parameters, args, strict=False))
        self._check(base, named)
        self._attention_mask = named.get("attention_mask")
        self._position_ids = named.get("position_ids")
        live = self.live_sites
        every = self.find_sites(base)
        if self.lend_dead and live is not None:
            self._sites = tuple(site if site.name in live else leased(site, trained=False) for site in every)
        else:
            self._sites = tuple(site for site in every if live is None or site.name in live)
        self._inside = True

    def _leave(self, *_: Any) -> None:
        self._attention_mask = self._position_ids = None
        self._sites = ()
        self._inside = False

    @staticmethod
    def _check(base: nn.Module, named: dict[str, Any]) -> None:
        config: Any = base.config
        use_cache = named.get("use_cache")
        if config.use_cache if use_cache is None else use_cache:
            raise UnsupportedCallError("the split model keeps no key-value cache; pass use_cache=False")
        for name in _REFUSED:
            if named.get(name) is not None:
                raise UnsupportedCallError(
                    f"{name} does not reach the cloud's layers: leave it out, and use prompt tuning in the place of "
                    "prefix tuning and cartridges, which pass it"
                    if name in ("cache", "past_key_values")
                    else f"{name} does not reach the cloud's layers; leave it out"
                )
        for name in _RECORDED:
            value = named.get(name)
            if getattr(config, name, False) if value is None else value:
                raise UnsupportedCallError(f"{name} would lack the cloud's layers; leave it out")
        for name in ("attention_mask", "position_ids"):
            value = named.get(name)
            if value is not None and not (isinstance(value, Tensor) and value.dim() == 2):
                got = f"of {value.dim()} dimensions" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UnsupportedCallError(f"{name} is {got}; the split model takes a tensor [batch, sequence]")
        tokens = named.get("input_ids") if named.get("inputs_embeds") is None else named["inputs_embeds"]
        if isinstance(tokens, Tensor):  # a cloud would refuse it, after the edge's own layers have computed
            check_positions(config, tokens.shape[1], named.get("position_ids"))


def _sited(span: Any) -> SitedSpan | None:
    return span if isinstance(span, SitedSpan) else None


def _no_sites(name: str) -> str:
    return (
        f"{name} carries an adapter, and what stands for the cloud's layers here takes none: keep it to the edge's own "
        "layers (layers_to_transform)"
    )
