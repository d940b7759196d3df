"""A scheduler of batches, with a clock that stands still unless it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from isthmus.cloud.engine.requests import Batching, Kind, Share
from isthmus.cloud.engine.scheduler import Scheduler

EQUAL = Share()
FORWARD, BACKWARD = Kind("forward", "backward"), Kind("backward", "forward")


@dataclass
class Together:
    """A worker that does batches; a session is a tenant's name and a number."""

    batching: Batching = field(default_factory=lambda: Batching(positions=100, smallest=5, window=0.5))
    now: float = 0.0
    scheduler: Scheduler[str] = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda: self.now, self.batching)

    def add(self, session: str, kind: Kind | None = FORWARD, positions: int = 10, **options: Any) -> None:
        values = {"tenant": session.rstrip("0123456789"), "owner": session.encode(), "share": EQUAL, **options}
        self.scheduler.add(session, positions=positions, kind=kind, **values)

    def turn(self, per_position: float = 0.01, *, computed: bool = True) -> list[str]:
        """Do the next batch; returns whose pieces it had."""
        batch = self.scheduler.next()
        seconds = per_position * sum(job.positions for job in batch)
        self.now += seconds
        if batch:
            self.scheduler.finished(batch, seconds, () if computed else batch)
        return [job.work for job in batch]
