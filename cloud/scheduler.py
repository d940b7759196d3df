"""Whose turn it is: a fair order of the work that several tenants want of one span. Pure, with an injected clock.

Fairness is by computing time, as in the virtual token counter of Sheng et al. (2024, arXiv 2401.00588): each tenant has
an account of the seconds that its work has taken, divided by its weight, and the tenant with the lowest account comes
next. One that floods only makes its own queue longer. A tenant that was away has saved up no turns, and owes none for
having had the worker to itself: when it comes back, its account is lifted to the *present*, which is where the lowest
account stood at the last turn, as in start-time fair queueing (Goyal et al. 1996).

Interactive work comes before training, as long as its tenant is not more than `LEAD_SECONDS` ahead of its share: nobody
gets more by calling everything interactive. A tenant whose token positions per second are limited begins nothing new
while its budget is overdrawn.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True, eq=False)
class Job(Generic[T]):
    """A piece of work.

    Attributes:
        tenant: Whose.
        owner: The session that it belongs to, for `cancel`.
        interactive: Whether somebody waits for it.
        positions: Token positions that it is charged with; 0 for what computes none.
        work: What the caller wants back.
    """

    tenant: str
    owner: bytes
    interactive: bool
    positions: int
    work: T


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

    def head(self, interactive: bool) -> Job[T] | None:
        """The first piece that may go on now."""
        queue = self.waiting[0 if interactive else 1]
        if not self.overdrawn:
            return queue[0] if queue else None
        return next((job for job in queue if not job.positions), None)


class Scheduler(Generic[T]):
    """Holds work until its turn comes.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account[T]] = {}
        self._present = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._accounts.values()))

    def waiting(self) -> Mapping[str, int]:
        """How much of each tenant's work waits."""
        return Counter({name: len(account) for name, account in self._accounts.items() if len(account)})

    def used(self) -> Mapping[str, float]:
        """Each tenant's account: seconds of computing over its weight, lifted where it was away."""
        return {name: account.used for name, account in self._accounts.items()}

    def add(
        self, work: T, *, tenant: str, owner: bytes, share: Share, interactive: bool = False, positions: int = 0
    ) -> Job[T]:
        """Let a piece of work wait. A tenant's own pieces keep their order, interactive ones among themselves."""
        now = self._clock()
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(share, budget=share.positions_per_second or 0.0, seen=now)
        account.refill(now)
        account.share = share
        if not len(account) and not account.running:
            account.used = max(account.used, self._present)
        job = Job(tenant, owner, interactive, positions, work)
        account.waiting[0 if interactive else 1].append(job)
        return job

    def next(self) -> Job[T] | None:
        """Take the piece whose turn it is; None where there is none, or all that wait have used up their budgets.

        The caller says `finished` afterwards.
        """
        now = self._clock()
        for account in self._accounts.values():
            account.refill(now)
        eager = [account for account in self._accounts.values() if account.head(True)]
        patient = [account for account in self._accounts.values() if account.head(False)]
        if not eager and not patient:
            return None
        lowest = min(account.used for account in (*eager, *patient))
        leading = [account for account in eager if account.used <= lowest + LEAD_SECONDS]
        account = min(leading or patient or eager, key=lambda each: each.used)
        job = account.head(bool(leading) or not patient)
        if job is None:
            raise RuntimeError("a tenant without work had its turn")
        account.waiting[0 if job.interactive else 1].remove(job)
        account.running += 1
        if account.share.positions_per_second is not None:
            account.budget -= job.positions
        self._present = max(self._present, lowest)
        return job

    def ready_at(self) -> float | None:
        """When `next` may have something, if it has nothing now; None where nothing waits."""
        now = self._clock()
        times = [now + account.overdrawn for account in self._accounts.values() if len(account)]
        return min(times, default=None)

    def finished(self, job: Job[T], seconds: float) -> None:
        """Charge a piece that `next` gave, with the time that it has computed."""
        account = self._accounts[job.tenant]
        account.running -= 1
        account.used += seconds / account.share.weight
        if not any(len(each) or each.running for each in self._accounts.values()):
            self._present = max(self._present, account.used)

    def cancel(self, owner: bytes) -> Iterator[Job[T]]:
        """Take out what waits of one session."""
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
