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
  batch is no larger than keeps the deadlines of all, by their tenants' measured speed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from isthmus.cloud.engine.batching import Answered, Batching, MeasuredSpeed, SchedulerLimits, Snapshot, deadline_of
from isthmus.cloud.engine.requests import Request, Share

POLL_SECONDS = 0.05
"""What changes with time alone, such as who is expected back, is looked at so often: a small part of a batch's time."""


@dataclass(slots=True)
class TenantAccount:
    """What a tenant has had of the computing time, and when it may have more.

    Attributes:
        share: What it may have.
        virtual_time: Seconds of computing that it has had, over its weight.
        refilled: When its budget was last brought up to date.
        busy: How many of its requests wait or run.
        paced_until: When it has had no more than its share of the time.
        budget: Token positions that it may have now; negative when overdrawn.
    """

    share: Share
    virtual_time: float
    refilled: float
    busy: int = 0
    paced_until: float = -math.inf
    budget: float = 0.0

    def __post_init__(self) -> None:
        self.budget = self.share.positions_per_second or 0.0

    def refill(self, now: float) -> None:
        """Add what has come in since the last time; a second's worth is saved up at most (a token bucket)."""
        rate = self.share.positions_per_second
        if rate is not None:
            self.budget = min(rate, self.budget + rate * (now - self.refilled))
        self.refilled = now

    @property
    def overdrawn(self) -> float:
        """Seconds until it may begin something new; 0 for now."""
        rate = self.share.positions_per_second
        return 0.0 if rate is None or self.budget >= 0 else -self.budget / rate

    def charge(self, seconds: float) -> None:
        """Add seconds of computing, or take back some that were charged too many."""
        self.virtual_time += seconds / self.share.weight

    def worked(self, begun: float, seconds: float, fraction: float) -> None:
        """Note that work which began at a moment has taken so many seconds, where it may have a fraction of the time.

        Each second of work moves `paced_until` on by `1 / fraction`: the generic cell rate algorithm (ITU-T I.371).
        """
        self.paced_until = max(self.paced_until, begun) + seconds / fraction


@dataclass(slots=True)
class AnsweredSessions:
    """The last answer of each session, until `forget`.

    Args:
        longest: Seconds after which a session that is silent is not at work.
    """

    longest: float
    _answered: dict[bytes, Answered] = field(default_factory=dict)

    def answered(self, session: bytes, tenant: str, now: float, positions: int) -> None:
        """A session was answered."""
        before = self._answered.get(session)
        returned_after = 0.0 if before is None else before.returned_after
        self._answered[session] = Answered(tenant, now, positions, returned_after)

    def asks(self, session: bytes, now: float) -> None:
        """A session asks again."""
        last = self._answered.get(session)
        if last is not None:
            self._answered[session] = replace(last, returned_after=now - last.at)

    def forget(self, session: bytes) -> None:
        """A session is over."""
        self._answered.pop(session, None)

    def at_work(self, now: float) -> Iterator[tuple[bytes, Answered]]:
        """The sessions that were answered no longer ago than `longest`, also those that have asked again."""
        return ((session, last) for session, last in self._answered.items() if now - last.at <= self.longest)

    def expected(self, now: float) -> Iterator[Answered]:
        """Of these, the ones that have been away for no more than twice as long as the last time."""
        back = (last for _, last in self.at_work(now) if last.returned_after)
        return (last for last in back if now - last.at <= 2 * last.returned_after)


class Scheduler:
    """Holds requests until their turn comes.

    Args:
        clock: Seconds that never go back.
        limits: What it keeps to.
        held: Returns session -> bytes of the forward states that it has in memory now.
    """

    batching = Batching

    def __init__(
        self,
        clock: Callable[[], float],
        limits: SchedulerLimits | None = None,
        held: Callable[[], Mapping[bytes, float]] = dict,
    ) -> None:
        self._clock, self._limits, self._held = clock, limits or SchedulerLimits(), held
        self._waiting: list[Request[Any]] = []  # in the order in which they came
        self._running: dict[bytes, tuple[Request[Any], float]] = {}  # session -> its request, and what it was charged
        self._answered = AnsweredSessions(self._limits.max_wait)
        self._tenants: dict[str, TenantAccount] = {}
        self._present = 0.0  # the lowest virtual time of those that wanted something at the last turn
        self._speed = MeasuredSpeed()
        self._batching = self.batching(self._limits, self._speed)
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

    @property
    def compute_bytes(self) -> float:
        """Memory of all that runs at a time."""
        return self._limits.compute_bytes

    def overdue(self) -> int:
        """How many requests have waited for longer than `max_wait`, and not because of their tenant's rate."""
        now = self._clock()
        self._refill(now)
        return sum(now - each.since > self._limits.max_wait and self._within_rate(each) for each in self._waiting)

    def sessions_at_work(self) -> int:
        """How many sessions have a request here, or were answered within `max_wait`."""
        return sum(map(len, self._at_work(self._clock()).values()))

    def may_share(self, request: Request[Any]) -> bool:
        """Whether a request may share a batch."""
        return self._batching.may_share(request)

    def add(self, request: Request[Any]) -> None:
        """Let a request wait for its turn. The requests of a session keep their order."""
        request.since = now = self._clock()
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = TenantAccount(request.share, self._present, now)
        tenant.refill(now)
        tenant.share = request.share
        tenant.virtual_time = self._standing(tenant)
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
        at_work = {name: self._standing(self._tenants[name]) for name in snapshot.at_work}
        away = [last for last in self._answered.expected(now) if not self._tenants[last.tenant].busy]

        def rank(request: Request[Any]) -> tuple[bool, float, float]:
            first = request.interactive and times[request.tenant] <= lowest + self._limits.interactive_lead
            return not first, times[request.tenant], request.since

        for first in sorted(ready, key=rank):
            if parallel and not (first.kind and first.kind.parallel):
                reserved = max(reserved, first.nbytes)  # small requests are not to keep it out
                continue
            batch = self._batching.batch(first, ready, at_work, reserved, snapshot)
            until = self._batching.waits_until(batch, away, snapshot)
            if until > now:
                self._partners_until = min(until, self._partners_until or until)
                continue
            if not self._batching.can_run([first], reserved, snapshot):
                return []
            self._present = max(self._present, lowest)
            self._begin(batch)
            return batch
        return []

    def finished(
        self,
        batch: Sequence[Request[Any]],
        seconds: float,
        failed: Collection[Request[Any]] = (),
        begun: Collection[Request[Any]] | None = None,
    ) -> None:
        """Charge a batch that `next` gave with the time that it has taken, by token positions.

        Args:
            batch: Its requests.
            seconds: How long it has taken.
            failed: Those that have failed, or were refused: then the batch says nothing of how long a token position
                takes.
            begun: Those that could begin, which pay for the time; None for all. Where none could, all pay.
        """
        now, kind = self._clock(), batch[0].kind
        begun = batch if begun is None else begun
        paying = begun or batch
        positions = sum(request.positions for request in paying)
        weights = sum(self._tenants[name].share.weight for name in self._at_work(now))
        for request in batch:
            _, charged = self._running.pop(request.session)
            tenant = self._tenants[request.tenant]
            tenant.busy -= 1
            part = request.positions / positions if positions else 1 / len(paying)
            spent = seconds * part if request in paying else 0.0
            tenant.charge(spent - charged)
            if request not in begun:
                continue
            if request.positions:
                fraction = min(1.0, tenant.share.weight * self._limits.compute_threads / weights)
                tenant.worked(now - seconds, spent, fraction)
            if positions and kind is not None and not failed:
                self._speed.measured(kind, request.tenant, seconds / positions)
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
            moments += [moment for moment in (*waits, deadline_of(request)) if moment > now]
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

    def _standing(self, tenant: TenantAccount) -> float:
        """A tenant's virtual time; of one that is away, what it will be when it asks again."""
        return tenant.virtual_time if tenant.busy else max(tenant.virtual_time, self._present)

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
            tenant, charge = self._tenants[request.tenant], self._speed.seconds([request])
            tenant.charge(charge)  # what it takes in fact is charged at its end
            self._running[request.session] = request, charge
            if tenant.share.positions_per_second is not None:
                tenant.budget -= _rate_positions(request)

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
        return not _rate_positions(request) or not self._tenants[request.tenant].overdrawn

    def _may_begin(self, request: Request[Any], snapshot: Snapshot) -> bool:
        """Whether rate, pacing and forward states allow it."""
        at_work = snapshot.at_work
        paced = request.positions and not request.interactive and len(at_work) > 1 < len(at_work[request.tenant])
        if paced and self._tenants[request.tenant].paced_until > snapshot.now:
            return False
        return self._within_rate(request) and self._batching.can_keep(request, [], snapshot)

    def _refuse(self, now: float) -> None:
        self._late += self._take_out([each for each in self._waiting if deadline_of(each) < now])


def _rate_positions(request: Request[Any]) -> int:
    """Token positions that a request counts against its tenant's rate."""
    return request.positions if request.rate_positions is None else request.rate_positions
