"""Ladder side-tuning: a narrow network on the edge beside the cloud's layers, in a split or in a whole model.

The network itself and its source are in `isthmus.backbone.sites.ladder_network`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import Span
from isthmus.backbone.sites.ladder_network import LadderSide, tap_projection
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.common.errors import CheckpointError, ConfigError, UnsupportedCallError

LADDER = "isthmus_ladder"
"""The name of the side network inside the model."""


@dataclass(frozen=True, slots=True)
class LadderAdapter:
    """What a model with a ladder carries as its attribute `isthmus_adapter`.

    Attributes:
        tap_layers: The layers whose outputs are tapped, ascending, by their indices in the whole model.
        start: First layer of the span that the ladder stands beside; its input is the side network's.
        stop: One past its last layer, whose output the side network is added to.
        reduction: How many times narrower the side network is.
        tap_width: Width that taps are projected to; None for the backbone's, without a projection.
        seed: Of the projections, 0 or more.

    Raises:
        ConfigError: A value makes no sense.
    """

    tap_layers: tuple[int, ...]
    start: int
    stop: int
    reduction: int = 8
    tap_width: int | None = None
    seed: int = 0

    method: ClassVar[str] = "ladder"

    def __post_init__(self) -> None:
        for name, lowest in (("start", 0), ("stop", 1), ("reduction", 1), ("tap_width", 1), ("seed", 0)):
            value = getattr(self, name)
            if (type(value) is not int or value < lowest) and (name, value) != ("tap_width", None):
                raise ConfigError(f"{name} {value!r} of a ladder: use a whole number of {lowest} or more")
        taps = self.tap_layers
        if not taps or not all(type(layer) is int and self.start <= layer < self.stop for layer in taps):
            raise ConfigError(
                f"taps {str(list(taps))[:80]} do not lie in layers {self.start}:{self.stop}: "
                f"choose among {self.start} to {self.stop - 1}"
            )
        if list(taps) != sorted(set(taps)):
            raise ConfigError(f"taps {str(list(taps))[:80]} are out of order: name each layer once, ascending")

    def info(self) -> dict[str, Any]:
        """What `isthmus_adapter.json` says."""
        return {"method": self.method, **asdict(self), "tap_layers": list(self.tap_layers)}

    @classmethod
    def from_info(cls, info: Mapping[str, Any], path: Path) -> Self:
        """The adapter that `isthmus_adapter.json` describes.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            taps = info["tap_layers"] if isinstance(info["tap_layers"], list) else ()
            rest = [info[name] for name in ("start", "stop", "reduction", "tap_width", "seed")]
            return cls(tuple(taps), *rest)
        except (KeyError, ConfigError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): give a folder that training wrote.") from error

    def places(self, model: Any) -> dict[str, torch.Size]:
        """Names and shapes of its tensors, of which `model` is known to have places for all; nothing is allocated.

        Raises:
            ConfigError: The model has other layers or is cut elsewhere, or a width does not fit.
        """
        self._check(model)
        with torch.device("meta"):
            side = self._side(model.config)
        return {f"{LADDER}.{name}": parameter.shape for name, parameter in side.named_parameters()}

    def parameters(self, model: Any) -> dict[str, nn.Parameter]:
        """The parameters of a model that carries it, by their names in the model."""
        side: nn.Module = model.get_submodule(LADDER)
        return {f"{LADDER}.{name}": parameter for name, parameter in side.named_parameters()}

    def attach(self, model: Any) -> None:
        """Put the side network into `model`; it alone is trainable then. See `add_ladder`."""
        self._check(model)
        if hasattr(model, LADDER):
            raise ConfigError("the model has a ladder already: load the model afresh, or go on from its adapter.")
        side = self._side(model.config).to(model.device)
        model.requires_grad_(False)
        model.add_module(LADDER, side)
        model.isthmus_adapter = self
        if getattr(model, "split_plan", None) is None:
            _WholeSpan(side, self).watch(model)
        else:
            model.remote_layers.attach_ladder(side, self.taps)

    @property
    def taps(self) -> tuple[SiteSpec, ...]:
        """What a span is asked for."""
        width = self.tap_width or 0
        return tuple(SiteSpec(layer, "", Placement.TAP, width, self.seed if width else 0) for layer in self.tap_layers)

    def _side(self, config: Any) -> LadderSide:
        h, n_heads = config.hidden_size, config.num_attention_heads
        return LadderSide(h, n_heads, self.tap_layers, reduction=self.reduction, tap_width=self.tap_width)

    def _check(self, model: Any) -> None:
        n_layers, plan = model.config.num_hidden_layers, getattr(model, "split_plan", None)
        span = Span(self.start, self.stop)
        if self.stop > n_layers:
            raise ConfigError(f"a ladder beside layers {span} does not fit a model of {n_layers}: stay within them")
        if plan is not None and plan.cloud != span:
            raise ConfigError(
                f"a ladder beside layers {span} does not fit a model whose cloud holds {plan.cloud}: cut it there"
            )


def add_ladder(
    model: Any,
    tap_layers: Sequence[int],
    *,
    span: Span | None = None,
    reduction: int = 8,
    tap_width: int | None = None,
    seed: int = 0,
) -> None:
    """Give a model a ladder; it alone is trainable then.

    Names are the same in a split and in a whole model. In a whole model, hooks collect the taps and change what the
    span's last layer returns. In a split one, the remote layers ask the span for the taps, and their output goes
    through the ladder.

    Args:
        model: A transformers causal LM, whole or split.
        tap_layers: Layers of the span, ascending, by their indices in the whole model.
        span: The layers that the ladder stands beside: those that the cloud holds or would hold. None for what the
            split model's cloud holds, and for all layers of a whole one, as in LST.
        reduction, tap_width, seed: See `LadderAdapter`.

    Raises:
        ConfigError: A value makes no sense or does not fit the model, or the model has a ladder.
    """
    plan = getattr(model, "split_plan", None)
    if span is None:
        span = Span(0, model.config.num_hidden_layers) if plan is None else plan.cloud
    LadderAdapter(tuple(tap_layers), span.start, span.stop, reduction, tap_width, seed).attach(model)


class _WholeSpan:
    """Lets a whole model's own layers be the span: keeps what the ladder reads for the length of one forward."""

    def __init__(self, side: LadderSide, adapter: LadderAdapter) -> None:
        self._side = side
        self._adapter = adapter
        self._projections: dict[int, Tensor] = {}
        if adapter.tap_width is not None:
            for layer in adapter.tap_layers:
                projection = tap_projection(layer, side.up.out_features, adapter.tap_width, adapter.seed)
                self._projections[layer] = projection
        self._named: dict[str, Any] = {}
        self._seen: list[Tensor] = []  # the span's input, then the taps

    def watch(self, model: Any) -> None:
        """Put the hooks on the base model and its layers."""
        family = family_of(model.config)
        base: Any = model.get_submodule(family.base)
        layers = getattr(base, family.layers)
        # Bound methods: a deep copy of the model binds them to the copy's side network.
        base.register_forward_pre_hook(self._enter, with_kwargs=True)
        base.register_forward_hook(self._leave, always_call=True)
        layers[self._adapter.start].register_forward_pre_hook(self._keep_input)
        for layer in self._adapter.tap_layers:
            layers[layer].register_forward_hook(partial(self._keep_tap, layer))
        layers[self._adapter.stop - 1].register_forward_hook(self._climb)

    def _enter(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._named = {**kwargs, **dict(zip(inspect.signature(base.forward).parameters, args, strict=False))}
        for name in ("cache", "past_key_values"):
            cache = self._named.get(name)
            if cache is not None and cache.get_seq_length():
                raise UnsupportedCallError("a ladder keeps no key-value cache; pass use_cache=False")

    def _leave(self, *_: Any) -> None:
        self._named, self._seen = {}, []

    def _keep_input(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen = [args[0]]

    def _keep_tap(self, index: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        tap = output[0] if isinstance(output, tuple) else output
        projection = self._projections.get(index)
        self._seen.append(tap if projection is None else nn.functional.linear(tap, projection.to(tap)))

    def _climb(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        span_input, *taps = self._seen
        mask, positions = self._named.get("attention_mask"), self._named.get("position_ids")
        result = self._side(span_input, taps, hidden, mask, positions)
        return (result, *rest) if isinstance(output, tuple) else result
