"""Which requests share a batch, and how long it waits for partners."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.cloud.engine.answered_sessions import Answered
from isthmus.cloud.engine.memory_admission import MemoryAdmission, Snapshot
from isthmus.cloud.engine.requests import Kind, Request

MARGIN_SECONDS = 0.01
"""A batch begins so long before a deadline can be missed: a waiting thread wakes up late by a millisecond or more."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the scheduler keeps to.

    Attributes:
        max_batch_tokens: Token positions of a batch at most.
        max_wait: Seconds that a request is held back at most, though it could begin, for batching partners or for
            memory of forward states. A session that has been silent for so long is not at work.
        interactive_lead: Seconds of computing, over its weight, that a tenant may be ahead by interactive requests.
        compute_threads: Batches that may run at a time.
        smallest: Token positions of a request that may share a batch, at least; infinity where none may.
        compute_bytes: Memory of all that runs at a time; one request alone may take more.
        state_bytes: Memory of the forward states of the sessions at work.
    """

    max_batch_tokens: int = 512
    max_wait: float = 2.0
    interactive_lead: float = 2.0
    compute_threads: int = 1
    smallest: float = 1
    compute_bytes: float = math.inf
    state_bytes: float = math.inf


@dataclass(slots=True)
class MeasuredPace:
    """How long a token position of each tenant took in its last batch of a kind."""

    _seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # kind -> tenant -> seconds

    def measured(self, kind: Kind, tenant: str, seconds: float) -> None:
        """A token position took so long."""
        self._seconds.setdefault(kind.name, {})[tenant] = seconds

    def seconds(self, requests: Iterable[Request[Any]]) -> float:
        """How long requests take, by the pace of their tenants at such work; by the quickest's where it has none."""
        total = 0.0
        for request in requests:
            known = self._seconds.get(request.kind.name) if request.kind else None
            if known:
                total += request.positions * known.get(request.tenant, min(known.values()))
        return total


@dataclass(frozen=True, slots=True)
class Batching:
    """Makes batches.

    Attributes:
        limits: What it keeps to.
        memory: Whether there is memory for a batch.
        pace: How long it takes.
    """

    limits: SchedulerLimits
    memory: MemoryAdmission
    pace: MeasuredPace

    def may_share(self, request: Request[Any]) -> bool:
        """Whether a request may share a batch."""
        return request.kind is not None and request.positions >= self.limits.smallest

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
        times[first.tenant] += self.pace.seconds(batch) / first.share.weight
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
                and snapshot.now + self.pace.seconds(together) <= min(map(deadline_of, together))
                and self.memory.can_run(together, reserved, snapshot)
                and self.memory.can_keep(request, batch, snapshot)
            ):
                batch = together
                times[request.tenant] += self.pace.seconds([request]) / request.share.weight
        return batch

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
        seconds = self.pace.seconds(batch) * (positions + sum(expected)) / positions
        until = since + min(seconds, self.limits.max_wait)
        own = self.pace.seconds(batch) + MARGIN_SECONDS
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
