"""The schedulers that `isthmus bench scheduler` compares: the shipped one, it less a mechanism, and the textbook's.

A mechanism of the shipped scheduler is switched off in a subclass of it, so that nothing of that is in the cloud.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isthmus.cloud.engine.batching import Answered, Batching, SchedulerLimits, Snapshot
from isthmus.cloud.engine.requests import Request
from isthmus.cloud.engine.scheduler import Scheduler
from isthmus.experiments.serving.simulated_cloud import STATE_ROOM, MakeScheduler


class _NoWait(Batching):
    """Batches wait for no partners."""

    def waits_until(self, batch: Sequence[Request[Any]], away: Iterable[Answered], snapshot: Snapshot) -> float:
        """See `Batching`."""
        return snapshot.now


class _WholeBatches(Batching):
    """A batch takes all that waits, up to `max_batch_tokens`."""

    def _even_part(self, snapshot: Snapshot) -> float:
        return math.inf


class _WithoutWaiting(Scheduler):
    batching = _NoWait


class _WithoutPacing(Scheduler):
    """Tenants with several sessions are not held to their share."""

    def _may_begin(self, request: Request[Any], snapshot: Snapshot) -> bool:
        self._tenants[request.tenant].paced_until = -math.inf
        return super()._may_begin(request, snapshot)


class _WithoutEvenParts(Scheduler):
    batching = _WholeBatches


class _GreedyBatches(_NoWait, _WholeBatches):
    """A batch takes all that waits, and begins at once."""


class Textbook(_WithoutPacing):
    """Weighted fair queueing over computing time, interactive first within a bound, greedy batches, memory by bytes."""

    batching = _GreedyBatches


class _WithSpeed(Scheduler):
    """A request is refused once it cannot be in time by its tenant's speed, but not in the first half of its time."""

    def _refuse(self, now: float) -> None:
        super()._refuse(now)
        hopeless = [
            each
            for each in self._waiting
            if each.deadline is not None
            and now > max(each.deadline - self._speed.seconds([each]), (each.since + each.deadline) / 2)
        ]
        self._late += self._take_out(hopeless)


LIMITS = SchedulerLimits(compute_threads=2, state_bytes=STATE_ROOM)


@dataclass(frozen=True, slots=True)
class Policy:
    """A scheduler to compare.

    Attributes:
        make: Makes it, of the clock, its limits, and the forward states that sessions hold.
        limits: What it keeps to; `compute_threads` of them is the machine's as well.
    """

    name: str
    make: Callable[[Callable[[], float], SchedulerLimits, Callable[[], Mapping[bytes, float]]], Scheduler]
    limits: SchedulerLimits = LIMITS

    def scheduler(self) -> MakeScheduler:
        """Makes the scheduler for a simulated cloud."""
        return lambda clock, held: self.make(clock, self.limits, held)


SHIPPED, TEXTBOOK = Policy("shipped", Scheduler), Policy("textbook", Textbook)
POLICIES = (
    SHIPPED,
    Policy("shipped, no waiting for partners", _WithoutWaiting),
    Policy("shipped, no pacing", _WithoutPacing),
    Policy("shipped, no even parts", _WithoutEvenParts),
    Policy("shipped, hopeless requests refused", _WithSpeed),
    replace(SHIPPED, name="shipped, no limit of states", limits=replace(SHIPPED.limits, state_bytes=math.inf)),
    replace(SHIPPED, name="shipped, one compute thread", limits=replace(SHIPPED.limits, compute_threads=1)),
    TEXTBOOK,
)
"""The rows of the table."""
