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
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.backbone.site_host import SiteHost
from isthmus.backbone.site_spec import Placement, SiteSpec
from isthmus.backbone.site_visit import BoundSites, LeasedWeights, Visit, Visitor, visiting


@dataclass(frozen=True, slots=True)
class Guests:
    """The edge's sites inside the span that a call visits, who answers for them, and what was lent for it."""

    sites: BoundSites
    visitor: Visitor
    leased: Mapping[int, LeasedWeights] = field(default_factory=dict)

    def visit(self, *, again: bool = False) -> Visit:
        """A pass with them."""
        return Visit(self.sites, self.visitor, self.leased, again)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What comes of a forward: hidden states `[B, S, h]`, and what came out of the taps, in their order."""

    hidden: Tensor
    taps: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Gradients:
    """What comes of a backward.

    Attributes:
        hidden: The gradient of the span's input `[B, S, h]`, None unless it was wanted.
        lent: Those of what was lent, A and B of each site in turn.
        recomputed: Whether the forward had to be computed again for it.
    """

    hidden: Tensor | None
    lent: tuple[Tensor, ...] = ()
    recomputed: bool = False


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
class _Graph:
    output: Tensor
    visit: Visit | None  # the pass that it was built in; None without sites


@dataclass(slots=True)
class _Entry:
    inputs: SpanInput  # the executor's own copy, in the span's dtype; its hidden states are the root of the graph
    graph: _Graph | None  # None after eviction
    graph_bytes: int
    specs: tuple[SiteSpec, ...]  # the sites that the forward has visited

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + (self.graph_bytes if self.graph is not None else 0)

    def wipe(self) -> None:
        """Overwrite the activations that crossed the strip.

        What the graph held besides is freed, which is best effort.
        """
        self.graph = None
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

    A call with sites may pause between its layers, and others run meanwhile: what a call needs is its own from its
    beginning to its end.

    Args:
        host: the frozen layers.
        dtype: dtype the span computes in; inputs are cast to it, outputs are returned in it.
        stash_bytes: budget for forward states over all sessions, in bytes.
    """

    host: SiteHost
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

    def forward(
        self,
        session: bytes,
        call: int,
        inputs: SpanInput,
        *,
        keep: bool,
        guests: Guests | None = None,
        wanted: bool = True,
    ) -> Forwarded:
        """Run the span.

        Args:
            session: id of the session, part of the stash's key.
            call: number of the call within the session. A repeated call replaces what was kept for it.
            inputs: the span's input.
            keep: whether a backward will follow; if not, nothing is kept.
            guests: the sites inside.
            wanted: whether the backward will want the input's gradient, and not only those of the sites.

        Returns:
            Hidden states after the span's last layer, in the span's dtype, and what came out of the taps.
        """
        own = self._own(inputs, wanted=keep and wanted)
        if not keep:
            try:
                with torch.inference_mode():
                    return _forwarded(self._span(own, guests, again=False))
            finally:
                own.hidden.zero_()
        try:
            graph, graph_bytes = self._run(own, guests, again=False)
        except BaseException:
            own.hidden.detach().zero_()
            raise
        self._forget((session, call))
        entry = self._stash[session, call] = _Entry(own, graph, graph_bytes, _specs(guests))
        self._used += entry.nbytes
        self._shrink()
        return _forwarded(graph)

    def backward(
        self,
        session: bytes,
        call: int,
        gradient: Tensor,
        replay: SpanInput | None = None,
        *,
        guests: Guests | None = None,
        wanted: bool = True,
    ) -> Gradients:
        """Gradient of the span's input for a gradient of its output; drops what was kept for the call.

        Args:
            session: id of the session.
            call: number of the forward call.
            gradient: gradient of the output, [batch, sequence, hidden size].
            replay: the forward's input, sent again after `StashLost`.
            guests: the same sites as in the forward.
            wanted: whether the input's gradient is; the sites always get theirs.

        Raises:
            StashLost: nothing is known of the call and `replay` is None.
            ValueError: the gradients are others than those that the forward was told of; nothing is lost.
        """
        kept = self._stash.get((session, call))
        if kept is not None and (kept.specs != _specs(guests) or (wanted and not kept.inputs.hidden.requires_grad)):
            raise ValueError("a backward names the sites of its forward, and wants no gradient that this did not want")
        entry = self._take((session, call))
        if entry is None:
            if replay is None:
                raise StashLost
            entry = _Entry(self._own(replay, wanted=wanted), None, 0, _specs(guests))
        # What comes in a message is overwritten at the first pause, and autograd may hold the gradient until the last.
        given = gradient.to(self.dtype, copy=guests is not None)
        try:
            recomputed = entry.graph is None
            if entry.graph is None:
                self.counters.recomputed += 1
                entry.graph, _ = self._run(entry.inputs, guests, again=True)
            hidden, lent = self._differentiate(entry.inputs.hidden, entry.graph, given, guests, wanted=wanted)
            return Gradients(hidden, lent, recomputed)
        finally:
            entry.wipe()
            if guests is not None:
                given.zero_()

    def shape_of(self, session: bytes, call: int) -> torch.Size | None:
        """Shape of the kept forward's input, or None where nothing is kept."""
        entry = self._stash.get((session, call))
        return None if entry is None else entry.inputs.hidden.shape

    def release(self, session: bytes) -> None:
        """Forget a session's forward states."""
        for key in [key for key in self._stash if key[0] == session]:
            self._forget(key)

    def forget_leased(self, session: bytes) -> None:
        """Forget a session's forward states that hold lent weights."""
        for key, entry in list(self._stash.items()):
            if key[0] == session and any(spec.on_loan for spec in entry.specs):
                self._forget(key)

    def evict_all(self) -> None:
        """Forget every forward state, as a budget that is used up would."""
        for key, entry in list(self._stash.items()):
            self.counters.graphs_evicted += entry.graph is not None
            self.counters.inputs_evicted += 1
            self._forget(key)

    def _span(self, inputs: SpanInput, guests: Guests | None, *, again: bool) -> _Graph:
        span = self.host.span
        arguments = (inputs.hidden, inputs.attention_mask, inputs.position_ids)
        if guests is None:
            return _Graph(span(*arguments), None)
        visit = guests.visit(again=again)
        with visiting(visit):
            return _Graph(span(*arguments), visit)

    def _differentiate(
        self, hidden: Tensor, graph: _Graph, gradient: Tensor, guests: Guests | None, *, wanted: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        if guests is None or graph.visit is None:
            (result,) = torch.autograd.grad(graph.output, hidden, gradient)
            return result, ()
        # What the graph was built with: a lease may have been renewed since.
        loans = [one for _, one in sorted(graph.visit.leased.items())]
        lent = [matrix for one in loans for matrix in (one.down, one.up) if matrix.requires_grad]
        inputs = [hidden if wanted else graph.visit.anchor, *lent]
        # The engine has one thread for each device, and a call that pauses would keep it from all others.
        with visiting(guests.visit()), torch.autograd.set_multithreading_enabled(False):
            result, *gradients = torch.autograd.grad(graph.output, inputs, gradient, allow_unused=True)
        back = tuple(
            torch.zeros_like(matrix) if found is None else found for matrix, found in zip(lent, gradients, strict=True)
        )
        return result if wanted else None, back

    def _own(self, inputs: SpanInput, *, wanted: bool) -> SpanInput:
        """A copy that lives longer than the message it came in; a leaf of the graph if its gradient is wanted."""
        hidden = inputs.hidden.to(self.dtype, copy=True).requires_grad_(wanted)
        return SpanInput(hidden, inputs.attention_mask, inputs.position_ids)

    def _run(self, inputs: SpanInput, guests: Guests | None, *, again: bool) -> tuple[_Graph, int]:
        leaf, mask, positions = inputs.hidden, inputs.attention_mask, inputs.position_ids
        places = [(spec.layer, spec.part) for spec in _specs(guests) if spec.placement != Placement.TAP]
        if not leaf.requires_grad and not places:
            raise ValueError("a call without sites, whose input wants no gradient, has no backward")
        # The size of a graph depends on shapes, on whether a mask is needed at all, and on where it begins, so it is
        # measured once for each. Sites add next to nothing to it: what they keep lies on the edge.
        dense = mask is None or bool(mask.all())
        begins = None if leaf.requires_grad else min(places)
        key = (tuple(leaf.shape), dense, None if positions is None else tuple(positions.shape), begins)
        known = self._graph_bytes.get(key)
        if known is not None:
            self._graph_bytes.move_to_end(key)
            return self._span(inputs, guests, again=again), known
        span = self.host.span
        weights = {p.untyped_storage().data_ptr() for p in (*span.parameters(), *span.buffers())}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:  # the weights are shared by all calls
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graph = self._span(inputs, guests, again=again)
        output = graph.output
        self._graph_bytes[key] = sum(sizes.values()) + output.numel() * output.element_size()
        if len(self._graph_bytes) > MAX_SHAPES:
            self._graph_bytes.popitem(last=False)
        return graph, self._graph_bytes[key]

    def _shrink(self) -> None:
        for entry in self._stash.values():
            if self._used <= self.stash_bytes:
                return
            if entry.graph is not None:
                self._used -= entry.graph_bytes
                entry.graph = None
                self.counters.graphs_evicted += 1
        while self._stash and self._used > self.stash_bytes:
            self._forget(next(iter(self._stash)))
            self.counters.inputs_evicted += 1

    def _take(self, key: Key) -> _Entry | None:
        """An entry, which is the caller's from now on."""
        entry = self._stash.pop(key, None)
        if entry is not None:
            self._used -= entry.nbytes
        return entry

    def _forget(self, key: Key) -> None:
        entry = self._take(key)
        if entry is not None:
            entry.wipe()


def _specs(guests: Guests | None) -> tuple[SiteSpec, ...]:
    return () if guests is None else guests.sites.specs


def _forwarded(graph: _Graph) -> Forwarded:
    tapped = {} if graph.visit is None else graph.visit.tapped
    return Forwarded(graph.output.detach(), tuple(tapped[number] for number in sorted(tapped)))
