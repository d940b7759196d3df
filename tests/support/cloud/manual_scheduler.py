"""A scheduler with a clock that stands still unless it is told, and a worker that does what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.cloud.engine.requests import Kind, Request, Share
from isthmus.cloud.engine.scheduler import Scheduler

FORWARD, BACKWARD = Kind("forward", parallel=True), Kind("backward", parallel=True)


def request(session: str, positions: int = 10, kind: Kind | None = FORWARD, **options: Any) -> Request[str]:
    """A request of a session, which is its tenant's name and a number; it gives the session's name."""
    share = options.pop("share", Share())
    tenant = session.rstrip("0123456789")
    return Request(tenant, session.encode(), share, lambda: session, kind, positions=positions, **options)


def names(batch: Sequence[Request[Any]]) -> list[str]:
    """Whose the requests of a batch are."""
    return sorted(each.session.decode() for each in batch)


@dataclass
class Worker:
    """A worker; `held` is what sessions hold in forward states."""

    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    now: float = 0.0
    held: Mapping[bytes, float] = field(default_factory=dict)
    scheduler: Scheduler = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda: self.now, self.limits, lambda: self.held)

    def add(self, *sessions: str, **options: Any) -> None:
        """Ask for something, once for each session."""
        for session in sessions:
            deadline = options.get("deadline")
            moment = {} if deadline is None else {"deadline": self.now + deadline}
            self.scheduler.add(request(session, **{**options, **moment}))

    def begin(self, *, parallel: bool = False) -> list[Request[Any]]:
        """Take the next batch."""
        return self.scheduler.next(parallel=parallel)

    def end(
        self,
        batch: Sequence[Request[Any]],
        seconds: float,
        *,
        computed: bool = True,
        begun: Sequence[Request[Any]] | None = None,
    ) -> None:
        """A batch that `begin` gave ends, so many seconds from now."""
        self.now += seconds
        self.scheduler.finished(batch, seconds, () if computed else batch, begun)

    def virtual_times(self) -> dict[str, float]:
        """Each tenant's virtual time."""
        return {name: account.virtual_time for name, account in self.scheduler._tenants.items()}

    def turn(self, per_position: float = 0.01, *, computed: bool = True) -> list[str]:
        """Do the next batch; returns whose requests it had."""
        batch = self.begin()
        if batch:
            self.end(batch, per_position * sum(each.positions for each in batch), computed=computed)
        return names(batch)

    def pass_time(self) -> None:
        """Let time pass until the scheduler wants to be asked again."""
        ready = self.scheduler.ready_at()
        assert ready is not None
        assert ready > self.now
        self.now = ready + 1e-6
