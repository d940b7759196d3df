"""Which requests share a batch, how long it waits for partners, and whether there is memory for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.cloud.bounds import SchedulerOptions
from isthmus.cloud.engine.requests import Kind, Request

MARGIN_SECONDS = 0.01
"""A batch begins so long before a deadline can be missed: a waiting thread wakes up late by a millisecond or more."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits(SchedulerOptions):
    """What the scheduler keeps to: the operator's options, and what was measured of span and machine.

    Attributes:
        compute_threads: Batches that may run at a time.
        smallest: Token positions of a request that may share a batch, at least; infinity where none may.
        compute_bytes: Memory of all that runs at a time. A request that needs more is refused where it comes in.
        state_bytes: Memory of the forward states of the sessions at work.
    """

    compute_threads: int = 1
    smallest: float = 1
    compute_bytes: float = math.inf
    state_bytes: float = math.inf


@dataclass(frozen=True, slots=True)
class Answered:
    """What is known of a session that was answered.

    Attributes:
        tenant: Whose it is.
        at: When it was answered.
        positions: Token positions of the request.
        returned_after: Seconds that it took to ask again the last time; 0 where it never has.
    """

    tenant: str
    at: float
    positions: int
    returned_after: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How things are at a moment.

    Attributes:
        now: The moment.
        at_work: Tenant -> session -> token positions of its last request, of the sessions that have a request here or
            were answered lately.
        states: Tenant -> session -> bytes of forward states, of the sessions at work.
        running_bytes: Memory of what runs.
    """

    now: float
    at_work: Mapping[str, Mapping[bytes, int]]
    states: Mapping[str, Mapping[bytes, float]]
    running_bytes: int


@dataclass(slots=True)
class MeasuredSpeed:
    """How long a token position of each tenant took in its last batch of a kind."""

    _seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # kind -> tenant -> seconds

    def measured(self, kind: Kind, tenant: str, seconds: float) -> None:
        """A token position took so long."""
        self._seconds.setdefault(kind.name, {})[tenant] = seconds

    def seconds(self, requests: Iterable[Request[Any]]) -> float:
        """How long requests take, by the speed of their tenants at such work; by the quickest's where it has none."""
        total = 0.0
        for request in requests:
            known = self._seconds.get(request.kind.name) if request.kind else None
            if known:
                total += request.positions * known.get(request.tenant, min(known.values()))
        return total


@dataclass(frozen=True, slots=True)
class Batching:
    """Says what a batch is made of, how long it waits for partners, and whether there is memory for it.

    Attributes:
        limits: What it keeps to.
        speed: How long a batch takes.
    """

    limits: SchedulerLimits
    speed: MeasuredSpeed

    def may_share(self, request: Request[Any]) -> bool:
        """Whether a request may share a batch."""
        if request.kind is None or self.limits.smallest == math.inf:
            return False
        return request.kind.any_size or request.positions >= self.limits.smallest

    def _even_part(self, snapshot: Snapshot) -> float:
        """Token positions of a batch, so that each compute thread has an even part of all that is at work."""
        if self.limits.compute_threads == 1:
            return math.inf
        return sum(sum(of_one.values()) for of_one in snapshot.at_work.values()) / self.limits.compute_threads

    def _may_grow(self, positions: int, more: int, part: float) -> bool:
        """Whether so many more positions in a batch bring it nearer to its even part, within `max_batch_tokens`."""
        return positions + more / 2 <= part and positions + more <= self.limits.max_batch_tokens

    def batch(
        self,
        first: Request[Any],
        ready: Iterable[Request[Any]],
        virtual_times: Mapping[str, float],
        reserved: int,
        snapshot: Snapshot,
    ) -> list[Request[Any]]:
        """What is computed together with a request, so that all keep their deadlines, and reserved memory stays free.

        Of a tenant there are several requests in it only as far as that puts it ahead of nobody at work.

        Args:
            first: Whose turn it is.
            ready: The requests that may begin.
            virtual_times: Those of the tenants at work.
            reserved: Bytes that stay free.
            snapshot: How things are.
        """
        batch, times = [first], dict(virtual_times)
        if not self.may_share(first):
            return batch
        times[first.tenant] += self.speed.seconds(batch) / first.share.weight
        pool = [each for each in ready if each is not first and self.may_share(each)]
        pool = [each for each in pool if _alike(each, first)]
        part = self._even_part(snapshot)
        while pool:
            request = min(pool, key=lambda each: (times[each.tenant], each.since))
            pool.remove(request)
            ahead = times[request.tenant] > min(
                (time for name, time in times.items() if name != request.tenant), default=math.inf
            )
            if ahead and any(each.tenant == request.tenant for each in batch):
                continue
            together = [*batch, request]
            if (
                self._may_grow(sum(each.positions for each in batch), request.positions, part)
                and snapshot.now + self.speed.seconds(together) <= min(map(deadline_of, together))
                and self.can_run(together, reserved, snapshot)
                and self.can_keep(request, batch, snapshot)
            ):
                batch = together
                times[request.tenant] += self.speed.seconds([request]) / request.share.weight
        return batch

    def can_run(self, requests: Sequence[Request[Any]], reserved: int, snapshot: Snapshot) -> bool:
        """Whether requests fit into memory beside what runs and the bytes that are reserved."""
        taken = snapshot.running_bytes + reserved
        return taken + sum(each.nbytes for each in requests) <= self.limits.compute_bytes

    def can_keep(self, request: Request[Any], batch: Sequence[Request[Any]], snapshot: Snapshot) -> bool:
        """Whether the forward state that a request would leave fits beside the others', and those of its batch.

        What a tenant holds counts against other tenants only up to an even part of the budget, or up to one session's
        state where that is more. So a tenant with many sessions keeps nobody else waiting.
        """
        if not request.keeps_bytes or snapshot.now >= request.since + self.limits.max_wait:
            return True
        even = self.limits.state_bytes / len(snapshot.at_work)
        taken = float(sum(each.keeps_bytes for each in batch))
        for name, states in snapshot.states.items():
            sizes = [size for session, size in states.items() if session != request.session]
            most = math.inf if name == request.tenant else max(even, *sizes, 0)
            taken += min(sum(sizes), most)
        return not taken or taken + request.keeps_bytes <= self.limits.state_bytes

    def waits_until(self, batch: Sequence[Request[Any]], away: Iterable[Answered], snapshot: Snapshot) -> float:
        """How long a batch waits for partners; at most as long as computing it with them takes, and `max_wait`.

        Args:
            batch: The batch.
            away: The sessions that are expected back.
            snapshot: How things are.
        """
        if batch[0].interactive or not self.may_share(batch[0]):
            return snapshot.now
        positions, part = sum(each.positions for each in batch), self._even_part(snapshot)
        expected = [last.positions for last in away if self._may_grow(positions, last.positions, part)]
        if not expected:
            return snapshot.now
        since = min(each.since for each in batch)
        seconds = self.speed.seconds(batch) * (positions + sum(expected)) / positions
        until = since + min(seconds, self.limits.max_wait)
        own = self.speed.seconds(batch) + MARGIN_SECONDS
        return min(until, *(deadline_of(each) - own for each in batch))


def deadline_of(request: Request[Any]) -> float:
    """When a request has to be done; infinity for whenever."""
    return math.inf if request.deadline is None else request.deadline


def _alike(one: Request[Any], other: Request[Any]) -> bool:
    """Whether two requests may share a batch."""
    return (
        one.kind is not None
        and other.kind is not None
        and one.kind.name == other.kind.name
        and one.interactive == other.interactive
    )
