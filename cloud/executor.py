"""The span's executor: forward, input gradient, and the stash of forward states between the two.

A worker is a pure function of its input, because the backbone is frozen. The stash is therefore only ever a saving of
time: whatever it has forgotten is computed again, and the answer has the same bits.

    kept     autograd graph of the forward; backward costs one backward
    input    the graph was evicted, the span's input is still here; backward costs one forward more
    lost     nothing is here; `StashLost` asks the edge to send the input again

All of it lives within one budget of bytes, over all sessions of the worker. Over budget, the oldest graphs shrink to
their inputs first; if that is not enough, the oldest inputs go.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class StashLost(Exception):  # noqa: N818 - a signal between the executor and the tenant's session, never shown to anybody
    """The forward state of this call is gone and its input with it; the edge has to send the input again."""


@dataclass(frozen=True, slots=True)
class SpanInput:
    """What a span is a function of.

    Shape: hidden [batch, sequence, hidden size]; attention_mask [batch, sequence] or None; position_ids [batch or 1,
    sequence] or None.
    """

    hidden: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors together."""
        tensors = (self.hidden, self.attention_mask, self.position_ids)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(slots=True)
class _Entry:
    inputs: SpanInput  # the executor's own copy, in the span's dtype; its hidden states are the root of the graph
    output: Tensor | None  # holds the graph; None after eviction
    graph_bytes: int

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + (self.graph_bytes if self.output is not None else 0)

    def wipe(self) -> None:
        """Overwrite the activations that crossed the strip.

        What the graph held besides is freed, which is best effort.
        """
        self.output = None
        self.inputs.hidden.detach().zero_()


@dataclass(slots=True)
class StashCounters:
    """Counts since the worker started."""

    graphs_evicted: int = 0
    inputs_evicted: int = 0
    recomputed: int = 0


MAX_SHAPES = 256
"""Of so many shapes, the last used ones, the size of the graph is remembered."""

Key = tuple[bytes, int]  # (session id, call)


@dataclass(slots=True)
class Executor:
    """Runs one frozen span for many sessions.

    Args:
        span: the frozen layers; called with hidden, attention mask, position ids.
        dtype: dtype the span computes in; inputs are cast to it, outputs are returned in it.
        stash_bytes: budget for forward states over all sessions, in bytes.
    """

    span: nn.Module
    dtype: torch.dtype
    stash_bytes: int
    counters: StashCounters = field(default_factory=StashCounters)
    _stash: OrderedDict[Key, _Entry] = field(default_factory=OrderedDict)
    _graph_bytes: OrderedDict[tuple[object, ...], int] = field(default_factory=OrderedDict)
    _used: int = 0

    @property
    def used_bytes(self) -> int:
        """Bytes that the stash holds now. Other threads may ask; all else is for the one that computes."""
        return self._used

    def forward(self, session: bytes, call: int, inputs: SpanInput, *, keep: bool) -> Tensor:
        """Run the span.

        Args:
            session: id of the session, part of the stash's key.
            call: number of the call within the session. A repeated call replaces what was kept for it.
            inputs: the span's input.
            keep: whether a backward will follow; if not, nothing is kept.

        Returns:
            Hidden states after the span's last layer, [batch, sequence, hidden size], in the span's dtype.
        """
        if not keep:
            with torch.inference_mode():
                return self._span(inputs.hidden.to(self.dtype), inputs.attention_mask, inputs.position_ids)
        own = self._own(inputs)
        output, graph_bytes = self._run(own)
        self._forget((session, call))
        entry = self._stash[session, call] = _Entry(own, output, graph_bytes)
        self._used += entry.nbytes
        self._shrink()
        return output.detach()

    def backward(
        self, session: bytes, call: int, gradient: Tensor, replay: SpanInput | None = None
    ) -> tuple[Tensor, bool]:
        """Gradient of the span's input for a gradient of its output; drops what was kept for the call.

        Args:
            session: id of the session.
            call: number of the forward call.
            gradient: gradient of the output, [batch, sequence, hidden size].
            replay: the forward's input, sent again after `StashLost`.

        Returns:
            The gradient of the input, and whether the forward had to be computed again for it.

        Raises:
            StashLost: nothing is known of the call and `replay` is None.
        """
        entry = self._stash.get((session, call))
        if entry is not None:
            inputs = entry.inputs
        elif replay is not None:
            inputs = self._own(replay)
        else:
            raise StashLost
        output = None if entry is None else entry.output
        recomputed = output is None
        if output is None:
            self.counters.recomputed += 1
            output, _ = self._run(inputs)
        (result,) = torch.autograd.grad(output, inputs.hidden, gradient.to(self.dtype))
        self._forget((session, call))
        return result, recomputed

    def shape_of(self, session: bytes, call: int) -> torch.Size | None:
        """Shape of the kept forward's input, or None where nothing is kept."""
        entry = self._stash.get((session, call))
        return None if entry is None else entry.inputs.hidden.shape

    def release(self, session: bytes) -> None:
        """Forget a session's forward states."""
        for key in [key for key in self._stash if key[0] == session]:
            self._forget(key)

    def evict_all(self) -> None:
        """Forget every forward state, as a budget that is used up would."""
        for key, entry in list(self._stash.items()):
            self.counters.graphs_evicted += entry.output is not None
            self.counters.inputs_evicted += 1
            self._forget(key)

    def _span(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        output: Tensor = self.span(hidden, mask, positions)
        return output

    def _own(self, inputs: SpanInput) -> SpanInput:
        """A copy that lives longer than the message it came in."""
        hidden = inputs.hidden.to(self.dtype, copy=True).requires_grad_(True)
        return SpanInput(hidden, inputs.attention_mask, inputs.position_ids)

    def _run(self, inputs: SpanInput) -> tuple[Tensor, int]:
        leaf, mask, positions = inputs.hidden, inputs.attention_mask, inputs.position_ids
        # The size of a graph depends on shapes (and on whether a mask is needed at all), so it is measured once for
        # each.
        dense = mask is None or bool(mask.all())
        key = (tuple(leaf.shape), dense, None if positions is None else tuple(positions.shape))
        known = self._graph_bytes.get(key)
        if known is not None:
            self._graph_bytes.move_to_end(key)
            return self._span(leaf, mask, positions), known
        weights = {p.untyped_storage().data_ptr() for p in (*self.span.parameters(), *self.span.buffers())}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:  # the weights are shared by all calls
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self._span(leaf, mask, positions)
        self._graph_bytes[key] = sum(sizes.values()) + output.numel() * output.element_size()
        if len(self._graph_bytes) > MAX_SHAPES:
            self._graph_bytes.popitem(last=False)
        return output, self._graph_bytes[key]

    def _shrink(self) -> None:
        for entry in self._stash.values():
            if self._used <= self.stash_bytes:
                return
            if entry.output is not None:
                self._used -= entry.graph_bytes
                entry.output = None
                self.counters.graphs_evicted += 1
        while self._stash and self._used > self.stash_bytes:
            self._forget(next(iter(self._stash)))
            self.counters.inputs_evicted += 1

    def _forget(self, key: Key) -> None:
        entry = self._stash.pop(key, None)
        if entry is not None:
            self._used -= entry.nbytes
            entry.wipe()
