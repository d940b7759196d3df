"""The order in which the requests of several tenants are computed: weighted fair queueing, in batches.

Pure, with an injected clock. docs/scheduler.md has the formulas, and what each rule is worth.

- **Fairness.** Each tenant has a virtual time: the seconds of computing that it has had, divided by its weight. The
  lowest goes first (the virtual token counter of Sheng et al. 2024, arXiv 2401.00588, in seconds). A tenant that was
  away is lifted to the present (start-time fair queueing, Goyal et al. 1996). Of a session one request runs at a time.
- **Interactive first.** Interactive requests go before training while their tenant is at most `interactive_lead` ahead.
- **Batches.** A batch has requests of one kind: the first one, and what others have waiting, lowest virtual time first,
  up to `max_batch_tokens`, and up to an even part, for each compute thread, of all that is at work.
- **Waiting for partners.** A training batch that is not full waits for sessions that are expected back.
- **Pacing.** A tenant with several sessions is held to its share of the time while other tenants are at work.
- **Memory.** What runs takes at most `compute_bytes`. A request that would leave a forward state waits while there are
  `state_bytes` of them.
- **Rates and deadlines.** A tenant over its rate begins nothing new. A request whose deadline has passed is refused. A
  batch is no larger than keeps the deadlines of all, by their tenants' measured pace.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.cloud.engine.answered_sessions import AnsweredSessions
from isthmus.cloud.engine.memory_admission import MemoryAdmission, Snapshot
from isthmus.cloud.engine.requests import Request
from isthmus.cloud.engine.tenant_account import TenantAccount

POLL_SECONDS = 0.05
"""What changes with time alone, such as who is expected back, is looked at so often."""


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


class Scheduler:
    """Holds requests until their turn comes.

    Args:
        clock: Seconds that never go back.
        limits: What it keeps to.
        held: Returns session -> bytes of the forward states that it has in memory now.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        limits: SchedulerLimits | None = None,
        held: Callable[[], Mapping[bytes, float]] = dict,
    ) -> None:
        self._clock, self._limits, self._held = clock, limits or SchedulerLimits(), held
        own = self._limits
        self._memory = MemoryAdmission(own.compute_bytes, own.state_bytes, own.max_wait)
        self._waiting: list[Request[Any]] = []  # in the order in which they came
        self._running: dict[bytes, tuple[Request[Any], float]] = {}  # session -> its request, and what it was charged
        self._answered = AnsweredSessions(own.max_wait)
        self._tenants: dict[str, TenantAccount] = {}
        self._present = 0.0  # the lowest virtual time of those that wanted something at the last turn
        self._pace: dict[str, dict[str, float]] = {}  # kind -> tenant -> seconds that a token position took last
        self._over: set[bytes] = set()  # sessions that were cancelled while their requests ran
        self._late: list[Request[Any]] = []
        self._partners_until: float | None = None  # when the first batch that waits for partners waits no longer

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_deadlines(self) -> bool:
        """Whether something that waits has a deadline."""
        return any(request.deadline is not None for request in self._waiting)

    def waiting(self) -> Mapping[str, int]:
        """How many requests of each tenant wait."""
        return Counter(request.tenant for request in self._waiting)

    def overdue(self) -> int:
        """How many requests have waited for longer than `max_wait`, and not because of their tenant's rate."""
        now = self._clock()
        self._refill(now)
        return sum(now - each.since > self._limits.max_wait and self._within_rate(each) for each in self._waiting)

    def virtual_times(self) -> Mapping[str, float]:
        """Each tenant's virtual time."""
        return {name: tenant.virtual_time for name, tenant in self._tenants.items()}

    def sessions_at_work(self) -> int:
        """How many sessions have a request here, or were answered within `max_wait`."""
        return sum(map(len, self._at_work(self._clock()).values()))

    def add(self, request: Request[Any]) -> None:
        """Let a request wait for its turn. The requests of a session keep their order."""
        request.since = now = self._clock()
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = TenantAccount(request.share, self._present, now)
        tenant.refill(now)
        tenant.share = request.share
        if not tenant.busy:
            tenant.virtual_time = max(tenant.virtual_time, self._present)
        tenant.busy += 1
        self._answered.asks(request.session, now)
        self._waiting.append(request)

    def next(self, *, parallel: bool = False) -> list[Request[Any]]:
        """Take the batch whose turn it is; empty where nothing may begin now. The caller says `finished` afterwards.

        Args:
            parallel: Whether to take only what may be computed beside another batch.
        """
        now = self._clock()
        self._partners_until = None
        self._refill(now)
        self._refuse(now)
        snapshot = self._snapshot(now)
        ready = [each for each in self._first_of_each_session() if self._may_begin(each, snapshot)]
        times = {each.tenant: self._tenants[each.tenant].virtual_time for each in ready}
        lowest, reserved = min(times.values(), default=0.0), 0

        def rank(request: Request[Any]) -> tuple[bool, float, float]:
            first = request.interactive and times[request.tenant] <= lowest + self._limits.interactive_lead
            return not first, times[request.tenant], request.since

        for first in sorted(ready, key=rank):
            if parallel and not (first.kind and first.kind.parallel):
                reserved = max(reserved, first.nbytes)  # small requests are not to keep it out
                continue
            batch = self._batch(first, ready, reserved, snapshot)
            until = self._waits_until(batch, snapshot)
            if until > now:
                self._partners_until = min(until, self._partners_until or until)
                continue
            if not self._memory.can_run([first], reserved, snapshot):
                return []
            self._present = max(self._present, lowest)
            self._begin(batch)
            return batch
        return []

    def finished(self, batch: Sequence[Request[Any]], seconds: float, failed: Collection[Request[Any]] = ()) -> None:
        """Charge a batch that `next` gave with the time that it has taken, by token positions.

        Where some have `failed`, or were refused, the batch says nothing of how long a token position takes.
        """
        now, kind = self._clock(), batch[0].kind
        positions = sum(request.positions for request in batch)
        weights = sum(self._tenants[name].share.weight for name in self._at_work(now))
        for request in batch:
            _, charged = self._running.pop(request.session)
            tenant = self._tenants[request.tenant]
            tenant.busy -= 1
            spent = seconds * (request.positions / positions if positions else 1 / len(batch))
            tenant.charge(spent - charged)
            if request.positions:
                part = min(1.0, tenant.share.weight * self._limits.compute_threads / weights)
                tenant.pace(now - seconds, spent, part)
            if positions and kind is not None and not failed:
                self._pace.setdefault(kind.name, {})[request.tenant] = seconds / positions
            if kind is not None and not request.interactive and request.session not in self._over:
                self._answered.answered(request.session, request.tenant, now, request.positions)
        self._over.difference_update(request.session for request in batch)
        if not self._running and not self._waiting:
            self._present = max(self._present, *(self._tenants[each.tenant].virtual_time for each in batch))

    def take_late(self) -> list[Request[Any]]:
        """The requests whose deadlines have passed, and which do not wait any longer; each once."""
        self._refuse(self._clock())
        late, self._late = self._late, []
        return late

    def ready_at(self) -> float | None:
        """When `next` may have something, if it had nothing just now; None where nothing waits."""
        if not self._waiting:
            return None
        now = self._clock()
        moments = [now + POLL_SECONDS, self._partners_until or math.inf]
        for request in self._waiting:
            tenant = self._tenants[request.tenant]
            waits = (now + tenant.overdrawn, tenant.paced_until, request.since + self._limits.max_wait)
            moments += [moment for moment in (*waits, _deadline(request)) if moment > now]
        return min(moments)

    def cancel(self, session: bytes) -> list[Request[Any]]:
        """Take out what waits of a session, which is over."""
        self._answered.forget(session)
        if session in self._running:
            self._over.add(session)
        return self._take_out([request for request in self._waiting if request.session == session])

    def clear(self) -> list[Request[Any]]:
        """Take out everything."""
        return self._take_out(list(self._waiting))

    def _refill(self, now: float) -> None:
        for tenant in self._tenants.values():
            tenant.refill(now)

    def _take_out(self, requests: list[Request[Any]]) -> list[Request[Any]]:
        for request in requests:
            self._waiting.remove(request)
            self._tenants[request.tenant].busy -= 1
        return requests

    def _begin(self, batch: Sequence[Request[Any]]) -> None:
        for request in batch:
            self._waiting.remove(request)
            tenant, charge = self._tenants[request.tenant], self._seconds([request])
            tenant.charge(charge)  # what it takes in fact is charged at its end
            self._running[request.session] = request, charge
            if tenant.share.positions_per_second is not None and not request.continues:
                tenant.budget -= request.positions

    def _at_work(self, now: float) -> dict[str, dict[bytes, int]]:
        """See `Snapshot`."""
        found: dict[str, dict[bytes, int]] = {}
        for session, last in self._answered.at_work(now):
            found.setdefault(last.tenant, {})[session] = last.positions
        for request in (*self._waiting, *(request for request, _ in self._running.values())):
            found.setdefault(request.tenant, {})[request.session] = request.positions
        return found

    def _snapshot(self, now: float) -> Snapshot:
        at_work, held, running_bytes = self._at_work(now), dict(self._held()), 0
        for session, (request, _) in self._running.items():
            held[session] = max(held.get(session, 0), request.keeps_bytes)
            running_bytes += request.nbytes
        states = {name: {each: held[each] for each in held if each in of_one} for name, of_one in at_work.items()}
        return Snapshot(now, at_work, states, running_bytes)

    def _first_of_each_session(self) -> list[Request[Any]]:
        first: dict[bytes, Request[Any]] = {}
        for request in self._waiting:
            if request.session not in self._running:
                first.setdefault(request.session, request)
        return list(first.values())

    def _within_rate(self, request: Request[Any]) -> bool:
        return request.continues or not request.positions or not self._tenants[request.tenant].overdrawn

    def _may_begin(self, request: Request[Any], snapshot: Snapshot) -> bool:
        """Whether rate, pace and forward states allow it."""
        at_work = snapshot.at_work
        paced = request.positions and not request.interactive and len(at_work) > 1 < len(at_work[request.tenant])
        if paced and self._tenants[request.tenant].paced_until > snapshot.now:
            return False
        return self._within_rate(request) and self._memory.can_keep(request, [], snapshot)

    def _may_share(self, request: Request[Any]) -> bool:
        return request.kind is not None and request.positions >= self._limits.smallest

    def _even_part(self, snapshot: Snapshot) -> float:
        """Token positions of a batch, so that each compute thread has an even part of all that is at work."""
        if self._limits.compute_threads == 1:
            return math.inf
        return sum(sum(of_one.values()) for of_one in snapshot.at_work.values()) / self._limits.compute_threads

    def _may_grow(self, positions: int, more: int, part: float) -> bool:
        """Whether so many more positions in a batch bring it nearer to its even part, within `max_batch_tokens`."""
        return positions + more / 2 <= part and positions + more <= self._limits.max_batch_tokens

    def _batch(
        self, first: Request[Any], ready: Iterable[Request[Any]], reserved: int, snapshot: Snapshot
    ) -> list[Request[Any]]:
        """What is computed together with a request, so that all keep their deadlines, and reserved memory stays free.

        Of a tenant there are several requests in it only as far as that puts it ahead of nobody at work.
        """
        batch = [first]
        if not self._may_share(first):
            return batch
        times = {}  # of those that are away, what they will have when they ask again
        for name in snapshot.at_work:
            tenant = self._tenants[name]
            times[name] = tenant.virtual_time if tenant.busy else max(tenant.virtual_time, self._present)
        times[first.tenant] += self._seconds(batch) / first.share.weight
        pool = [each for each in ready if each is not first and self._may_share(each)]
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
                and snapshot.now + self._seconds(together) <= min(map(_deadline, together))
                and self._memory.can_run(together, reserved, snapshot)
                and self._memory.can_keep(request, batch, snapshot)
            ):
                batch = together
                times[request.tenant] += self._seconds([request]) / request.share.weight
        return batch

    def _waits_until(self, batch: Sequence[Request[Any]], snapshot: Snapshot) -> float:
        """How long a batch waits for partners; at most as long as computing it with them takes, and `max_wait`.

        They are the sessions that are expected back and whose tenants have nothing else here.
        """
        if batch[0].interactive or not self._may_share(batch[0]):
            return snapshot.now
        positions, part = sum(each.positions for each in batch), self._even_part(snapshot)
        away = (last for last in self._answered.expected(snapshot.now) if not self._tenants[last.tenant].busy)
        expected = [last.positions for last in away if self._may_grow(positions, last.positions, part)]
        if not expected:
            return snapshot.now
        since = min(each.since for each in batch)
        seconds = self._seconds(batch) * (positions + sum(expected)) / positions
        until = since + min(seconds, self._limits.max_wait)
        return min(until, *(_deadline(each) - self._seconds(batch) for each in batch))

    def _seconds(self, requests: Iterable[Request[Any]]) -> float:
        """How long requests take, by the pace of their tenants at such work; by the quickest's where it has none."""
        total = 0.0
        for request in requests:
            known = self._pace.get(request.kind.name) if request.kind else None
            if known:
                total += request.positions * known.get(request.tenant, min(known.values()))
        return total

    def _refuse(self, now: float) -> None:
        self._late += self._take_out([each for each in self._waiting if _deadline(each) < now])


def _deadline(request: Request[Any]) -> float:
    return math.inf if request.deadline is None else request.deadline


def _alike(one: Request[Any], other: Request[Any]) -> bool:
    """Whether two requests may share a batch."""
    return (
        one.kind is not None
        and other.kind is not None
        and one.kind.name == other.kind.name
        and one.interactive == other.interactive
    )
