"""One pass of a span over the next tokens of several sequences, each with its own keys and values.

The linears run once over the tokens of all; attention runs for each sequence by itself, as in
`isthmus.backbone.runtime.sequence_packing`. There are two ways:

- **fast**: in fp32 a call that is alone is transformers' own pass, and has its bits. Batched with others the
  linears have more rows, so its bits may be others.
- **exact**: a token has the same bits alone, batched with others, among several that are verified at once, and in a
  replay. So a pass has at least as many rows as make a product independent of their number (`batch_invariance.py`),
  and attention takes one token after the other. A prompt attends as a block, and in a replay as the same block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from isthmus.backbone.decoding.key_values import KeyValues
from isthmus.backbone.decoding.leased_linears import LeasedRows, Place, add_leased_linears, leases_active
from isthmus.backbone.runtime.sequence_packing import Packer, Plain
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.split.span import FrozenSpan, SpanInput

NOT_EXACT = (
    "exact decoding is not possible on this cloud: its matrix products depend on the number of rows; decode fast"
)


@dataclass(frozen=True, slots=True)
class FastCall:
    """The next tokens of some sequences of one length.

    Attributes:
        inputs: Hidden states `[B, S, h]` of the tokens, the mask `[B, P + S]`, and the positions of the tokens.
        cache: Keys and values of the `P` positions before; gets those of these tokens.
        leased: The LoRAs that the edge has leased for it.
    """

    inputs: SpanInput
    cache: KeyValues
    leased: Mapping[Place, LeasedLora] = field(default_factory=dict)
    _masks: dict[int, Tensor] = field(default_factory=dict, kw_only=True)  # one for all layers

    def attend(
        self, plain: Plain, module: nn.Module, states: Sequence[Tensor], mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """See `isthmus.backbone.runtime.sequence_packing.Attending`."""
        query, key, value = states
        keys, values = self.cache.update(key, value, _number(module))
        return attention(plain, module, query, keys, values, mask, options, self._masks)


@dataclass(frozen=True, slots=True)
class ExactCall(FastCall):
    """The same, with bits that depend on nothing else.

    Attributes:
        blocks: How many tokens attend at once, one block after another; they add up to `S`.
    """

    blocks: tuple[int, ...] = ()
    _parts: dict[tuple[int, int, int], list[Part]] = field(default_factory=dict)  # layers that share a mask share them

    def attend(
        self, plain: Plain, module: nn.Module, states: Sequence[Tensor], mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """See `FastCall`; block by block."""
        query, key, value = states
        number = _number(module)
        keys, values = self.cache.update(key, value, number)
        window = self.cache.window(number)
        known = id(mask), keys.shape[2], window or 0
        if known not in self._parts:
            self._parts[known] = list(parts_of(self.blocks, keys.shape[2], window, mask, keys.device))
        outputs = []
        for part in self._parts[known]:
            seen = keys[:, :, part.seen], values[:, :, part.seen]
            outputs.append(attention(plain, module, query[:, :, part.rows], *seen, part.mask, options, self._masks))
        return torch.cat(outputs, dim=1)


@dataclass(frozen=True, slots=True)
class Part:
    """A block of an exact call: its tokens, the keys that they see, and their mask."""

    rows: slice
    seen: slice
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Filler:
    """Padding rows, so that a pass has enough of them. They attend to nothing, and their output is dropped."""

    cache: KeyValues

    def attend(
        self, plain: Plain, module: nn.Module, states: Sequence[Tensor], mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Something of the right shape."""
        return states[0].transpose(1, 2)


class DecodePass:
    """Runs a span over the next tokens of several sequences. Several threads may call it, each with other caches.

    Args:
        span: The span.
        rows: From so many rows on, a product has the same bits whatever the other rows are; None where no number is
            known, or none is enough.
    """

    def __init__(self, span: FrozenSpan, rows: int | None) -> None:
        self._span, self._packer, self.rows = span, Packer(span), rows
        self._nothing = KeyValues(span)
        add_leased_linears(self._packer.layers, span.layer_span.start)

    def __call__(self, calls: Sequence[FastCall]) -> list[Tensor]:
        """The span's output `[B, S, h]` for each call, whose caches get the keys and values. Without a graph.

        Raises:
            ValueError: A call is to be exact, and no number of rows makes it so.
        """
        with torch.inference_mode():
            exact = any(isinstance(call, ExactCall) for call in calls)
            if len(calls) == 1 and not exact and not calls[0].leased and self._span.dtype == torch.float32:
                (call,) = calls
                inputs = call.inputs
                return [self._span(inputs.hidden, inputs.attention_mask, inputs.position_ids, call.cache)]
            if exact and self.rows is None:
                raise ValueError(NOT_EXACT)
            given, attending = [call.inputs for call in calls], list[Any](calls)
            missing = (self.rows or 0) - sum(each.positions for each in given) if exact else 0
            if missing > 0:
                zeros = given[0].hidden.new_zeros(1, missing, self._span.hidden_size)
                given, attending = [*given, SpanInput(zeros)], [*attending, _Filler(self._nothing)]
            with leases_active(list(_leased_rows(calls))):
                return self._packer(given, attending)[: len(calls)]


def attention(
    plain: Plain,
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    masks: dict[int, Tensor],
) -> Tensor:
    """Attention `[B, S, heads, d]`.

    Queries that share keys are the rows of one product with them, instead of a product each: in bf16 on a CPU torch
    takes a fifth of the time for that, and in fp32 as long.

    Args:
        masks: Additive masks of this pass by `id(mask)`; this one is added.
    """
    batch, heads, length, size = query.shape
    causal = mask is None and length > 1
    if plain is not sdpa_attention_forward or causal or query.dtype == torch.float32:
        return plain(module, query, keys, values, mask, **options)[0]
    shared = heads // keys.shape[1]
    rows = query.reshape(batch, -1, shared * length, size)
    additive = None
    if mask is not None:
        if id(mask) not in masks:
            masks[id(mask)] = _additive_mask(mask, query.dtype).repeat(1, 1, shared, 1)
        additive = masks[id(mask)]
    found = functional.scaled_dot_product_attention(rows, keys, values, additive, scale=options.get("scaling"))
    return found.reshape(batch, heads, length, size).transpose(1, 2)


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as 0 and -inf, made once a pass; torch would make it anew in every layer."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _leased_rows(calls: Sequence[FastCall]) -> Iterator[LeasedRows]:
    """The rows of the calls that have leased adapters."""
    row = 0
    for call in calls:
        rows = slice(row, row + call.inputs.positions)
        if call.leased:
            yield LeasedRows(rows, call.leased, isinstance(call, ExactCall))
        row = rows.stop


def parts_of(
    blocks: Sequence[int], n_keys: int, window: int | None, mask: Tensor | None, device: torch.device
) -> Iterator[Part]:
    """The blocks of a call, each with the keys and the mask that it would have in a call of its own.

    Args:
        blocks: How many tokens each has.
        n_keys: Keys that the call's last token could see, were there no window.
        window: Positions that a token sees; None for all.
        mask: That of the whole call, `[B, 1, S, n_keys]`; None for a causal one, of a call without padding.
        device: Where the keys are.
    """
    start = n_keys - sum(blocks)  # the key of the call's first token
    row = 0
    for size in blocks:
        first_key = start + row
        seen = slice(0 if window is None else max(0, first_key - window + 1), first_key + size)
        rows = slice(row, row + size)
        if mask is not None:
            part: Tensor | None = mask[:, :, rows, seen]
            # transformers gives a token that sees everything no mask, which is another kernel.
            if size == 1 and part is not None and part.dtype == torch.bool and bool(part.all()):
                part = None
        elif size == 1 or first_key == 0:
            part = None
        else:
            n_seen = seen.stop - seen.start
            part = torch.ones(size, n_seen, dtype=torch.bool, device=device).tril(n_seen - size)
            if window is not None:
                part = part.triu(n_seen - size - window + 1)
            part = part[None, None]
        yield Part(rows, seen, part)
        row += size


def _number(module: nn.Module) -> int:
    """The number of the layer that an attention is part of, in the whole model."""
    number: Any = module.layer_idx
    return int(number)
