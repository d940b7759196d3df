"""The span's executor: forward, input gradient, and the stash of forward states between the two.

A worker is a pure function of its input, because the backbone is frozen. The stash is therefore only ever a saving of
time: whatever it has forgotten is computed again, and the answer has the same bits.

    kept     autograd graph of the forward; backward costs one backward
    input    the graph was evicted, the span's input is still here; backward costs one forward more
    lost     nothing is here; `StashLost` asks the edge to send the input again

All of it lives within one budget of bytes, over all sessions of the worker. Over budget, the oldest graphs shrink to
their inputs first; if that is not enough, the oldest inputs go.

Calls of several sessions may share a pass (`isthmus.backbone.runtime.sequence_packing`), and then a graph. Their
backwards share one too where they come together. One that comes alone takes the shared graph, with nothing for the
others, or computes its own forward again, whichever is less work; the bits are the same.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.weight_quantization import largest_weight
from isthmus.backbone.runtime.batched_products import BatchingPartners
from isthmus.backbone.runtime.call_memory import CallMemory, call_memory
from isthmus.backbone.runtime.graph_memory import GraphBytes, counting, keep_little, storages_of
from isthmus.backbone.runtime.sequence_packing import Packer
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.runtime.sited_modules import sites_active
from isthmus.backbone.runtime.sited_pass import BoundSites, SiteAdapters, SitedPass
from isthmus.backbone.sites.leasing import LeasedWeights
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.backbone.split.span import SpanInput


@dataclass(frozen=True, slots=True)
class Guests:
    """The edge's sites inside the span that a call visits, who answers for them, what was lent, and who runs beside."""

    sites: BoundSites
    visitor: SiteAdapters
    leased: Mapping[int, LeasedWeights] = field(default_factory=dict)
    company: BatchingPartners | None = None

    def visit(self, *, again: bool = False) -> SitedPass:
        """A pass with them."""
        return SitedPass(self.sites, self.visitor, self.leased, again, self.company)


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


Key = tuple[bytes, int]  # (session id, call)


@dataclass(frozen=True, slots=True)
class BackwardCall:
    """A backward without sites.

    Attributes:
        key: Whose.
        gradient: That of the output, `[B, S, h]`.
        replay: The forward's input, where it was sent again.
    """

    key: Key
    gradient: Tensor
    replay: SpanInput | None = None


@dataclass(slots=True, eq=False)
class _Graph:
    outputs: dict[Key, Tensor]  # of the calls whose backward is yet to begin
    left: set[Key]  # the calls whose backward has not gone through it, and may yet
    positions: int  # of all calls that it was built for
    nbytes: int
    visit: SitedPass | None = None  # the pass that it was built in; None without sites
    turn: threading.Lock = field(default_factory=threading.Lock)  # one backward goes through it at a time


@dataclass(slots=True, eq=False)
class _Entry:
    inputs: SpanInput  # the executor's own copy, in the span's dtype; its hidden states are the root of the graph
    specs: tuple[SiteSpec, ...] = ()  # the sites that the forward has visited
    graph: _Graph | None = None  # None after eviction

    def wipe(self) -> None:
        """Overwrite the activations that crossed the strip.

        What the graph held besides is freed, which is best effort.
        """
        self.graph = None
        self.inputs.hidden.detach().zero_()


@dataclass(frozen=True, slots=True)
class _Due:
    """A backward that has begun: its entry is the executor's no more."""

    key: Key
    entry: _Entry
    graph: _Graph | None
    output: Tensor | None

    @property
    def positions(self) -> int:
        return self.entry.inputs.positions


@dataclass(slots=True)
class StashCounters:
    """Counts since the worker started."""

    graphs_evicted: int = 0
    inputs_evicted: int = 0
    recomputed: int = 0


STATE_SHARE = 0.47
"""Forward states of several calls should not take more than so much of what the span's weights take."""
WORKING_SHARE = 0.63
"""From so much of that on, in all, what is free in the heap goes back to the system."""


@dataclass(slots=True)
class Executor:
    """Runs one frozen span for many sessions, on several threads where there are several.

    A call with sites may pause between its layers, and others run meanwhile: what a call needs is its own from its
    beginning to its end.

    Args:
        host: the frozen layers.
        dtype: dtype the span computes in; inputs are cast to it, outputs are returned in it.
        stash_bytes: budget for forward states over all sessions, in bytes.
        compute_bytes: what all that is computed at a time may take besides, in bytes. Who calls has to keep to it.

    Attributes:
        memory: estimates what a call takes while it is computed.
    """

    host: SiteHost
    dtype: torch.dtype
    stash_bytes: int
    compute_bytes: float = math.inf
    memory: CallMemory = field(init=False)
    counters: StashCounters = field(default_factory=StashCounters)
    _stash: OrderedDict[Key, _Entry] = field(default_factory=OrderedDict)
    _used: int = 0
    _packer: Packer = field(init=False)
    _weights: dict[int, int] = field(init=False)  # address and bytes of their storages
    _span_bytes: int = field(init=False)  # of its weights, were they not quantized
    _graph_bytes: GraphBytes = field(init=False)  # of graphs without sites
    _books: threading.RLock = field(default_factory=threading.RLock)  # of whoever looks into the stash

    def __post_init__(self) -> None:
        self._packer = Packer(self.host.span)
        self._weights = storages_of(self.host.span)
        keep_little(self.host.span)
        self._graph_bytes = GraphBytes(getattr(self.host.span.config, "sliding_window", None))
        self._span_bytes = self.host.span.n_params * self.dtype.itemsize
        self.memory = call_memory(self.host.span, fixed=largest_weight(self.host.span) * self.dtype.itemsize)

    @property
    def device(self) -> torch.device:
        """Where the span computes. What comes in may be anywhere; what goes out is there."""
        return self.host.span.device

    @property
    def side_by_side(self) -> bool:
        """Whether passes of several threads leave each other alone.

        The rotary embeddings of type longrope write their frequencies anew in each pass, for its length.
        """
        rope = getattr(self.host.span.config, "rope_parameters", None)
        return not (isinstance(rope, dict) and rope.get("rope_type") == "longrope")

    @property
    def room(self) -> float:
        """Token positions whose forward states take `STATE_SHARE` of what the weights take, or would unquantized.

        A property of the span: what one tenant sends says nothing of how much room another has.
        """
        return STATE_SHARE * self._span_bytes / self.memory.kept_per_position

    @property
    def working_bytes(self) -> float:
        """By how much passes of several sessions may make the process grow before its heap is trimmed."""
        return WORKING_SHARE * self._span_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that the stash holds now."""
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
                    output, visit = self._span(own, guests, again=False)
                    return _forwarded(output, visit)
            finally:
                own.hidden.zero_()
        key = (session, call)
        graph = self._keep({key: _Entry(own, _specs(guests))}, guests)
        return _forwarded(graph.outputs[key], graph.visit)

    def forward_together(self, calls: Mapping[Key, SpanInput], *, keep: bool) -> list[Forwarded]:
        """Run the span for several calls without sites in one pass; what `forward` does for each.

        Args:
            calls: the span's inputs.
            keep: as for `forward`, for all of them.

        Returns:
            What `forward` returns, in the calls' order.
        """
        own = {key: self._own(inputs, wanted=keep) for key, inputs in calls.items()}
        if not keep:
            try:
                with torch.inference_mode():
                    return [Forwarded(output) for output in self._packer(list(own.values()))]
            finally:
                for each in own.values():
                    each.hidden.zero_()
        graph = self._keep({key: _Entry(each) for key, each in own.items()}, None)
        return [Forwarded(graph.outputs[key].detach()) for key in calls]

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
            ValueError: the gradients are others than those that the forward was told of, or the gradient's shape is
                another than the forward's; nothing is lost.
        """
        due = self._begin((session, call), gradient.shape, replay, _specs(guests), wanted=wanted)
        # What comes in a message is overwritten at the first pause, and autograd may hold the gradient until the last.
        given = gradient.to(self.device, self.dtype, copy=guests is not None)
        try:
            if guests is None:
                return self._differentiate([due], [given])[0]
            graph, output = due.graph, due.output
            if graph is None or output is None:
                self._count_recomputed(1)
                graph = self._compute({due.key: due.entry}, guests, again=True)
                output = graph.outputs[due.key]
            hidden, lent = _through_sites(due.entry.inputs.hidden, output, graph.visit, given, guests, wanted=wanted)
            return Gradients(hidden, lent, due.graph is None)
        finally:
            due.entry.wipe()
            if guests is not None:
                given.zero_()

    def backward_together(self, calls: Sequence[BackwardCall]) -> list[Gradients | Exception]:
        """What `backward` does for each of several calls without sites, in as few passes as that takes.

        Returns:
            For each call its gradients, or the error that `backward` would raise.
        """
        outcomes: list[Gradients | Exception | None] = [None] * len(calls)
        due: dict[int, _Due] = {}
        try:
            for at, call in enumerate(calls):
                try:
                    due[at] = self._begin(call.key, call.gradient.shape, call.replay, (), wanted=True)
                except (StashLost, ValueError) as error:
                    outcomes[at] = error
            given = [calls[at].gradient.to(self.device, self.dtype) for at in due]
            for at, gradients in zip(due, self._differentiate(list(due.values()), given), strict=True):
                outcomes[at] = gradients
        finally:
            for each in due.values():
                each.entry.wipe()
        return [outcome for outcome in outcomes if outcome is not None]

    def shape_of(self, session: bytes, call: int) -> torch.Size | None:
        """Shape of the kept forward's input, or None where nothing is kept."""
        with self._books:
            entry = self._stash.get((session, call))
            return None if entry is None else entry.inputs.hidden.shape

    def is_masked(self, session: bytes, call: int) -> bool | None:
        """Whether the kept forward's input may need a mask; None where nothing is kept."""
        with self._books:
            entry = self._stash.get((session, call))
            if entry is None:
                return None
            return entry.inputs.attention_mask is not None or entry.inputs.position_ids is not None

    def release(self, session: bytes) -> None:
        """Forget a session's forward states. A graph that others share stays until they need it no more.

        It is one graph, and would cost each of them a forward: a tenant that comes and goes would make others pay.
        """
        with self._books:
            for key in [key for key in self._stash if key[0] == session]:
                self._forget(key)

    def forget_leased(self, session: bytes) -> None:
        """Forget a session's forward states that hold lent weights."""
        with self._books:
            for key, entry in list(self._stash.items()):
                if key[0] == session and any(spec.is_leased for spec in entry.specs):
                    self._forget(key)

    def evict_all(self) -> None:
        """Forget every forward state, as a budget that is used up would."""
        with self._books:
            for key, entry in list(self._stash.items()):
                if entry.graph is not None:
                    self._drop(entry.graph)
                self.counters.inputs_evicted += 1
                self._forget(key)

    def _count_recomputed(self, calls: int) -> None:
        with self._books:
            self.counters.recomputed += calls

    def _span(self, inputs: SpanInput, guests: Guests | None, *, again: bool) -> tuple[Tensor, SitedPass | None]:
        span = self.host.span
        arguments = (inputs.hidden, inputs.attention_mask, inputs.position_ids)
        if guests is None:
            return span(*arguments), None
        visit = guests.visit(again=again)
        with sites_active(visit):
            return span(*arguments), visit

    def _begin(
        self, key: Key, shape: torch.Size, replay: SpanInput | None, specs: tuple[SiteSpec, ...], *, wanted: bool
    ) -> _Due:
        """Take what a backward needs out of the stash. Raises what `backward` raises."""
        with self._books:
            kept = self._stash.get(key)
            inputs = replay if kept is None else kept.inputs
            if inputs is not None and inputs.hidden.shape != shape:
                raise ValueError(
                    f"a gradient of shape {list(shape)} does not fit a forward of shape {list(inputs.hidden.shape)}"
                )
            if kept is not None and (kept.specs != specs or (wanted and not kept.inputs.hidden.requires_grad)):
                raise ValueError(
                    "a backward names the sites of its forward, and wants no gradient that this did not want"
                )
            graph = None if kept is None else kept.graph
            output = None if graph is None else graph.outputs[key]
            entry = self._take(key)
        if entry is None:
            if replay is None:
                raise StashLost
            entry = _Entry(self._own(replay, wanted=wanted), specs)
        return _Due(key, entry, graph, output)

    def _differentiate(self, due: Sequence[_Due], given: Sequence[Tensor]) -> list[Gradients]:
        """Backwards without sites. Those of one graph go through it together.

        Where some of a graph's calls are not among them, a pass through all of it costs as much as with them; a new
        forward and backward of those that are here costs two passes of their own.
        """
        gradients: dict[Key, Tensor] = {}
        upstream = {each.key: gradient for each, gradient in zip(due, given, strict=True)}

        def run(members: Sequence[_Due], graph: _Graph, outputs: Sequence[Tensor]) -> None:
            leaves = [each.entry.inputs.hidden for each in members]
            with graph.turn:
                found = torch.autograd.grad(
                    outputs, leaves, [upstream[each.key] for each in members], retain_graph=self._leave(graph, members)
                )
            gradients.update(zip((each.key for each in members), found, strict=True))

        graphs = {id(each.graph): each.graph for each in due if each.graph is not None}
        again = [each for each in due if each.graph is None]
        for graph in graphs.values():
            members = [each for each in due if each.graph is graph]
            if graph.positions > 2 * sum(each.positions for each in members):
                self._leave(graph, members)
                again += members
            else:
                run(members, graph, [each.output for each in members if each.output is not None])
        if again:
            self._count_recomputed(len(again))
            graph = self._compute({each.key: each.entry for each in again}, None, again=True)
            outputs = [graph.outputs.pop(each.key) for each in again]
            run(again, graph, outputs)
        return [Gradients(gradients[each.key], (), each in again) for each in due]

    def _leave(self, graph: _Graph, members: Sequence[_Due]) -> bool:
        """Some of a graph's calls need it no more once this backward is done; whether others may."""
        with self._books:
            graph.left.difference_update(each.key for each in members)
            return bool(graph.left)

    def _own(self, inputs: SpanInput, *, wanted: bool) -> SpanInput:
        """A copy that lives longer than the message it came in; a leaf of the graph if its gradient is wanted."""
        hidden = inputs.hidden.to(self.device, self.dtype, copy=True).requires_grad_(wanted)
        mask, positions = inputs.attention_mask, inputs.position_ids
        return SpanInput(
            hidden,
            None if mask is None else mask.to(self.device),
            None if positions is None else positions.to(self.device),
        )

    def _keep(self, entries: Mapping[Key, _Entry], guests: Guests | None) -> _Graph:
        """Compute a forward of several calls, and put all into the stash."""
        try:
            graph = self._compute(entries, guests, again=False)
        except BaseException:
            for entry in entries.values():
                entry.wipe()
            raise
        kept = _Graph(dict(graph.outputs), set(), graph.positions, graph.nbytes, graph.visit)
        with self._books:
            for key, entry in entries.items():
                self._forget(key)
                entry.graph = graph
                self._stash[key] = entry
                self._used += entry.inputs.nbytes
            self._used += graph.nbytes
            self._shrink()
        return kept

    def _compute(self, entries: Mapping[Key, _Entry], guests: Guests | None, *, again: bool) -> _Graph:
        """The graph of a forward: of several calls, or of one, with sites or without."""
        inputs = [entry.inputs for entry in entries.values()]
        sites = any(spec.placement != Placement.TAP for spec in _specs(guests))
        if not sites and not all(each.hidden.requires_grad for each in inputs):
            raise ValueError("a call without sites, whose input wants no gradient, has no backward")

        def run() -> tuple[list[Tensor], SitedPass | None]:
            if len(inputs) > 1:
                return self._packer(inputs), None
            output, visit = self._span(inputs[0], guests, again=again)
            return [output], visit

        positions = sum(each.positions for each in inputs)
        nbytes = None if guests is not None else self._graph_bytes.expected(inputs)
        if nbytes is None:
            with counting(self._weights) as kept:
                outputs, visit = run()
            for output in outputs:
                kept.add(output)
            nbytes = kept.total
            if guests is None:
                with self._books:
                    self._graph_bytes.learn(inputs, nbytes)
        else:
            outputs, visit = run()
        return _Graph(dict(zip(entries, outputs, strict=True)), set(entries), positions, nbytes, visit)

    def _shrink(self) -> None:
        for entry in self._stash.values():
            if self._used <= self.stash_bytes:
                return
            if entry.graph is not None:
                self._drop(entry.graph)
        while self._stash and self._used > self.stash_bytes:
            self._forget(next(iter(self._stash)))
            self.counters.inputs_evicted += 1

    def _drop(self, graph: _Graph) -> None:
        """Evict a graph, for all calls that it was kept for."""
        self._used -= graph.nbytes
        self.counters.graphs_evicted += len(graph.outputs)
        for key in graph.outputs:
            self._stash[key].graph = None
        graph.left.difference_update(graph.outputs)
        graph.outputs.clear()

    def _take(self, key: Key) -> _Entry | None:
        """An entry, which is the caller's from now on; a graph is counted until the last of its calls is gone."""
        entry = self._stash.pop(key, None)
        if entry is None:
            return None
        self._used -= entry.inputs.nbytes
        if entry.graph is not None:
            del entry.graph.outputs[key]
            if not entry.graph.outputs:
                self._used -= entry.graph.nbytes
        return entry

    def _forget(self, key: Key) -> None:
        with self._books:
            entry = self._take(key)
            if entry is None:
                return
            if entry.graph is not None:
                entry.graph.left.discard(key)
        entry.wipe()


def _specs(guests: Guests | None) -> tuple[SiteSpec, ...]:
    return () if guests is None else guests.sites.specs


def _through_sites(
    hidden: Tensor, output: Tensor, visit: SitedPass | None, gradient: Tensor, guests: Guests, *, wanted: bool
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The gradients of a span's input, where they are wanted, and of what was lent."""
    if visit is None:
        raise RuntimeError("a graph with sites was built without a visit")
    # What the graph was built with: a lease may have been renewed since.
    loans = [one for _, one in sorted(visit.leased.items())]
    lent = [matrix for one in loans for matrix in (one.down, one.up) if matrix.requires_grad]
    inputs = [hidden if wanted else visit.anchor, *lent]
    # The engine has one thread for each device, and a call that pauses would keep it from all others.
    with sites_active(guests.visit()), torch.autograd.set_multithreading_enabled(False):
        result, *gradients = torch.autograd.grad(output, inputs, gradient, allow_unused=True)
    back = tuple(
        torch.zeros_like(matrix) if found is None else found for matrix, found in zip(lent, gradients, strict=True)
    )
    return result if wanted else None, back


def _forwarded(output: Tensor, visit: SitedPass | None) -> Forwarded:
    tapped = {} if visit is None else visit.tapped
    return Forwarded(output.detach(), tuple(tapped[number] for number in sorted(tapped)))
