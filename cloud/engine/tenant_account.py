"""What a tenant has had of a worker's computing time, and when it may have more."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.cloud.engine.requests import Share


@dataclass(slots=True)
class TenantAccount:
    """A tenant's virtual time, its rate and its pace.

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

    def pace(self, begun: float, seconds: float, part: float) -> None:
        """Note that work which began at a moment has taken so many seconds, where it may have a part of the time.

        Each second of work moves `paced_until` on by `1 / part` seconds: the generic cell rate algorithm (ITU-T I.371).
        """
        self.paced_until = max(self.paced_until, begun) + seconds / part
