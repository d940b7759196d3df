"""The span's executor: forward, and the gradient of the input.

A worker is a pure function of its input, because the backbone is frozen. Between a forward and its backward, the state
of the forward is in the activation cache; what that has forgotten is computed again, with the same bits.

Calls of several sessions may share a pass (`isthmus.backbone.runtime.sequence_packing`), and then a graph. Their
backwards share one too where they are in one batch. One that comes alone takes the shared graph, with nothing for the
others, or computes its own forward again, whichever is less work; the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.weight_quantization import largest_weight
from isthmus.backbone.runtime.call_memory import call_memory
from isthmus.backbone.runtime.graph_memory import GraphBytes, counting, keep_little, storages_of
from isthmus.backbone.runtime.sequence_packing import Packer
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.runtime.sited_pass import SitedPass
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.backbone.split.span import FrozenSpan, SpanInput
from isthmus.cloud.engine.activation_cache import ActivationCache, ActivationsLost, Entry, Graph, Key, Taken
from isthmus.cloud.engine.call_sites import CallSites


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
        leased: Those of the leased matrices, A and B of each site in turn.
        recomputed: Whether the forward had to be computed again for it.
    """

    hidden: Tensor | None
    leased: tuple[Tensor, ...] = ()
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
        cache_bytes: budget of the activation cache over all sessions, in bytes.
        compute_bytes: what all that is computed at a time may take besides, in bytes. Who calls has to keep to it.
        count_graphs: whether the bytes of each graph are counted, or only of those that tell of the others.

    Attributes:
        cache: forward states that wait for their backward.
        compute_bytes: see above.
        memory: estimates what a call takes while it is computed.
    """

    def __init__(
        self,
        host: SiteHost,
        dtype: torch.dtype,
        cache_bytes: int,
        compute_bytes: float = math.inf,
        *,
        count_graphs: bool = False,
    ) -> None:
        self.host, self.dtype, self.compute_bytes = host, dtype, compute_bytes
        self.cache = ActivationCache(cache_bytes)
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

    def forward(
        self,
        session: bytes,
        call: int,
        inputs: SpanInput,
        *,
        keep: bool,
        sites: CallSites | None = None,
        wanted: bool = True,
    ) -> Forwarded:
        """Run the span.

        Args:
            session: id of the session, part of the cache's key.
            call: number of the call within the session. A repeated call replaces what was kept for it.
            inputs: the span's input.
            keep: whether a backward will follow; if not, nothing is kept.
            sites: the edge's sites inside the span that the call goes through; None for none.
            wanted: whether the backward will want the input's gradient, and not only those of the sites.

        Returns:
            Hidden states after the span's last layer, in the span's dtype, and what came out of the taps.
        """
        return self._forward({(session, call): inputs}, sites, keep=keep, wanted=wanted)[0]

    def forward_together(self, calls: Mapping[Key, SpanInput], *, keep: bool) -> list[Forwarded]:
        """Run the span for several calls without sites in one pass; what `forward` does for each.

        Args:
            calls: the span's inputs.
            keep: as for `forward`, for all of them.

        Returns:
            What `forward` returns, in the calls' order.
        """
        return self._forward(calls, None, keep=keep, wanted=True)

    def forward_part(self, part: FrozenSpan, inputs: SpanInput) -> Forwarded:
        """Hidden states after a part of the span, by itself; nothing is kept."""
        own = Entry(self.copy_inputs(inputs), ())
        try:
            with torch.inference_mode():
                return Forwarded(part(own.inputs.hidden, own.inputs.attention_mask, own.inputs.position_ids))
        finally:
            own.wipe()

    def backward(
        self,
        session: bytes,
        call: int,
        gradient: Tensor,
        replay: SpanInput | None = None,
        *,
        sites: CallSites | None = None,
        wanted: bool = True,
    ) -> Gradients:
        """Gradient of the span's input for a gradient of its output; drops what was kept for the call.

        Args:
            session: id of the session.
            call: number of the forward call.
            gradient: gradient of the output, [batch, sequence, hidden size].
            replay: the forward's input, sent again after `ActivationsLost`.
            sites: the same sites as in the forward.
            wanted: whether the input's gradient is; the sites always get theirs.

        Raises:
            ActivationsLost: nothing is known of the call and `replay` is None.
            ValueError: the forward was told of other sites, or of another wish for the input's gradient, or its shape
                was another than the gradient's; nothing is lost.
        """
        due = self._begin((session, call), gradient.shape, replay, _specs(sites), wanted=wanted)
        try:
            if sites is not None:
                return self._differentiate_sites(due, gradient, sites, wanted=wanted)
            return self._differentiate([due], [gradient])[0]
        finally:
            due.entry.wipe()

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
                except (ActivationsLost, ValueError) as error:
                    outcomes[at] = error
            found = self._differentiate(list(due.values()), [calls[at].gradient for at in due])
            for at, gradients in zip(due, found, strict=True):
                outcomes[at] = gradients
        finally:
            for each in due.values():
                each.entry.wipe()
        return [outcome for outcome in outcomes if outcome is not None]

    # Forward ----------------------------------------------------------------------------------------------------------

    def _forward(
        self, calls: Mapping[Key, SpanInput], sites: CallSites | None, *, keep: bool, wanted: bool
    ) -> list[Forwarded]:
        """See `forward`. A call with sites comes alone."""
        specs = _specs(sites)
        entries = {key: Entry(self.copy_inputs(each, wanted=keep and wanted), specs) for key, each in calls.items()}
        if not keep:
            try:
                with torch.inference_mode():
                    return _forwarded(*self._run(entries, sites, again=False))
            finally:
                for entry in entries.values():
                    entry.wipe()
        try:
            graph = self._build(entries, sites, again=False)
        except BaseException:
            for entry in entries.values():
                entry.wipe()
            raise
        results = _forwarded(graph.outputs.values(), graph.sited_pass)
        self.cache.put(entries, graph)
        return results

    def copy_inputs(self, inputs: SpanInput, *, wanted: bool = False) -> SpanInput:
        """A copy that lives longer than the message it came in; a leaf of the graph if its gradient is wanted."""
        hidden = inputs.hidden.to(self.device, self.dtype, copy=True).requires_grad_(wanted)
        mask, positions = inputs.attention_mask, inputs.position_ids
        return SpanInput(
            hidden,
            None if mask is None else mask.to(self.device),
            None if positions is None else positions.to(self.device),
        )

    def _run(
        self, entries: Mapping[Key, Entry], sites: CallSites | None, *, again: bool
    ) -> tuple[list[Tensor], SitedPass | None]:
        """The outputs of a pass over several calls, or over one, with sites or without."""
        inputs = [entry.inputs for entry in entries.values()]
        if sites is not None:
            output, sited = sites.run(self.host, inputs[0], again=again)
            return [output], sited
        if len(inputs) > 1:
            return self._packer(inputs), None
        return [self.host.span(each.hidden, each.attention_mask, each.position_ids) for each in inputs], None

    def _build(self, entries: Mapping[Key, Entry], sites: CallSites | None, *, again: bool) -> Graph:
        """The graph of a pass; see `_run`."""
        inputs = [entry.inputs for entry in entries.values()]
        if not (sites is not None and sites.have_gradients) and not all(each.hidden.requires_grad for each in inputs):
            raise ValueError("a call without sites, whose input wants no gradient, has no backward")
        counted = sites is not None or self._count_graphs
        nbytes = None if counted else self._graph_bytes.expected(inputs)
        if nbytes is None:
            with counting(self._weights) as kept:
                outputs, sited = self._run(entries, sites, again=again)
            for output in outputs:
                kept.add(output)
            nbytes = kept.total
            if not counted:
                self._graph_bytes.learn(inputs, nbytes)
        else:
            outputs, sited = self._run(entries, sites, again=again)
        positions = sum(each.positions for each in inputs)
        return Graph(dict(zip(entries, outputs, strict=True)), set(entries), positions, nbytes, sited)

    # Backward ---------------------------------------------------------------------------------------------------------

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
            raise ActivationsLost
        check(replay)
        return Taken(key, Entry(self.copy_inputs(replay, wanted=wanted), specs))

    def _differentiate_sites(self, due: Taken, gradient: Tensor, sites: CallSites, *, wanted: bool) -> Gradients:
        """A backward with sites."""
        # What comes in a message is overwritten at the first pause, and autograd may hold the gradient until the last.
        given = gradient.to(self.device, self.dtype, copy=True)
        try:
            graph, output = due.graph, due.output
            if graph is None or output is None:
                self.cache.count_recomputed(1)
                graph = self._build({due.key: due.entry}, sites, again=True)
                output = graph.outputs[due.key]
            if graph.sited_pass is None:
                raise RuntimeError("a graph with sites was built without a pass of theirs")
            found = sites.differentiate(due.entry.inputs.hidden, output, graph.sited_pass, given, wanted=wanted)
            return Gradients(*found, recomputed=due.graph is None)
        finally:
            given.zero_()

    def _differentiate(self, due: Sequence[Taken], gradients: Sequence[Tensor]) -> list[Gradients]:
        """Backwards without sites. Those of one graph go through it together.

        Where some of a graph's calls are not among them, a pass through all of it costs as much as with them; a new
        forward and backward of those that are here costs two passes of their own.
        """
        found: dict[Key, Tensor] = {}
        given = {each.key: gradient.to(self.device, self.dtype) for each, gradient in zip(due, gradients, strict=True)}

        def run(members: Sequence[Taken], graph: Graph, outputs: Sequence[Tensor]) -> None:
            leaves = [each.entry.inputs.hidden for each in members]
            upstream = [given[each.key] for each in members]
            with graph.turn:
                results = torch.autograd.grad(outputs, leaves, upstream, retain_graph=self._leave(graph, members))
            found.update(zip((each.key for each in members), results, strict=True))

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
            graph = self._build({each.key: each.entry for each in again}, None, again=True)
            outputs = [graph.outputs.pop(each.key) for each in again]
            run(again, graph, outputs)
        return [Gradients(found[each.key], recomputed=each in again) for each in due]

    def _leave(self, graph: Graph, members: Sequence[Taken]) -> bool:
        """See `Graph.leave`."""
        return self.cache.leave(graph, [each.key for each in members])


def _specs(sites: CallSites | None) -> tuple[SiteSpec, ...]:
    return () if sites is None else sites.specs


def _forwarded(outputs: Iterable[Tensor], sited: SitedPass | None) -> list[Forwarded]:
    taps = () if sited is None else sited.taps
    return [Forwarded(output.detach(), taps) for output in outputs]
