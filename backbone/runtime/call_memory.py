"""An estimate of the memory that a call of a span takes while it is computed.

It follows from the shapes of the tensors that a decoder layer makes (Korthikanti et al. 2022, arXiv 2205.05198, count
them for another layer): those that the graph keeps for each token position and layer, those that one layer has in
memory at a time, and those that attention makes for each pair of positions.

    sdpa    nothing, where it has no mask; with one, a byte for the mask, and in each layer the mask again as numbers of
            the span's dtype, which the graph keeps
    eager   a score for each head, several times: the graph keeps what the softmax gives, in fp32

A mask is made where the edge sends one, where position ids may start anew (packed sequences), and in layers with a
window that the sequence fills. The tests check that the estimate lies between the allocation that torch's
profiler reports and twice that.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

FP32 = 4
"""Bytes of a number on the wire's near side: codecs decode to it, norms and softmax compute in it."""


class Pass(enum.Enum):
    """What is computed of a call."""

    FORWARD = enum.auto()
    """Nothing is kept."""
    KEPT_FORWARD = enum.auto()
    BACKWARD = enum.auto()
    """With the forward again, where its graph is gone."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """What a call's memory depends on.

    Attributes:
        batch: Sequences.
        length: Token positions of each.
        what: What is computed.
        masked: Whether attention may need a mask: one came, or position ids.
        past: Token positions of each that are in a cache.
        kept: Numbers of the span's dtype that the call's sites keep of each token position besides (leased ones, taps).
        passing: Numbers in fp32 that its sites have of each token position for a while (questions and answers).
    """

    batch: int
    length: int
    what: Pass
    masked: bool = False
    kept: int = 0
    passing: int = 0
    past: int = 0


@dataclass(frozen=True, slots=True)
class CallMemory:
    """Estimates calls of one span. Made by `call_memory`.

    Attributes:
        layers: Decoder layers of the span.
        windows: The windows of those that have one, in positions.
        hidden: Width of the hidden states.
        heads: Attention heads.
        queries: Width of a layer's queries: heads times their size.
        keys: Width of its keys, and of its values.
        rotated: Whether queries and keys are rotated by their positions, which makes more of them.
        inner: Width inside its MLP.
        normed: Width of all that a layer normalises, together.
        inner_kept: So many tensors of the inner width the graph keeps of each layer.
        capped: Whether scores are capped (Gemma 2), which makes more of them.
        wide: Bytes of a number where eager attention computes its softmax.
        eager: Whether attention makes all scores.
        itemsize: Bytes of a number in the span's dtype.
        fixed: Bytes that every pass takes, whatever its shape: of a quantized span the largest weight in full.
    """

    layers: int
    windows: tuple[int, ...]
    hidden: int
    heads: int
    queries: int
    keys: int
    rotated: bool
    inner: int
    normed: int
    inner_kept: int
    capped: bool
    wide: int
    eager: bool
    itemsize: int
    fixed: int = 0

    @property
    def kept_per_position(self) -> int:
        """Bytes that the graph keeps of a token position in a call without a mask, but for eager attention's scores."""
        d = self.itemsize
        return self.layers * (
            self.normed * (FP32 if d == FP32 else 2 * FP32)
            + d * (2 * self.queries + 2 * self.keys + self.inner_kept * self.inner)
            + FP32 * self.heads
        )

    def of(self, call: CallShape) -> int:
        """Bytes that a call takes while it is computed, at most at one time."""
        d, positions = self.itemsize, call.batch * call.length
        graph = call.what != Pass.FORWARD
        seen = call.past + call.length
        masks = ((call.masked or call.past) and self.layers) or sum(seen > window for window in self.windows)
        # In: as decoded, and the executor's copy. Out: in the span's dtype, and as the codec makes it.
        ends = 2 * self.hidden * (FP32 + d)
        # One layer at a time: the residual, a norm in fp32, and the larger one of attention and MLP.
        attention = d * (6 if self.rotated else 4) * (self.queries + self.keys)
        if call.what == Pass.BACKWARD:
            attention += 2 * FP32 * self.queries  # the kernel adds gradients up in fp32
        layer = 2 * d * self.hidden + 3 * FP32 * self.hidden + max(attention, 4 * d * self.inner)
        kept = self.kept_per_position if graph else 0
        if masks and graph:  # keys and values are repeated for all heads
            kept += masks * d * 2 * max(0, self.queries - self.keys)
        per_position = ends + layer + kept + d * call.kept + FP32 * call.passing
        return self.fixed + positions * (per_position + round(seen * self._per_pair(masks, call.what)))

    def _per_pair(self, masks: int, what: Pass) -> float:
        """Bytes for each pair of positions of a sequence."""
        d = self.itemsize
        if not self.eager:
            if not masks:
                return 0
            return 2 + d * (1 if what == Pass.FORWARD else masks)
        score = self.heads * self.wide
        narrow = self.heads * d if d != self.wide else 0
        copies = 2 + self.capped
        kept = 0 if what == Pass.FORWARD else self.layers * (score + narrow + self.capped * self.heads * d)
        more = copies * score if what != Pass.BACKWARD else (copies + 1) * score
        return (2 + d) * (1 + bool(self.windows)) + more + narrow + kept


_PIECEWISE = ("gelu_new", "gelu_fast", "quick_gelu", "gelu_python", "gelu_accurate")
"""Activation functions that are written out in several operations, each of which keeps something."""


def call_memory(span: Any, *, fixed: int = 0) -> CallMemory:
    """Estimates calls of a span.

    Args:
        span: A `FrozenSpan`.
        fixed: Bytes that every pass takes, whatever its shape.
    """
    config, layers = span.config, tuple(span.layer_span)
    implementation = str(span.base.config._attn_implementation)
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads) * size
    itemsize = torch.empty((), dtype=span.dtype).element_size()
    inner = next(
        (int(value) for name in ("intermediate_size", "ffn_dim", "n_inner") if (value := getattr(config, name, None))),
        4 * config.hidden_size,
    )
    named = (getattr(config, each, None) for each in ("hidden_activation", "hidden_act", "activation_function"))
    activation = next((name for name in named if name), "")
    gated = config.model_type not in ("gpt2", "opt")  # these add learned positions to the embedding, too
    return CallMemory(
        layers=len(layers),
        windows=_windows(config, layers),
        hidden=int(config.hidden_size),
        heads=heads,
        queries=heads * size,
        keys=keys,
        rotated=gated,
        inner=inner,
        normed=_normed(config, heads * size, keys),
        inner_kept=2 if gated else 6 if activation in _PIECEWISE else 1,
        capped=getattr(config, "attn_logit_softcapping", None) is not None,
        eager=implementation.endswith("eager"),
        wide=itemsize if config.model_type == "gpt2" else FP32,
        itemsize=itemsize,
        fixed=fixed,
    )


def _normed(config: Any, queries: int, keys: int) -> int:
    """Width of all that a layer normalises, together: Gemma's norms stand behind attention and MLP as well."""
    heads = queries + keys if config.model_type in ("qwen3", "gemma3_text") else 0
    return (4 if config.model_type.startswith("gemma") else 2) * int(config.hidden_size) + heads


def _windows(config: Any, layers: Sequence[int]) -> tuple[int, ...]:
    """The windows of the layers that have one."""
    window = getattr(config, "sliding_window", None)
    if not window:
        return ()
    types = getattr(config, "layer_types", None)
    sliding = layers if types is None else [layer for layer in layers if types[layer] == "sliding_attention"]
    return (int(window),) * len(sliding)
