"""The activation cache: forward states that wait for their backward, within one budget of bytes.

The cache only saves time. Whatever it has forgotten is computed again, with the same bits:

    kept     autograd graph of the forward; the backward costs one backward
    input    the graph was evicted, the span's input is still here; the backward costs one forward more
    lost     nothing is here; `ActivationsLost` asks the edge to send the input again

Over budget, the oldest graphs shrink to their inputs first; if that is not enough, the oldest inputs go.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from isthmus.backbone.runtime.sited_pass import SitedPass
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.backbone.split.span import SpanInput


class ActivationsLost(Exception):  # noqa: N818  # a signal between executor and session, never shown to anybody
    """The forward state of this call is gone and its input with it; the edge has to send the input again."""


Key = tuple[bytes, int]  # (session id, call)


@dataclass(slots=True, eq=False)
class Graph:
    """The autograd graph of one pass, which several calls may share.

    Attributes:
        outputs: Of the calls whose backward is yet to begin.
        left: The calls whose backward has not gone through it, and may yet.
        positions: Token positions of all calls that it was built for.
        nbytes: What it keeps in memory.
        sited_pass: The pass that it was built in; None without sites.
        turn: Held by the backward that goes through it: one at a time.
    """

    outputs: dict[Key, Tensor]
    left: set[Key]
    positions: int
    nbytes: int
    sited_pass: SitedPass | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)

    def leave(self, keys: Sequence[Key]) -> bool:
        """Some calls need it no more once this backward is done; whether others may."""
        self.left.difference_update(keys)
        return bool(self.left)


@dataclass(slots=True, eq=False)
class Entry:
    """The forward state of a call.

    Attributes:
        inputs: The executor's own copy, in the span's dtype; its hidden states are the root of the graph.
        specs: The sites of the forward.
        graph: None after eviction.
    """

    inputs: SpanInput
    specs: tuple[SiteSpec, ...] = ()
    graph: Graph | None = None

    def wipe(self) -> None:
        """Overwrite the activations that crossed the wire.

        What the graph held besides is freed, which is best effort.
        """
        self.graph = None
        self.inputs.hidden.detach().zero_()


@dataclass(frozen=True, slots=True)
class Taken:
    """The forward state of a call whose backward has begun: the cache's no more.

    Attributes:
        key: The call.
        entry: Its entry.
        graph: Its graph; None where it has to be computed again.
        output: The call's output in the graph.
    """

    key: Key
    entry: Entry
    graph: Graph | None = None
    output: Tensor | None = None

    @property
    def positions(self) -> int:
        """Token positions of the call."""
        return self.entry.inputs.positions


@dataclass(slots=True)
class CacheCounters:
    """Counts since the worker started."""

    graphs_evicted: int = 0
    inputs_evicted: int = 0
    recomputed: int = 0


@dataclass(slots=True)
class ActivationCache:
    """Forward states of all sessions, the oldest first. May be used from any thread.

    Args:
        budget: Bytes that they take at most.

    Attributes:
        used: Bytes that they take now; a shared graph counts until the last of its calls is gone.
        counters: What was evicted, and what was computed again for it.
    """

    budget: int
    used: int = 0
    counters: CacheCounters = field(default_factory=CacheCounters)
    _entries: dict[Key, Entry] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, entries: Mapping[Key, Entry], graph: Graph) -> None:
        """Keep the forward states of one pass; they replace what was kept for the same calls."""
        with self._lock:
            for key, entry in entries.items():
                self._forget(key)
                entry.graph = graph
                self._entries[key] = entry
                self.used += entry.inputs.nbytes
            self.used += graph.nbytes
            self._shrink()

    def take(self, key: Key, check: Callable[[Entry], None]) -> Taken | None:
        """Take out what a backward needs; None where nothing is kept.

        Args:
            key: The call.
            check: Raises where the backward does not fit, and the entry stays.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            check(entry)
            graph = entry.graph
            output = None if graph is None else graph.outputs[key]
            self._remove(key)
            return Taken(key, entry, graph, output)

    def leave(self, graph: Graph, keys: Sequence[Key]) -> bool:
        """See `Graph.leave`."""
        with self._lock:
            return graph.leave(keys)

    def count_recomputed(self, calls: int) -> None:
        """So many calls had their forward computed again."""
        with self._lock:
            self.counters.recomputed += calls

    def is_masked(self, key: Key) -> bool | None:
        """Whether the kept forward's input may need a mask; None where nothing is kept."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            return entry.inputs.attention_mask is not None or entry.inputs.position_ids is not None

    def held(self) -> Mapping[bytes, float]:
        """Bytes that each session holds; those of a shared graph evenly by the calls that it is kept for."""
        held = Counter[bytes]()
        with self._lock:
            for (session, _), entry in self._entries.items():
                of_graph = 0.0 if entry.graph is None else entry.graph.nbytes / len(entry.graph.outputs)
                held[session] += round(entry.inputs.nbytes + of_graph)
        return held

    def release(self, session: bytes, which: Callable[[Entry], bool] = lambda _: True) -> None:
        """Forget a session's forward states, or some of them. A graph that others share stays while they need it.

        It would cost each of them a forward: a tenant that comes and goes would make others pay.
        """
        with self._lock:
            for key in [key for key, entry in self._entries.items() if key[0] == session and which(entry)]:
                self._forget(key)

    def evict_all(self) -> None:
        """Forget every forward state, as a budget that is used up would."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                if entry.graph is not None:
                    self._drop(entry.graph)
                self.counters.inputs_evicted += 1
                self._forget(key)

    def _shrink(self) -> None:
        for entry in self._entries.values():
            if self.used <= self.budget:
                return
            if entry.graph is not None:
                self._drop(entry.graph)
        while self._entries and self.used > self.budget:
            self._forget(next(iter(self._entries)))
            self.counters.inputs_evicted += 1

    def _drop(self, graph: Graph) -> None:
        """Evict a graph, for all calls that it was kept for."""
        self.used -= graph.nbytes
        self.counters.graphs_evicted += len(graph.outputs)
        for key in graph.outputs:
            self._entries[key].graph = None
        graph.left.difference_update(graph.outputs)
        graph.outputs.clear()

    def _remove(self, key: Key) -> Entry | None:
        """An entry, which is the caller's from now on; a graph is counted until the last of its calls is gone."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self.used -= entry.inputs.nbytes
        if entry.graph is not None:
            del entry.graph.outputs[key]
            if not entry.graph.outputs:
                self.used -= entry.graph.nbytes
        return entry

    def _forget(self, key: Key) -> None:
        entry = self._remove(key)
        if entry is None:
            return
        if entry.graph is not None:
            entry.graph.left.discard(key)
        entry.wipe()
