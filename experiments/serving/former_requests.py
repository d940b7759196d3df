"""What `former_scheduler.py` orders."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant may have of a worker's time.

    Attributes:
        weight: Its share against the others', where all want more than there is.
        positions_per_second: Token positions at most, on average; None for no limit.
    """

    weight: float = 1.0
    positions_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Batching:
    """What may be done together.

    Attributes:
        positions: Token positions of a batch at most.
        smallest: Token positions of a piece that may be in one, at least.
        window: Seconds that the first piece waits for company at most.
        open_calls: So many things may be open at a time, whatever there is room for.
    """

    positions: int = 2048
    smallest: int = 1
    window: float = 2.0
    open_calls: int = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """What pieces may be done together: those of one name.

    Attributes:
        name: The kind's own.
        then: That of the kind of the same session's next piece.
        pace: Names kinds whose token positions take equally long.
        opens: Whether it leaves something in memory for a piece that closes it.
        closes: Whether it takes that out.
        anywhere: Whether it may be done beside whatever else is done.
    """

    name: str
    then: str
    pace: str = ""
    opens: bool = False
    closes: bool = False
    anywhere: bool = False


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
        anywhere: Whether it may be done beside whatever else is done.
        pace: Its kind's, also where it is done alone.
        continues: Whether its positions count already against what the tenant may have a second.
        nbytes: Memory that it takes while it is done, as far as that is to be held to a budget.
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
    anywhere: bool = False
    pace: str = ""
    continues: bool = False
    nbytes: int = 0


@dataclass(slots=True)
class Account(Generic[T]):
    """What a tenant has had, what it may have, and what of its work waits."""

    share: Share
    used: float = 0.0  # seconds of computing over the weight
    budget: float = 0.0  # positions left, negative when overdrawn
    seen: float = 0.0  # when the budget was last brought up to date
    waiting: tuple[deque[Job[T]], deque[Job[T]]] = field(default_factory=lambda: (deque(), deque()))
    running: int = 0
    rests_until: float = 0.0  # when it has had no more than its share of the time

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

    def heads(self, interactive: bool, running: Collection[bytes]) -> Iterator[Job[T]]:
        """The first piece of each session, of those that may go on now, in their order."""
        sessions = set(running)
        for job in self.waiting[0 if interactive else 1]:
            if job.owner not in sessions and (job.continues or not (job.positions and self.overdrawn)):
                yield job
            sessions.add(job.owner)
