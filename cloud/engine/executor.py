"""The span's executor: forward, and the gradient of the input.

A worker is a pure function of its input, because the backbone is frozen. Between a forward and its backward, the state
of the forward is in the activation cache; what that has forgotten is computed again, with the same bits.

Calls of several sessions may share a pass (`isthmus.backbone.runtime.sequence_packing`), and then a graph. Their
backwards share one too where they are in one batch. One that comes alone takes the shared graph, with nothing for the
others, or computes its own forward again, whichever is less work; the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.weight_quantization import largest_weight
from isthmus.backbone.runtime.batched_products import BatchingPartners
from isthmus.backbone.runtime.call_memory import call_memory
from isthmus.backbone.runtime.graph_memory import GraphBytes, counting, keep_little, storages_of
from isthmus.backbone.runtime.sequence_packing import Packer
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.runtime.sited_modules import sites_active
from isthmus.backbone.runtime.sited_pass import BoundSites, SiteAdapters, SitedPass
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.backbone.split.span import SpanInput
from isthmus.cloud.engine.activation_cache import (
    ActivationCache,
    CacheCounters,
    Entry,
    Graph,
    Key,
    StashLost,
    Taken,
)


@dataclass(frozen=True, slots=True)
class Guests:
    """The edge's sites inside the span that a call visits, who answers for them, what was lent, and who runs beside."""

    sites: BoundSites
    visitor: SiteAdapters
    leased: Mapping[int, LeasedLora] = field(default_factory=dict)
    partners: BatchingPartners | None = None

    def visit(self, *, again: bool = False) -> SitedPass:
        """A pass with them."""
        return SitedPass(self.sites, self.visitor, self.leased, again, self.partners)


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


class Executor:
    """Runs one frozen span for many sessions, on several threads where there are several.

    A call with sites may pause between its layers, and others run meanwhile: what a call needs is its own from its
    beginning to its end.

    Args:
        host: the frozen layers.
        dtype: dtype the span computes in; inputs are cast to it, outputs are returned in it.
        stash_bytes: budget of the activation cache over all sessions, in bytes.
        compute_bytes: what all that is computed at a time may take besides, in bytes. Who calls has to keep to it.
        count_graphs: whether the bytes of every graph are counted, and not estimated from those counted before.

    Attributes:
        cache: forward states that wait for their backward.
        compute_bytes: see above.
        memory: estimates what a call takes while it is computed.
    """

    def __init__(
        self,
        host: SiteHost,
        dtype: torch.dtype,
        stash_bytes: int,
        compute_bytes: float = math.inf,
        *,
        count_graphs: bool = False,
    ) -> None:
        self.host, self.dtype, self.compute_bytes = host, dtype, compute_bytes
        self.cache = ActivationCache(stash_bytes)
        self.memory = call_memory(host.span, fixed=largest_weight(host.span) * dtype.itemsize)
        self._packer = Packer(host.span)
        self._weights = storages_of(host.span)  # address and bytes
        self._count_graphs = count_graphs
        self._graph_bytes = GraphBytes(getattr(host.span.config, "sliding_window", None))  # of graphs without sites
        keep_little(host.span)

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
    def span_bytes(self) -> int:
        """Bytes of the span's weights, were they not quantized."""
        return self.host.span.n_params * self.dtype.itemsize

    @property
    def stash_bytes(self) -> int:
        """The budget of the activation cache, in bytes."""
        return self.cache.budget

    @property
    def used_bytes(self) -> int:
        """Bytes that the activation cache holds now."""
        return self.cache.used

    @property
    def counters(self) -> CacheCounters:
        """What the activation cache has evicted."""
        return self.cache.counters

    def is_masked(self, session: bytes, call: int) -> bool | None:
        """Whether the kept forward's input may need a mask; None where nothing is kept."""
        return self.cache.is_masked((session, call))

    def release(self, session: bytes) -> None:
        """Forget a session's forward states."""
        self.cache.release(session)

    def forget_leased(self, session: bytes) -> None:
        """Forget a session's forward states that hold leased weights."""
        self.cache.release(session, lambda entry: any(spec.is_leased for spec in entry.specs))

    def evict_all(self) -> None:
        """Forget every forward state, as a budget that is used up would."""
        self.cache.evict_all()

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
            session: id of the session, part of the cache's key.
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
        graph = self._keep({key: Entry(own, _specs(guests))}, guests)
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
        graph = self._keep({key: Entry(each) for key, each in own.items()}, None)
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
                self.cache.count_recomputed(1)
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
        due: dict[int, Taken] = {}
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
    ) -> Taken:
        """Take what a backward needs out of the cache. Raises what `backward` raises."""

        def check(inputs: SpanInput) -> None:
            if inputs.hidden.shape != shape:
                raise ValueError(
                    f"a gradient of shape {list(shape)} does not fit a forward of shape {list(inputs.hidden.shape)}"
                )

        def check_entry(entry: Entry) -> None:
            check(entry.inputs)
            if entry.specs != specs or (wanted and not entry.inputs.hidden.requires_grad):
                raise ValueError(
                    "a backward names the sites of its forward, and wants no gradient that this did not want"
                )

        taken = self.cache.take(key, check_entry)
        if taken is not None:
            return taken
        if replay is None:
            raise StashLost
        check(replay)
        return Taken(key, Entry(self._own(replay, wanted=wanted), specs))

    def _differentiate(self, due: Sequence[Taken], given: Sequence[Tensor]) -> list[Gradients]:
        """Backwards without sites. Those of one graph go through it together.

        Where some of a graph's calls are not among them, a pass through all of it costs as much as with them; a new
        forward and backward of those that are here costs two passes of their own.
        """
        gradients: dict[Key, Tensor] = {}
        upstream = {each.key: gradient for each, gradient in zip(due, given, strict=True)}

        def run(members: Sequence[Taken], graph: Graph, outputs: Sequence[Tensor]) -> None:
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
            self.cache.count_recomputed(len(again))
            graph = self._compute({each.key: each.entry for each in again}, None, again=True)
            outputs = [graph.outputs.pop(each.key) for each in again]
            run(again, graph, outputs)
        return [Gradients(gradients[each.key], (), each in again) for each in due]

    def _leave(self, graph: Graph, members: Sequence[Taken]) -> bool:
        """See `Graph.leave`."""
        return self.cache.leave(graph, [each.key for each in members])

    def _own(self, inputs: SpanInput, *, wanted: bool) -> SpanInput:
        """A copy that lives longer than the message it came in; a leaf of the graph if its gradient is wanted."""
        hidden = inputs.hidden.to(self.device, self.dtype, copy=True).requires_grad_(wanted)
        mask, positions = inputs.attention_mask, inputs.position_ids
        return SpanInput(
            hidden,
            None if mask is None else mask.to(self.device),
            None if positions is None else positions.to(self.device),
        )

    def _keep(self, entries: Mapping[Key, Entry], guests: Guests | None) -> Graph:
        """Compute a forward of several calls, and keep all."""
        try:
            graph = self._compute(entries, guests, again=False)
        except BaseException:
            for entry in entries.values():
                entry.wipe()
            raise
        kept = Graph(dict(graph.outputs), set(), graph.positions, graph.nbytes, graph.visit)
        self.cache.put(entries, graph)
        return kept

    def _compute(self, entries: Mapping[Key, Entry], guests: Guests | None, *, again: bool) -> Graph:
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
        counts = self._count_graphs or guests is not None
        nbytes = None if counts else self._graph_bytes.expected(inputs)
        if nbytes is None:
            with counting(self._weights) as kept:
                outputs, visit = run()
            for output in outputs:
                kept.add(output)
            nbytes = kept.total
            if guests is None:
                self._graph_bytes.learn(inputs, nbytes)
        else:
            outputs, visit = run()
        return Graph(dict(zip(entries, outputs, strict=True)), set(entries), positions, nbytes, visit)


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
