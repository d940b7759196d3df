"""Whether there is memory for a request: while it is computed, and for the forward state that it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.cloud.engine.requests import Request


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How things are at a moment.

    Attributes:
        now: The moment.
        at_work: Tenant -> session -> token positions of its last request, of the sessions that have a request here or
            were answered lately.
        states: Tenant -> session -> bytes of forward states, of the sessions at work.
        running_bytes: Memory of what runs.
    """

    now: float
    at_work: Mapping[str, Mapping[bytes, int]]
    states: Mapping[str, Mapping[bytes, float]]
    running_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryAdmission:
    """The two budgets, in bytes.

    Attributes:
        compute_bytes: For all that runs at a time; one request alone may take more.
        state_bytes: For the forward states of the sessions at work.
        max_wait: Seconds after which a request waits for forward states no longer.
    """

    compute_bytes: float
    state_bytes: float
    max_wait: float

    def can_run(self, requests: Sequence[Request[Any]], reserved: int, snapshot: Snapshot) -> bool:
        """Whether requests fit beside what runs and what is reserved; one alone does where that is nothing."""
        taken = snapshot.running_bytes + reserved
        alone = not taken and len(requests) == 1
        return alone or taken + sum(each.nbytes for each in requests) <= self.compute_bytes

    def can_keep(self, request: Request[Any], batch: Sequence[Request[Any]], snapshot: Snapshot) -> bool:
        """Whether the forward state that a request would leave fits beside the others', and those of its batch.

        What a tenant holds counts against other tenants only up to its share of the budget, or up to one session's
        state where that is more. So a tenant with many sessions keeps nobody else waiting.
        """
        if not request.keeps_bytes or snapshot.now >= request.since + self.max_wait:
            return True
        share = self.state_bytes / len(snapshot.at_work)
        taken = float(sum(each.keeps_bytes for each in batch))
        for name, states in snapshot.states.items():
            sizes = [size for session, size in states.items() if session != request.session]
            most = math.inf if name == request.tenant else max(share, *sizes, 0)
            taken += min(sum(sizes), most)
        return not taken or taken + request.keeps_bytes <= self.state_bytes
