"""Several inputs of one span in one pass, whatever their lengths.

A decoder layer treats each token position by itself, except in attention. So the positions of all inputs form one row
and the weights are read once for all of them, while attention runs once for each input. This is the selective batching
of Orca (Yu et al. 2022, OSDI). Nothing is padded, and each input keeps its own mask and positions: transformers' base
model makes the layers' arguments of them, one input at a time.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from isthmus.backbone.split.span import FrozenSpan, LayerStandIn, SpanInput, sharing_copy

Plain = Callable[..., tuple[Tensor, Tensor | None]]
"""transformers' attention: `(module, query, key, value, mask, **options) -> (output [B, S, heads, d], scores)`"""


class Attending(Protocol):
    """How an input attends that has keys and values from before."""

    @property
    def cache(self) -> Any:
        """What the base model makes the mask and the positions by."""

    def attend(
        self, plain: Plain, module: nn.Module, states: Sequence[Tensor], mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """The attention `[B, S, heads, d]` of a layer, of the query, key and value `[B, heads, S, d]` of the input."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """Sequences that attend alike: how many, how long, and their mask as the layers' attention takes it."""

    batch: int
    length: int
    mask: Tensor | None
    attending: Attending | None = None  # None: to themselves

    @property
    def positions(self) -> int:
        return self.batch * self.length


class _Recorder(LayerStandIn):
    """Stands for a layer and records the arguments that the layer would get."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._signature = inspect.signature(type(layer).forward)
        self.recorded: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments, and return the hidden states unchanged."""
        recorded = self._signature.bind(self, *args, **kwargs).arguments
        del recorded["self"]
        self.recorded = {**recorded.pop("kwargs", {}), **recorded}
        return recorded["hidden_states"]


class Packer:
    """Runs a span over several inputs at once; several threads may call it.

    Args:
        span: The span, which stays as it is: copies of its layers share its weights, and attend to several inputs.

    Attributes:
        layers: These copies.
    """

    def __init__(self, span: FrozenSpan) -> None:
        self._recorders = [_Recorder(layer) for layer in span.layers]
        self._recording = span.with_layers(self._recorders)
        self._turn = threading.Lock()
        self.layers: list[nn.Module] = [sharing_copy(layer) for layer in span.layers]
        attending: list[Any] = [m for layer in self.layers for m in layer.modules() if hasattr(m, "config")]
        for module in attending:
            module.config = copy.deepcopy(module.config)
            module.config._attn_implementation = wrap_attention(module.config._attn_implementation, "packed", _attend)

    def __call__(self, inputs: Sequence[SpanInput], attending: Sequence[Attending] = ()) -> list[Tensor]:
        """The span's output `[B, S, h]` for each input, all of one graph where gradients are wanted.

        Args:
            inputs: The inputs.
            attending: How each of them attends; empty where each attends to itself.

        Outputs and gradients have the bits of a pass of each input by itself, where products of matrices add up a row
        in the same order whatever the number of rows: see `batch_invariance.py`.
        """
        own: Sequence[Attending | None] = attending or [None] * len(inputs)
        recorded = [self._arguments(each, how and how.cache) for each, how in zip(inputs, own, strict=True)]
        hidden = torch.cat([each[0]["hidden_states"].flatten(0, 1) for each in recorded])[None]
        memo: dict[tuple[Any, ...], Any] = {}
        shapes = [each.hidden.shape[:2] for each in inputs]
        for number, layer in enumerate(self.layers):
            output = layer(hidden, **_merged([each[number] for each in recorded], shapes, own, memo))
            hidden = output[0] if isinstance(output, tuple) else output
        parts = torch.split(hidden[0], [batch * length for batch, length in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def _arguments(self, each: SpanInput, cache: Any) -> list[dict[str, Any]]:
        """The arguments that the base model would give each layer for an input."""
        with self._turn:
            try:
                self._recording(each.hidden, each.attention_mask, each.position_ids, cache)
                return [recorder.recorded for recorder in self._recorders]
            finally:
                for recorder in self._recorders:
                    recorder.recorded = {}


@dataclass(frozen=True, slots=True)
class _Segments:
    """In the place of an attention mask: the inputs' own."""

    segments: Sequence[_Segment]


class _Unchanged:
    """In the place of a cache, where each input's attention asks its own: keys and values of all inputs pass it by."""

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a layer's attention calls."""
        return keys, values


def _merged(
    recorded: Sequence[dict[str, Any]],
    shapes: Sequence[torch.Size],
    own: Sequence[Attending | None],
    memo: dict[tuple[Any, ...], Any],
) -> dict[str, Any]:
    """One layer's arguments for all inputs; layers that share theirs share what is made of them."""
    result: dict[str, Any] = {}
    for name in recorded[0]:
        if name == "hidden_states":
            continue
        values = [each[name] for each in recorded]
        if name == "cache":
            result[name] = None if values[0] is None else _Unchanged()
            continue
        key = (name, *map(id, values))
        if key not in memo:
            memo[key] = _merged_argument(name, values, shapes, own)
        result[name] = memo[key]
    return result


def _merged_argument(
    name: str, values: Sequence[Any], shapes: Sequence[torch.Size], own: Sequence[Attending | None]
) -> Any:
    if name == "attention_mask":
        each = [_Segment(shape[0], shape[1], mask, how) for shape, mask, how in zip(shapes, values, own, strict=True)]
        return _Segments(list(_joined(each)))
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat([_row(value, shape) for value, shape in zip(values, shapes, strict=True)])[None]
    if isinstance(first, tuple):
        return tuple(_merged_argument(name, part, shapes, own) for part in zip(*values, strict=True))
    if any(isinstance(value, Tensor) or value != first for value in values):
        raise ValueError(f"the layers' argument {name} differs between inputs, so they cannot share a pass")
    return first


def _row(value: Tensor, shape: torch.Size) -> Tensor:
    """`[B or 1, S, ...]` as `[B · S, ...]`."""
    return value.expand(shape[0], *value.shape[1:]).flatten(0, 1)


def _joined(segments: Sequence[_Segment]) -> Iterator[_Segment]:
    """Merge neighbours of one length that have no masks and attend to themselves: they attend in one call."""

    def alone(each: _Segment) -> bool:
        return each.mask is not None or each.attending is not None

    for (length, apart), run in groupby(segments, key=lambda each: (each.length, alone(each))):
        if apart:
            yield from run
        else:
            yield _Segment(sum(each.batch for each in run), length, None)


def wrap_attention(inner: str, prefix: str, attend: Callable[..., Tensor]) -> str:
    """Register an attention implementation with transformers that wraps another.

    Args:
        inner: The other one's name.
        prefix: Of the new one's name.
        attend: `(plain, module, (query, key, value), mask, options) -> [B, S, heads, d]`, where `plain` is the other.

    Returns:
        The new one's name.
    """
    name = f"isthmus_{prefix}_{inner}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():

        def registered(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            plain: Plain = ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)
            return attend(plain, module, (query, key, value), attention_mask, options), None

        ALL_ATTENTION_FUNCTIONS.register(name, registered)
    return name


def _attend(
    plain: Plain, module: nn.Module, states: tuple[Tensor, ...], mask: _Segments, options: dict[str, Any]
) -> Tensor:
    """Attention `[1, T, heads, d]` of query, key and value `[1, heads, T, d]`, each segment by itself."""
    segments = mask.segments
    sizes = [segment.positions for segment in segments]
    parts = (torch.split(each.transpose(1, 2)[0], sizes) for each in states)
    outputs = []
    for segment, *rows in zip(segments, *parts, strict=True):
        heads = [each.unflatten(0, (segment.batch, segment.length)).transpose(1, 2) for each in rows]
        if segment.attending is None:
            found = plain(module, *heads, segment.mask, **options)[0]
        else:
            found = segment.attending.attend(plain, module, heads, segment.mask, options)
        outputs.append(found.flatten(0, 1))
    return torch.cat(outputs)[None]
