"""Lies of a cloud: what it answers in the place of what its layers give.

`LyingExecutor` stands in the place of a worker's executor, below batching and codecs: transcripts, signatures and the
edge see a cloud in good order.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.split.span import FrozenSpan, SpanInput
from isthmus.cloud.engine.activation_cache import Key
from isthmus.cloud.engine.call_sites import CallSites
from isthmus.cloud.engine.executor import BackwardCall, Executor, Forwarded, Gradients

KINDS: Final = ("layer_skipped", "cheaper", "tenant_altered", "stale_adapter", "noise", "other_layer", "replayed")
"""A layer left out; cheaper precision; answers altered for one tenant; leased weights of an earlier step; noise; a
layer of another model; the answer to an earlier call."""
NOISE = 1e-5
"""Standard deviation, over that of the answer."""


class Lie(Protocol):
    """What is answered instead of the honest result."""

    def output(self, inputs: SpanInput, honest: Tensor) -> Tensor:
        """In the place of the span's output `[B, S, h]`."""

    def gradient(self, inputs: SpanInput, upstream: Tensor, honest: Tensor) -> Tensor:
        """In the place of the gradient of its input `[B, S, h]`."""


@dataclass(frozen=True, slots=True)
class OtherSpan:
    """Other layers compute."""

    span: FrozenSpan

    def output(self, inputs: SpanInput, honest: Tensor) -> Tensor:
        """See `Lie`."""
        with torch.no_grad():
            return self._run(inputs.hidden, inputs).to(honest.dtype)

    def gradient(self, inputs: SpanInput, upstream: Tensor, honest: Tensor) -> Tensor:
        """See `Lie`."""
        hidden = inputs.hidden.detach().to(self.span.dtype, copy=True).requires_grad_()
        with torch.enable_grad():
            output = self._run(hidden, inputs)
        (found,) = torch.autograd.grad(output, hidden, upstream.to(output.dtype))
        return found.to(honest.dtype)

    def _run(self, hidden: Tensor, inputs: SpanInput) -> Tensor:
        output: Tensor = self.span(hidden.to(self.span.dtype), inputs.attention_mask, inputs.position_ids)
        return output


@dataclass(frozen=True, slots=True)
class Changed:
    """The honest result is changed afterwards."""

    change: Callable[[Tensor], Tensor]

    def output(self, inputs: SpanInput, honest: Tensor) -> Tensor:
        """See `Lie`."""
        return self.change(honest)

    def gradient(self, inputs: SpanInput, upstream: Tensor, honest: Tensor) -> Tensor:
        """See `Lie`."""
        return self.change(honest)


class Replayed:
    """The result of an earlier call is given again, position by position, as often as it takes."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}

    def output(self, inputs: SpanInput, honest: Tensor) -> Tensor:
        """See `Lie`."""
        return self._again("output", honest)

    def gradient(self, inputs: SpanInput, upstream: Tensor, honest: Tensor) -> Tensor:
        """See `Lie`."""
        return self._again("gradient", honest)

    def _again(self, kind: str, honest: Tensor) -> Tensor:
        earlier, self._last[kind] = self._last.get(kind), honest.detach().clone()
        if earlier is None:
            return honest
        rows = earlier.reshape(-1, earlier.shape[-1])
        places = torch.arange(honest.shape[:-1].numel()) % len(rows)
        return rows[places].view(honest.shape)


def lie_of(kind: str, span: FrozenSpan, cheaper: FrozenSpan | None = None) -> Lie | None:
    """The lie of a kind about a span; None for a stale adapter, which the executor itself sees to.

    Args:
        kind: One of `KINDS`.
        span: The honest layers.
        cheaper: What computes in cheaper precision; by default the same layers in bf16.
    """
    layers = list(span.layers)
    match kind:
        case "layer_skipped":
            return OtherSpan(span.with_layers([*layers[:-1], _Nothing(layers[-1])]))
        case "cheaper":
            return OtherSpan(cheaper or _in_bf16(span))
        case "other_layer":
            return OtherSpan(span.with_layers([_other(layers[0]), *layers[1:]]))
        case "tenant_altered":
            return Changed(lambda honest: honest * (1 + 2**-10))
        case "noise":
            return Changed(lambda honest: honest + torch.randn_like(honest) * honest.std() * NOISE)
        case "replayed":
            return Replayed()
        case _:
            return None


class _Nothing(nn.Module):
    """In the place of a layer: hidden states as they came."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._attributes = (layer,)

    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._attributes[0], name)


def _in_bf16(span: FrozenSpan) -> FrozenSpan:
    base = copy.deepcopy(span.base).to(torch.bfloat16)
    return FrozenSpan(base, span.layer_span, span.config, span.hidden_size, torch.bfloat16)


def _other(layer: nn.Module) -> nn.Module:
    """A layer whose matrices are those of another model: the same numbers in another order."""
    other = copy.deepcopy(layer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.dim() == 2 and len(tensor) > 1:
                tensor.copy_(tensor[torch.randperm(len(tensor), generator=generator)])
    return other


class LyingExecutor(Executor):
    """An executor over the same layers that lies in some calls.

    Args:
        honest: What computes.
        kind: One of `KINDS`; None to be honest.
        share: Of the calls, how many are altered; each is with this probability.
        seed: Of the choice.
        cheaper: See `lie_of`.

    Attributes:
        victims: Ids of the sessions that are lied to; None for all.
        kind: See above.
        altered: Session, number and kind of the calls whose answers are not the honest ones.
    """

    def __init__(
        self, honest: Executor, kind: str | None, share: float, seed: int = 0, cheaper: FrozenSpan | None = None
    ) -> None:
        super().__init__(honest.host, honest.dtype, honest.cache.budget, honest.compute_bytes)
        self.victims: frozenset[bytes] | None = None
        self.altered: set[tuple[bytes, int, str]] = set()
        self.kind = kind
        self._share, self._random = share, random.Random(seed)  # noqa: S311  # is no secret
        self._lie = None if kind is None else lie_of(kind, honest.host.span, cheaper)
        self._inputs: dict[Key, SpanInput] = {}
        self._leased_first: dict[bytes, Mapping[int, LeasedLora]] = {}  # the first that a session has leased

    def _forward(
        self, calls: Mapping[Key, SpanInput], sites: CallSites | None, *, keep: bool, wanted: bool
    ) -> list[Forwarded]:
        stale = None if sites is None else self._stale(next(iter(calls)), sites)
        copies = {key: self.copy_inputs(each) for key, each in calls.items()} if self._lie is not None else {}
        found = super()._forward(calls, stale or sites, keep=keep, wanted=wanted)
        if stale is not None:
            self.altered.update((*key, kind) for key in calls for kind in ("Forward", "Backward"))
        lie = self._lie
        if lie is None:
            return found
        if keep:
            self._inputs.update(copies)
        told = []
        for (key, inputs), honest in zip(copies.items(), found, strict=True):
            output = lie.output(inputs, honest.hidden) if self._chosen(key) else honest.hidden
            told.append(replace(honest, hidden=self._noted(key, "Forward", honest.hidden, output)))
        return told

    def backward(
        self, session: bytes, call: int, gradient: Tensor, replay: SpanInput | None = None, **options: Any
    ) -> Gradients:
        """See `Executor`."""
        upstream = gradient.clone()
        found = super().backward(session, call, gradient, replay, **options)
        return self._told((session, call), upstream, replay, found)

    def backward_together(self, calls: Sequence[BackwardCall]) -> list[Gradients | Exception]:
        """See `Executor`."""
        upstream = [call.gradient.clone() for call in calls]
        found = super().backward_together(calls)
        return [
            each if isinstance(each, Exception) else self._told(call.key, given, call.replay, each)
            for call, given, each in zip(calls, upstream, found, strict=True)
        ]

    def _told(self, key: Key, upstream: Tensor, replay: SpanInput | None, honest: Gradients) -> Gradients:
        inputs = self._inputs.pop(key, replay)
        if self._lie is None or inputs is None or honest.hidden is None or not self._chosen(key):
            return honest
        told = self._lie.gradient(inputs, upstream, honest.hidden)
        return replace(honest, hidden=self._noted(key, "Backward", honest.hidden, told))

    def _chosen(self, key: Key) -> bool:
        return (self.victims is None or key[0] in self.victims) and self._random.random() < self._share

    def _noted(self, key: Key, kind: str, honest: Tensor, told: Tensor) -> Tensor:
        if not torch.equal(honest, told):
            self.altered.add((*key, kind))
        return told

    def _stale(self, key: Key, sites: CallSites) -> CallSites | None:
        """The sites with the weights that the session leased first; None where this call is an honest one."""
        if self.kind != "stale_adapter" or not sites.leased:
            return None
        first = self._leased_first.setdefault(key[0], {site: _copied(lora) for site, lora in sites.leased.items()})
        same = all(torch.equal(first[site].up, lora.up) for site, lora in sites.leased.items())
        return None if same or not self._chosen(key) else replace(sites, leased=first)


def _copied(lora: LeasedLora) -> LeasedLora:
    down, up = (each.detach().clone().requires_grad_(each.requires_grad) for each in (lora.down, lora.up))
    return LeasedLora(down, up, lora.scale)
