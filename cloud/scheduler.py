"""Whose turn it is: a fair order of the work that several tenants want of one span. Pure, with an injected clock.

Fairness is by computing time, as in the virtual token counter of Sheng et al. (2024, arXiv 2401.00588): each tenant has
an account of the seconds that its work has taken, divided by its weight, and the tenant with the lowest account comes
next. One that floods only makes its own queue longer. A tenant that was away has saved up no turns, and owes none for
having had the worker to itself: when it comes back, its account is lifted to the *present*, which is where the lowest
account stood at the last turn, as in start-time fair queueing (Goyal et al. 1996).

Interactive work comes before training, as long as its tenant is not more than `LEAD_SECONDS` ahead of its share: nobody
gets more by calling everything interactive. A tenant whose token positions per second are limited begins nothing new
while its budget is overdrawn.

Pieces of one kind may be done together, in a *batch*. Whose turn it is brings along what others have waiting; a tenant
that is ahead of its share brings less. Training waits for company: for sessions whose next piece is of that kind and
due soon, going by how long they took before, no longer than the batch with them would take, and than `Batching.window`.

A piece may have a deadline. When it has waited for half of that time, and can no longer be in time, going by how long a
token position takes, the piece is given up: what it would have taken is left to those that can. The first half is left
to it in any case, so that a bad guess keeps nobody out.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

LEAD_SECONDS = 2.0
"""Computing time, over its weight, that a tenant's interactive work may be ahead of the others' training."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant may have of a worker's time.

    Attributes:
        weight: Its share against the others', where all want more than there is.
        positions_per_second: Token positions at most, on average; None for no limit.
    """

    weight: float = 1.0
    positions_per_second: float | None = None


THINK_SECONDS = 0.25
"""How long a session that nothing is known of yet counts as one that will ask again at any moment."""
MARGIN_SECONDS = 0.01
"""Before the last moment at which a piece can begin and keep its deadline, its batch begins."""
OVERDUE = 2.0
"""A session that has taken so many times longer than before is not waited for."""


NOVELTY = 0.3
"""Weight of the last one in the averages of how long a token position takes, and a session until it asks again."""


@dataclass(frozen=True, slots=True)
class Batching:
    """What may be done together.

    Attributes:
        positions: Token positions of a batch at most.
        smallest: Token positions of a piece that may be in one, at least.
        window: Seconds that the first piece waits for company at most.
    """

    positions: int = 2048
    smallest: int = 1
    window: float = 2.0


@dataclass(frozen=True, slots=True)
class Kind:
    """What pieces may be done together: those of one name.

    Attributes:
        name: The kind's own.
        then: That of the kind of the same session's next piece.
        pace: Names kinds whose token positions take equally long.
    """

    name: str
    then: str
    pace: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Job(Generic[T]):
    """A piece of work.

    Attributes:
        tenant: Whose.
        owner: The session that it belongs to, for `cancel`.
        interactive: Whether somebody waits for it.
        positions: Token positions that it is charged with; 0 for what computes none.
        work: What the caller wants back.
        kind: What it may be done together with; None for nothing.
        since: When it came.
        until: When it has to be done; None for whenever.
        computes: Whether all of its time is computing for its positions.
        pace: Its kind's, also where it is done alone.
        continues: Whether its positions count already against what the tenant may have a second.
    """

    tenant: str
    owner: bytes
    interactive: bool
    positions: int
    work: T
    kind: Kind | None = None
    since: float = 0.0
    until: float | None = None
    computes: bool = False
    pace: str = ""
    continues: bool = False


@dataclass(frozen=True, slots=True)
class _Answered:
    """What is known of a session that was answered: the kind of its next piece, since when, and the last one's size."""

    then: str
    since: float
    positions: int


@dataclass(slots=True)
class _Account(Generic[T]):
    share: Share
    used: float = 0.0  # seconds of computing over the weight
    budget: float = 0.0  # positions left, negative when overdrawn
    seen: float = 0.0  # when the budget was last brought up to date
    waiting: tuple[deque[Job[T]], deque[Job[T]]] = field(default_factory=lambda: (deque(), deque()))
    running: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.waiting))

    def refill(self, now: float) -> None:
        """Add what has come in since; no more than a second's worth is saved up."""
        rate = self.share.positions_per_second
        if rate is not None:
            self.budget = min(rate, self.budget + rate * (now - self.seen))
        self.seen = now

    @property
    def overdrawn(self) -> float:
        """Seconds until something new may begin; 0 for now."""
        rate = self.share.positions_per_second
        return 0.0 if rate is None or self.budget >= 0 else -self.budget / rate

    def heads(self, interactive: bool) -> Iterator[Job[T]]:
        """The first piece of each session, of those that may go on now, in their order."""
        sessions = set()
        for job in self.waiting[0 if interactive else 1]:
            if job.owner not in sessions and (job.continues or not (job.positions and self.overdrawn)):
                yield job
            sessions.add(job.owner)


class Scheduler(Generic[T]):
    """Holds work until its turn comes.

    Args:
        clock: Monotonic seconds.
        batching: What may be done together; None for nothing.
    """

    def __init__(self, clock: Callable[[], float], batching: Batching | None = None) -> None:
        self._clock = clock
        self._batching = batching
        self._accounts: dict[str, _Account[T]] = {}
        self._present = 0.0
        self._per_position: dict[str, float] = {}  # pace -> seconds, a moving average
        self._answered: dict[bytes, _Answered] = {}  # by session
        self._thinks: dict[tuple[bytes, str], float] = {}  # session and kind -> seconds until it asks, on average
        self._ripe_at: float | None = None  # when what waits for company has waited long enough
        self._late: list[Job[T]] = []

    def __len__(self) -> int:
        return sum(map(len, self._accounts.values()))

    def waiting(self) -> Mapping[str, int]:
        """How much of each tenant's work waits."""
        return Counter({name: len(account) for name, account in self._accounts.items() if len(account)})

    def used(self) -> Mapping[str, float]:
        """Each tenant's account: seconds of computing over its weight, lifted where it was away."""
        return {name: account.used for name, account in self._accounts.items()}

    def add(
        self,
        work: T,
        *,
        tenant: str,
        owner: bytes,
        share: Share,
        interactive: bool = False,
        positions: int = 0,
        kind: Kind | None = None,
        deadline: float | None = None,
        continues: bool = False,
    ) -> Job[T]:
        """Let a piece of work wait. A session's pieces keep their order, interactive ones among themselves.

        With a `deadline`, in seconds from now, it is begun in time to be done by then, or not at all.
        """
        now = self._clock()
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(share, budget=share.positions_per_second or 0.0, seen=now)
        account.refill(now)
        account.share = share
        if not len(account) and not account.running:
            account.used = max(account.used, self._present)
        computes, pace = kind is not None, "" if kind is None else kind.pace
        if self._batching is None or positions < self._batching.smallest:
            kind = None
        until = None if deadline is None else now + deadline
        job = Job(tenant, owner, interactive, positions, work, kind, now, until, computes, pace, continues)
        account.waiting[0 if interactive else 1].append(job)
        last = self._answered.pop(owner, None)
        if last is not None:
            took = now - last.since
            before = self._thinks.get((owner, last.then), took)
            self._thinks[owner, last.then] = before + (took - before) * NOVELTY
        return job

    def next(self) -> list[Job[T]]:
        """Take the batch whose turn it is; empty where there is none, or all that wait have to wait longer.

        The caller says `finished` afterwards.
        """
        now = self._clock()
        self._ripe_at = None
        for account in self._accounts.values():
            account.refill(now)
            self._give_up(account, now)
        leads = self._leads()
        lowest = min((self._accounts[job.tenant].used for job in leads), default=0.0)
        for lead in leads:
            batch = self._batch(lead, now)
            ripe = self._ripe(batch, now)
            if ripe > now:
                self._ripe_at = ripe if self._ripe_at is None else min(ripe, self._ripe_at)
                continue
            for job in batch:
                account = self._accounts[job.tenant]
                account.waiting[0 if job.interactive else 1].remove(job)
                account.running += 1
                if account.share.positions_per_second is not None and not job.continues:
                    account.budget -= job.positions
            self._present = max(self._present, lowest)
            return batch
        return []

    def take_late(self) -> list[Job[T]]:
        """What cannot keep its deadline any more, and does not wait any longer; each once."""
        late, self._late = self._late, []
        return late

    def _give_up(self, account: _Account[T], now: float) -> None:
        for queue in account.waiting:
            late = [job for job in queue if self._latest_start(job) < now]
            for job in late:
                queue.remove(job)
            self._late += late

    def _latest_start(self, job: Job[T]) -> float:
        """When a piece is given up unless it has begun."""
        return math.inf if job.until is None else max(self._begin_by(job), (job.since + job.until) / 2)

    def _begin_by(self, job: Job[T]) -> float:
        """When a piece has to begin so that it keeps its deadline."""
        return math.inf if job.until is None else job.until - self._seconds(job.positions, job)

    def _leads(self) -> list[Job[T]]:
        """The pieces that may begin a batch, the one whose turn it is first."""
        by_account = sorted(self._accounts.values(), key=lambda account: account.used)
        eager = [(account, job) for account in by_account for job in account.heads(True)]
        patient = [(account, job) for account in by_account for job in account.heads(False)]
        lowest = min((account.used for account, _ in (*eager, *patient)), default=0.0)
        leading = [job for account, job in eager if account.used <= lowest + LEAD_SECONDS]
        behind = [job for _, job in eager if job not in leading]
        return [*leading, *(job for _, job in patient), *behind]

    def _batch(self, lead: Job[T], now: float) -> list[Job[T]]:
        """What is done together with a piece, so that all keep their deadlines.

        A tenant adds pieces as long as its account, with them, is not ahead of the others that want something: one it
        may add as long as it is not `LEAD_SECONDS` ahead.
        """
        batch = [lead]
        if self._batching is None or lead.kind is None:
            return batch
        waiting = {name: account for name, account in self._accounts.items() if len(account)}
        used = {name: account.used for name, account in waiting.items()}
        self._charge(used, lead)
        room = self._batching.positions - lead.positions
        pool = [
            job
            for account in waiting.values()
            for job in account.heads(lead.interactive)
            if job.kind is not None and job.kind.name == lead.kind.name and job.owner != lead.owner
        ]
        while pool:
            job = min(pool, key=lambda each: (used[each.tenant], each.since))
            pool.remove(job)
            lowest = min((seconds for name, seconds in used.items() if name != job.tenant), default=used[job.tenant])
            ahead = 0.0 if any(other.tenant == job.tenant for other in batch) else LEAD_SECONDS
            taken = self._batching.positions - room + job.positions
            soonest = min((each.until for each in (*batch, job) if each.until is not None), default=math.inf)
            in_time = now + self._seconds(taken, lead) <= soonest
            if job.positions <= room and used[job.tenant] <= lowest + ahead and in_time:
                batch.append(job)
                room -= job.positions
                self._charge(used, job)
        return batch

    def _seconds(self, positions: int, job: Job[T]) -> float:
        """How long so many token positions take, at the pace of a piece; 0 as long as nothing is known of it."""
        return positions * self._per_position.get(job.pace, 0.0)

    def _charge(self, used: dict[str, float], job: Job[T]) -> None:
        used[job.tenant] += self._seconds(job.positions, job) / self._accounts[job.tenant].share.weight

    def _ripe(self, batch: list[Job[T]], now: float) -> float:
        """When a batch has waited long enough."""
        lead = batch[0]
        if self._batching is None or lead.kind is None or lead.interactive:
            return now
        positions = sum(job.positions for job in batch)
        coming = [
            (moment, last.positions)
            for owner, last in self._answered.items()
            if last.then == lead.kind.name and (moment := self._due(owner, now)) < math.inf
        ]
        if positions >= self._batching.positions:
            return now
        full = self._seconds(positions + sum(more for _, more in coming), lead)
        until = min(job.since for job in batch) + min(self._batching.window, full)
        until = min(until, *(self._begin_by(job) - MARGIN_SECONDS for job in batch))
        return until if any(moment <= until for moment, _ in coming) else now

    def _due(self, owner: bytes, now: float) -> float:
        """When a session that was answered is expected to ask again; infinity where it is long overdue."""
        last = self._answered[owner]
        think = self._thinks.get((owner, last.then))
        if think is None:
            return now if now <= last.since + THINK_SECONDS else math.inf
        return last.since + think if now <= last.since + OVERDUE * think else math.inf

    def ready_at(self) -> float | None:
        """When `next` may have something, if it had nothing just now; None where nothing waits."""
        now = self._clock()
        times = [now + account.overdrawn for account in self._accounts.values() if account.overdrawn and len(account)]
        if self._ripe_at is not None:
            times.append(self._ripe_at)
        jobs = (job for account in self._accounts.values() for queue in account.waiting for job in queue)
        times += [start for job in jobs if (start := self._latest_start(job)) < math.inf]
        return min(times, default=now if len(self) else None)

    def finished(self, batch: list[Job[T]], seconds: float, *, computed: bool = True) -> None:
        """Charge a batch that `next` gave, with the time that it has taken, by token positions.

        One of which not all was `computed` says nothing of how long a token position takes.
        """
        now = self._clock()
        positions = sum(job.positions for job in batch)
        if positions and batch[0].computes and computed:
            last, pace = seconds / positions, batch[0].pace
            before = self._per_position.get(pace, last)
            self._per_position[pace] = before + (last - before) * NOVELTY
        for job in batch:
            account = self._accounts[job.tenant]
            account.running -= 1
            account.used += (
                seconds * (job.positions / positions if positions else 1 / len(batch)) / account.share.weight
            )
            if job.kind is not None and not job.interactive:
                self._answered[job.owner] = _Answered(job.kind.then, now, job.positions)
        if not any(len(each) or each.running for each in self._accounts.values()):
            self._present = max(self._present, *(self._accounts[job.tenant].used for job in batch))

    def cancel(self, owner: bytes) -> Iterator[Job[T]]:
        """Take out what waits of one session, which is over."""
        self._answered.pop(owner, None)
        self._thinks = {each: seconds for each, seconds in self._thinks.items() if each[0] != owner}
        for account in self._accounts.values():
            for queue in account.waiting:
                gone = [job for job in queue if job.owner == owner]
                for job in gone:
                    queue.remove(job)
                yield from gone

    def clear(self) -> Iterator[Job[T]]:
        """Take out everything."""
        for account in self._accounts.values():
            for queue in account.waiting:
                while queue:
                    yield queue.popleft()
