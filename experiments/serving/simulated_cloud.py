"""A cloud and its edges in simulated time: real schedulers, and a machine that only counts seconds.

The machine has cores that everybody who has something to do shares evenly: the batches that the cloud computes, and
the edges' own work before, between and after their calls. A pass takes a time of its own and one for each token
position, a third of both in the forward. Its seconds are such that a pass over all calls gains 1.27 and 0.39 of all
work is the edges', as in runs of `isthmus bench tenants` with SmolLM2-135M on two cores. The wire takes no time.

A forward leaves a graph, which the calls of its batch share. A backward goes through the whole graph, or computes its
own forward again where that is less, as `isthmus.cloud.engine.executor` does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from isthmus.cloud.engine.requests import Kind, Request, Share
from isthmus.cloud.engine.scheduler import Scheduler
from isthmus.cloud.session.handler import BACKWARD, KEPT_FORWARD

PASS_SECONDS: Final = 0.114
"""Core seconds of a forward and a backward, whatever their size."""
POSITION_SECONDS: Final = 0.0056
"""Core seconds of both for each token position."""
OWN_SECONDS: Final = 0.0047
"""Core seconds of an edge's own work in a step, for each token position."""
STATE_ROOM: Final = 305.0
"""Token positions whose forward states take half of what the span's weights take: SmolLM2-135M's in fp32."""

Then = Callable[[], object]
MakeScheduler = Callable[[Callable[[], float], Callable[[], Mapping[bytes, float]]], Scheduler]


@dataclass(slots=True)
class _Task:
    """Something that takes cores: up to `cores` of them, for `seconds` of one core."""

    seconds: float
    then: Then
    cores: float


@dataclass(slots=True)
class _Graph:
    """What a batch of forwards has left: its token positions, and the sessions that it is kept for."""

    positions: int
    sessions: set[bytes]


@dataclass(slots=True)
class SimulatedCloud:
    """One worker, its edges, and the cores that they share.

    Args:
        seed: Of the small differences between times.
        make_scheduler: Makes the scheduler, with the cloud's clock and the forward states that sessions hold.
        compute_threads: Batches that the worker computes at a time; each has its part of the cores.

    Attributes:
        began: Edge -> when it began each of its steps.
        most_state: The most token positions that graphs were held for at a time.
    """

    seed: int
    make_scheduler: MakeScheduler
    compute_threads: int = 2
    cores: int = 2
    now: float = 0.0
    began: dict[str, list[float]] = field(default_factory=dict)
    most_state: int = 0
    _random: random.Random = field(init=False)
    _scheduler: Scheduler = field(init=False)
    _idle: set[int] = field(init=False)  # compute threads
    _tasks: list[_Task] = field(default_factory=list)
    _graphs: dict[bytes, _Graph] = field(default_factory=dict)
    _in_backward: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311  # a simulation
        self._scheduler = self.make_scheduler(lambda: self.now, self._held)
        self._idle = set(range(self.compute_threads))

    def compute(self, seconds: float, then: Then, cores: float = 1.0) -> None:
        """Take so many core seconds, give or take a twentieth, with at most so many cores."""
        self._tasks.append(_Task(seconds * self._random.uniform(0.95, 1.05), then, cores))

    def call(
        self, tenant: str, session: int, positions: int, kind: Kind, then: Then, *, deadline: float | None = None
    ) -> None:
        """Ask the worker; with a `deadline` in seconds from now the call is an interactive one."""
        request = Request(
            tenant,
            f"{tenant}/{session}".encode(),
            Share(),
            then,
            kind,
            interactive=deadline is not None,
            positions=positions,
            deadline=None if deadline is None else self.now + deadline,
            keeps_bytes=positions if kind is KEPT_FORWARD else 0,
        )
        self._scheduler.add(request)

    def train(self, tenant: str, positions: int) -> None:
        """An edge's steps, one after the other."""
        own = OWN_SECONDS * positions
        self.began.setdefault(tenant, []).append(self.now)

        def after() -> None:
            self.compute(0.2 * own, lambda: self.train(tenant, positions))

        def between() -> None:
            self.compute(0.6 * own, lambda: self.call(tenant, 0, positions, BACKWARD, after))

        self.compute(0.2 * own, lambda: self.call(tenant, 0, positions, KEPT_FORWARD, between))

    def flood(self, tenant: str, session: int, positions: int, kinds: Sequence[Kind]) -> None:
        """A session that wants computing all the time: calls of these kinds, again and again."""
        kind, *rest = kinds

        def again() -> None:
            self.flood(tenant, session, positions, [*rest, kind])

        self.compute(0.004, lambda: self.call(tenant, session, positions, kind, again))

    def hold(self, tenant: str, session: int, positions: int) -> None:
        """A session that leaves a forward state and is silent from then on."""
        self.compute(0.004, lambda: self.call(tenant, session, positions, KEPT_FORWARD, lambda: None))

    def run_steps(self, steps: int) -> None:
        """Let time pass until every edge that trains has made so many steps."""
        while min(map(len, self.began.values())) <= steps:
            self._advance(math.inf)

    def run_until(self, moment: float) -> None:
        """Let time pass until a moment."""
        while self.now < moment:
            self._advance(moment)

    def steps(self, count: int) -> list[float]:
        """Seconds of each of the first so many steps of the edges, the shortest first."""
        return sorted(b - a for began in self.began.values() for a, b in pairwise(began[: count + 1]))

    def _advance(self, until: float) -> None:
        self._begin_batches()
        wanted = sum(task.cores for task in self._tasks)
        rate = min(1.0, self.cores / wanted) if wanted else 1.0
        moments = [until - self.now, *(task.seconds / (rate * task.cores) for task in self._tasks)]
        if self._idle and (ready := self._scheduler.ready_at()) is not None:
            moments.append(max(ready - self.now, 0.0) + 1e-3)
        passed = min(moments)
        self.now += passed
        for task in self._tasks:
            task.seconds -= passed * rate * task.cores
        done = [task for task in self._tasks if task.seconds <= 1e-9]
        self._tasks = [task for task in self._tasks if task.seconds > 1e-9]
        for task in done:
            task.then()

    def _begin_batches(self) -> None:
        self._scheduler.take_late()  # whoever asked for them goes on without an answer
        for thread in sorted(self._idle):
            batch = self._scheduler.next(parallel=thread > 0)
            if not batch:
                continue
            self._idle.remove(thread)
            seconds = self._core_seconds(batch)
            sessions = {request.session for request in batch}
            if batch[0].kind is BACKWARD:
                self._in_backward |= sessions
            elif batch[0].kind is KEPT_FORWARD:
                graph = _Graph(sum(request.positions for request in batch), set(sessions))
                for session in sessions:
                    self._release(session)
                    self._graphs[session] = graph
                held = {id(each): each.positions for each in self._graphs.values()}
                self.most_state = max(self.most_state, sum(held.values()))

            def end(
                thread: int = thread,
                batch: list[Request[Any]] = batch,
                sessions: set[bytes] = sessions,
                since: float = self.now,
            ) -> None:
                self._idle.add(thread)
                if batch[0].kind is BACKWARD:
                    self._in_backward -= sessions
                    for session in sessions:
                        self._release(session)
                self._scheduler.finished(batch, self.now - since)
                for request in batch:
                    request.run()

            self.compute(seconds, end, self.cores / self.compute_threads)

    def _core_seconds(self, batch: Sequence[Request[Any]]) -> float:
        """What computing a batch takes."""
        positions = sum(request.positions for request in batch)
        if batch[0].kind is not BACKWARD:
            return (PASS_SECONDS + POSITION_SECONDS * positions) / 3
        seconds, again = 0.0, 0
        by_graph: dict[int, tuple[_Graph | None, int]] = {}
        for request in batch:
            graph = self._graphs.get(request.session)
            _, before = by_graph.get(id(graph), (graph, 0))
            by_graph[id(graph)] = graph, before + request.positions
        for graph, here in by_graph.values():
            if graph is None or graph.positions > 2 * here:
                again += here
            else:
                seconds += (PASS_SECONDS + POSITION_SECONDS * graph.positions) * 2 / 3
        return seconds + (PASS_SECONDS + POSITION_SECONDS * again if again else 0.0)

    def _held(self) -> Mapping[bytes, float]:
        """Forward states by session, in token positions; not those whose whole graph is in its backward."""
        return {
            session: graph.positions / len(graph.sessions)
            for session, graph in self._graphs.items()
            if graph.sessions - self._in_backward
        }

    def _release(self, session: bytes) -> None:
        graph = self._graphs.pop(session, None)
        if graph is not None:
            graph.sessions.discard(session)
