"""The edge's model: its family's own class, whose middle layers are one call of the span.

The cloud's layers have their places in the list of layers. The first one calls the span, the others pass their input
on. A decoder layer sees only the mask that the base model made of the caller's, so two hooks on the base model frame
its forward: the first one checks the call and the adapters, and keeps the caller's own mask and positions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from isthmus.backbone.peft_checks import asked_of, check_adapters
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.sites.edge_sites import Site, find_sites
from isthmus.backbone.sites.ladder_network import LadderSide
from isthmus.backbone.sites.leasing import leased
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.backbone.skeleton import SkeletonLayer
from isthmus.backbone.split.cached_generation import CachedGeneration
from isthmus.backbone.split.edge_weights import EdgeOrigin, EdgeWeightsSaving
from isthmus.backbone.split.span import check_length, check_position_ids
from isthmus.backbone.split.split_cache import CachingSpan, RemoteCache, remote_of
from isthmus.common.errors import UnsupportedCallError

SpanFn = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""`(hidden [B, S, h], attention_mask [B, S] or None, position_ids [B, S] or [1, S] or None) -> hidden [B, S, h]`"""

# Arguments that act inside every layer, or replace what the base model computes for it, and that the span never sees.
_REFUSED = ("encoder_hidden_states", "encoder_attention_mask", "is_causal", "position_bias")
_RECORDED = ("output_attentions", "output_hidden_states")


@runtime_checkable
class SitedSpan(Protocol):
    """A span that can turn to the edge at sites inside it. It is a `SpanFn` too."""

    def at_sites(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site]
    ) -> Tensor:
        """As a `SpanFn`, with what `sites` add inside."""

    def expect_sites(self, sites: Sequence[Site]) -> None:
        """Adapters have just been put on the cloud's layers; called before a first pass."""


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


class PassingLayer(SkeletonLayer):
    """A further cloud layer: `RemoteLayers` has had its work done with that of all others."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return `hidden_states` as they are."""
        return hidden_states


class RemoteLayers(SkeletonLayer):
    """The first cloud layer: sends the hidden states through the whole span, and tells it the sites inside.

    It is no transformers layer on purpose: a checkpointing layer would run the span twice.

    Args:
        real: The layers that the cloud holds, whose names and shapes count.
        path: Path of the list of layers in the whole model.
        first: The first one's index in the whole model.
        span: What runs the layers.

    Attributes:
        layers: What stands for the cloud's layers: this module, and one `PassingLayer` for each further one.
        live_sites: Names of the sites that are trained; None for all.
        lend_dead: Whether all others act as well, leased to the cloud as they are; else they do not act.
    """

    def __init__(self, real: Sequence[nn.Module], path: str, first: int, span: SpanFn) -> None:
        super().__init__(real[0], path, first)
        others = (PassingLayer(layer, path, index) for index, layer in enumerate(real[1:], first + 1))
        self.layers: tuple[SkeletonLayer, ...] = (self, *others)
        self.live_sites: frozenset[str] | None = None
        self.lend_dead = False
        self._skeletons = tuple(module for layer in self.layers for module in layer.modules())
        self._held = _Held(span)
        self._ladder: tuple[LadderSide, tuple[SiteSpec, ...]] | None = None
        self._places: tuple[Site, ...] = ()  # those of all adapters on the cloud's layers
        # During a forward of the base model: the caller's mask and positions, and the sites that act.
        self._inputs: tuple[Tensor | None, Tensor | None] | None = None
        self._sites: tuple[Site, ...] = ()
        self._remote: RemoteCache | None = None

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
        if self._inputs is None:
            raise UnsupportedCallError(
                "a cloud layer was called by itself; call the model, which knows mask and positions"
            )
        if self._remote is not None:
            return self._extended(hidden_states, self._inputs, self._remote)
        if self._ladder is not None:
            return self._climb(hidden_states, self._inputs, *self._ladder)
        if not self._sites:
            return self.span(hidden_states, *self._inputs)
        return self._sited(self._sites).at_sites(hidden_states, *self._inputs, self._sites)

    def enter(
        self, attention_mask: Tensor | None, position_ids: Tensor | None, remote: RemoteCache | None = None
    ) -> None:
        """A forward of the base model begins, with these arguments of its caller, and the cloud's part of its cache."""
        live = self.live_sites
        sites = [site for site in self._places if site.acts]
        if live is not None and self.lend_dead:
            sites = [site if site.name in live else leased(site, trained=False) for site in sites]
        elif live is not None:
            sites = [site for site in sites if site.name in live]
        self._inputs, self._sites, self._remote = (attention_mask, position_ids), tuple(sites), remote

    def leave(self) -> None:
        """The forward is over, or has failed."""
        self._inputs, self._sites, self._remote = None, (), None

    def attach_ladder(self, ladder: LadderSide, taps: Sequence[SiteSpec]) -> None:
        """Let what comes back of the span pass through a side network, which reads `taps`.

        The network is a submodule of the model, not of this module; a deep copy of the model uses the copy's.
        """
        self._ladder = (ladder, tuple(taps))

    def find_sites(self) -> Iterator[Site]:
        """The sites in the cloud's layers whose adapters are switched on, dead ones too.

        Raises:
            UnsupportedCallError: An adapter is merged.
        """
        return (site for site in find_sites(self.layers) if site.acts)

    def new_cache(self) -> RemoteCache:
        """An empty cache of the cloud's layers.

        Raises:
            UnsupportedCallError: What stands for them here keeps none.
        """
        span: object = self.span
        if not isinstance(span, CachingSpan):
            raise UnsupportedCallError(
                "what stands for the cloud's layers here keeps no key-value cache; pass use_cache=False"
            )
        return span.new_cache()

    def placed(self) -> list[nn.Module]:
        """What stands in the places of the cloud's modules: skeletons, or what adapters have put there."""
        return [module for skeleton in self._skeletons for module in skeleton.children()]

    def take_up(self) -> None:
        """Use from now on what adapters have put on the cloud's layers."""
        self._places = tuple(find_sites(self.layers))

    def check_span(self) -> None:
        """Make sure that the span takes the adapters that are on the cloud's layers, and let it know them.

        Raises:
            UnsupportedCallError: It takes none.
        """
        sites = tuple(self.find_sites())
        if sites:
            self._sited(sites).expect_sites(sites)

    def _sited(self, sites: Sequence[Site]) -> SitedSpan:
        span: object = self.span
        if not isinstance(span, SitedSpan):
            raise UnsupportedCallError(
                f"{sites[0].name} carries an adapter, and what stands for the cloud's layers here takes none: keep it "
                "to the edge's own layers (layers_to_transform)"
            )
        return span

    def _extended(self, hidden: Tensor, inputs: tuple[Tensor | None, Tensor | None], remote: RemoteCache) -> Tensor:
        """The cloud's layers for the next tokens, with a cache on both sides."""
        if self._ladder is not None:
            raise UnsupportedCallError(
                "a ladder reads inside the cloud's layers, which keep no cache of it: pass use_cache=False (--no-cache)"
            )
        sites = cast(CachingSpan, self.span).placed(self._sites) if self._sites else ()
        asking = [site.name for site in sites if not site.spec.is_leased]
        if asking:
            raise UnsupportedCallError(
                f"{asking[0]} carries an adapter inside the cloud's layers, which would be asked at every token: "
                "lease it to the cloud (load_model(leased=…), --leased all), or compute all tokens anew each time "
                "(use_cache=False, --no-cache)"
            )
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise UnsupportedCallError("what is computed with a cache has no backward: pass use_cache=False to train")
        return remote.extend(hidden, *inputs, sites)

    def _climb(
        self,
        hidden: Tensor,
        inputs: tuple[Tensor | None, Tensor | None],
        ladder: LadderSide,
        taps: tuple[SiteSpec, ...],
    ) -> Tensor:
        span: object = self.span
        if self._sites:
            raise UnsupportedCallError(
                f"{self._sites[0].name} carries an adapter beside a ladder, through which no gradient reaches it: "
                "use one of the two"
            )
        if not isinstance(span, TappedSpan):
            raise UnsupportedCallError("what stands for the cloud's layers here has no taps: use another method")
        output, tapped = span.tapped(hidden, *inputs, taps)
        result: Tensor = ladder(hidden, tapped, output, *inputs)
        return result


class EdgeModelMixin(CachedGeneration, EdgeWeightsSaving):
    """Stands before a transformers class in the edge model's bases; see `load_edge_parts`.

    Attributes:
        isthmus_origin: What the model was made of.
        isthmus_parts: The module that calls the span, the base model, and the name of its list of all layers; a tuple
            hides them from torch.
        isthmus_passed: What has passed the checks: PEFT's configurations by adapter, and what stood in the places of
            the cloud's modules.
    """

    isthmus_origin: EdgeOrigin
    isthmus_parts: tuple[RemoteLayers, nn.Module, str]
    isthmus_passed: tuple[dict[str, Any], list[nn.Module]]

    @property
    def split_plan(self) -> SplitPlan:
        """Who holds which layers."""
        return self.isthmus_origin.plan

    @property
    def remote_layers(self) -> RemoteLayers:
        """The module that calls the span."""
        return self.isthmus_parts[0]

    def find_sites(self) -> Iterator[Site]:
        """See `RemoteLayers.find_sites`."""
        return self.remote_layers.find_sites()

    def enter_forward(
        self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a forward of the base model: check the call and the adapters, and keep the mask and positions.

        Returns:
            The arguments, where a cache came in.

        Raises:
            ConfigError: The sequences are too long, or a position is none of the model's.
            UnsupportedCallError: A cut model cannot do exactly what is asked.
        """
        named = dict(kwargs)
        if args:
            named.update(zip(inspect.signature(base.forward).parameters, args, strict=False))
        _check_call(named, base.config)
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        cache = named.get("cache", named.get("past_key_values"))
        use_cache = named.get("use_cache")
        if (base.config.use_cache if use_cache is None else use_cache) and cache is None:
            cache = DynamicCache(config=base.config)
            kwargs = {**kwargs, "cache": cache}
        remote = None if cache is None else remote_of(cache, self.split_plan, self.remote_layers.new_cache)
        tokens = named.get("input_ids") if named.get("inputs_embeds") is None else named["inputs_embeds"]
        if isinstance(tokens, Tensor):  # a cloud would refuse it, after the edge's own layers have computed
            past = 0 if remote is None else remote.length
            check_length(self.isthmus_longest, past + tokens.shape[1])
            check_position_ids(self.isthmus_longest, positions)
        self.check_adapters()
        if remote is not None:
            self.check_version(remote)
        self.remote_layers.enter(mask, positions, remote)
        return args, kwargs

    def leave_forward(self, *_: Any) -> None:
        """After a forward of the base model, or its failure."""
        self.remote_layers.leave()

    def note_unwrapped(self) -> None:
        """Take the layers as they are now for those of a model without adapters, which need no check."""
        remote, base, name = self.isthmus_parts
        self.isthmus_passed = {}, [*getattr(base, name), *remote.placed()]

    def check_adapters(self) -> None:
        """Make sure that the adapters on the cloud's layers compute what they would on the whole model.

        Runs when PEFT has wrapped the model and before each forward, since PEFT tells of the first adapter and not of
        a second. Nothing is looked at again until a configuration, or a module of the cloud's layers, is another one.

        Raises:
            UnsupportedCallError: One would not, or PEFT broke off while it wrapped the model.
        """
        configs = getattr(self, "peft_config", {})
        asked = {adapter: asked_of(config) for adapter, config in configs.items()}
        remote, base, name = self.isthmus_parts
        layers = getattr(base, name)  # may have been replaced
        placed = [*layers, *remote.placed()]
        if (asked, placed) == self.isthmus_passed:
            return
        passed = {adapter for adapter, before in self.isthmus_passed[0].items() if before == asked.get(adapter)}
        check_adapters(self, layers, configs, passed)
        remote.take_up()
        self.isthmus_passed = copy.deepcopy(asked), placed  # a configuration can be changed and used again

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config" and isinstance(value, dict):  # PEFT sets it once its layers are in place
            self.check_adapters()


def edge_class(model_class: type[Any]) -> type[Any]:
    """The edge's subclass of a transformers class, of the same name: configurations and PEFT go by it."""
    names = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (EdgeModelMixin, model_class), names)


def _check_call(named: dict[str, Any], config: Any) -> None:
    """Refuse arguments of a forward, by name, that a cut model cannot do exactly."""
    for name in _REFUSED:
        if named.get(name) is not None:
            raise UnsupportedCallError(f"{name} does not reach the cloud's layers; leave it out")
    for name in _RECORDED:
        value = named.get(name)
        if getattr(config, name, False) if value is None else value:
            raise UnsupportedCallError(f"{name} would lack the cloud's layers; leave it out")
    for name in ("attention_mask", "position_ids"):
        value = named.get(name)
        if value is not None and not (isinstance(value, Tensor) and value.dim() == 2):
            got = f"of {value.dim()} dimensions" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UnsupportedCallError(f"{name} is {got}; the split model takes a tensor [batch, sequence]")
