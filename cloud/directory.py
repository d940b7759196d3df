"""The directory of a cloud's workers: what each tells of itself, and what follows from it. Pure, no Ray.

The controller asks every worker for its report, and tells every worker what the others have said. So a worker knows
where an edge is better off, how many sessions a tenant has elsewhere, and which of its own sessions an edge has opened
again at another worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUMMED = ("span_bytes", "stash_bytes", "stash_budget_bytes", "graphs_evicted", "inputs_evicted", "recomputed")
"""Keys of a worker's status that add up to the cloud's."""
SUMMED_AT_THE_FRONT = ("in_flight", "queue_depth", "overdue", "tokens_per_s")
"""Those of which a pipeline's first stage knows all: what goes on to the next one is the same work."""
COUNTED = ("sessions", "waiting", "deadlines")
"""The same, by tenant or outcome."""
MODEL = ("model", "plan", "span_dtype")


@dataclass(frozen=True, slots=True)
class Seat:
    """A session, as other workers know it: whose it is, of which link, and when it was opened (Unix seconds)."""

    tenant: str
    link: str
    opened: float


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker, as other workers know it: "serving", "draining", or "restarting", which it is if it does not answer."""

    address: str
    state: str
    seats: tuple[Seat, ...] = ()

    @property
    def serving(self) -> bool:
        """Whether it takes sessions."""
        return self.state == "serving"


@dataclass(frozen=True, slots=True)
class Word:
    """What the controller tells a worker: who the others are, and how many sessions to end for their sake.

    `restarts`: how often the worker was started again; None where the controller does not know yet. The worker tells it
    back, so that a new controller knows it too.
    """

    peers: tuple[Peer, ...] = ()
    shed: int = 0
    restarts: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker tells the controller: what `isthmus cloud status` shows of it, and what the others are told.

    `peer` is None for a stage inside a pipeline, which edges do not talk to.
    """

    status: Mapping[str, Any]
    peer: Peer | None


def better_place(own: int, peers: Sequence[Peer], sent: Mapping[str, int]) -> str | None:
    """Where a newcomer is better off than here; None where he is not.

    Args:
        own: sessions here, without him.
        peers: the other workers.
        sent: how many were sent to each address since the peers were heard of.
    """
    loads = {peer.address: len(peer.seats) + sent.get(peer.address, 0) for peer in peers if peer.serving}
    if not loads:
        return None
    address = min(loads, key=lambda each: loads[each])
    return address if loads[address] < own else None


def seats_elsewhere(tenant: str, link: str, peers: Sequence[Peer]) -> int:
    """Sessions that a tenant has at other workers, without those of the link that is being opened here."""
    return sum(seat.tenant == tenant and seat.link != link for peer in peers for seat in peer.seats)


def newer_elsewhere(mine: Seat, peers: Sequence[Peer]) -> bool:
    """Whether an edge has opened the link of a session anew at another worker."""
    return any(
        (seat.tenant, seat.link) == (mine.tenant, mine.link) and seat.opened > mine.opened
        for peer in peers
        for seat in peer.seats
    )


def ranks(seats: Iterable[Seat]) -> dict[tuple[str, str], int]:
    """Of each tenant and link, how many links of the tenant were opened before it.

    A link that has moved may still be seen where it was: it counts once, as of its newest session.

    Args:
        seats: the sessions of all workers.
    """
    newest: dict[tuple[str, str], float] = {}
    for seat in seats:
        newest[seat.tenant, seat.link] = max(seat.opened, newest.get((seat.tenant, seat.link), seat.opened))
    before: Counter[str] = Counter()
    ranked: dict[tuple[str, str], int] = {}
    for tenant, link in sorted(newest, key=lambda each: (newest[each], each[1])):
        ranked[tenant, link] = before[tenant]
        before[tenant] += 1
    return ranked


def surplus(sessions: Mapping[int, int]) -> tuple[int, int] | None:
    """Which worker has sessions that another one should have, and how many; None where they are spread evenly.

    Args:
        sessions: by worker, of those that serve.
    """
    if not sessions:
        return None
    most = max(sessions, key=lambda each: sessions[each])
    excess = (sessions[most] - min(sessions.values())) // 2
    return (most, excess) if excess else None


def missed(deadlines: Mapping[str, int]) -> float:
    """The share of the calls with a deadline that missed it, of their counts by outcome; 0 before the first."""
    calls = sum(deadlines.values())
    return round(1 - deadlines.get("met", 0) / calls, 4) if calls else 0.0


def cloud_status(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The status of a cloud from those of its workers: what is the same for all, sums, and the workers' own.

    Args:
        workers: in their order. `front` says of each whether edges talk to it; one that does not answer has its number,
            its state and its restarts, and no model.
    """
    answering = [worker for worker in workers if "model" in worker]
    front = [worker for worker in answering if worker["front"]]
    states = {str(worker["state"]) for worker in workers}
    state = next((each for each in ("serving", "draining") if each in states), "restarting")
    status: dict[str, Any] = {"state": state}
    if answering:
        status |= {key: answering[0][key] for key in MODEL}
        status["uptime_s"] = max(worker["uptime_s"] for worker in answering)
        status["certificate_not_after"] = min(worker["certificate_not_after"] for worker in answering)
    status |= {key: dict(sum((Counter(worker[key]) for worker in front), Counter())) for key in COUNTED}
    status |= {key: sum(worker[key] for worker in front) for key in SUMMED_AT_THE_FRONT}
    status |= {key: sum(worker[key] for worker in answering) for key in SUMMED}
    status["deadlines_missed"] = missed(status["deadlines"])
    status["restarts"] = sum(worker["restarts"] for worker in workers)
    return {**status, "workers": list(workers)}


class Rate:
    """Counts per second over a sliding window, from a counter that may begin again at zero.

    Args:
        window: seconds.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        self._points: list[tuple[float, float]] = []

    def add(self, now: float, total: float) -> float:
        """Take the counter's value at a time in seconds; returns the rate."""
        if self._points and total < self._points[-1][1]:
            self._points.clear()  # the worker was started again
        self._points.append((now, total))
        while len(self._points) > 2 and self._points[1][0] <= now - self._window:
            del self._points[0]
        then, before = self._points[0]
        passed = now - then
        return (total - before) / passed if passed > 0 else 0.0
