"""The directory of a cloud's workers: what each worker reports, and what follows from the reports. Pure, no Ray.

The controller asks every worker for its report, and sends every worker the other workers' entries. So a worker knows
which worker has fewer sessions, how many sessions a tenant has elsewhere, and which of its own sessions an edge has
opened again at another worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUMMED = (
    "span_bytes", "stash_bytes", "stash_budget_bytes", "graphs_evicted", "inputs_evicted", "recomputed",
    "caches", "cache_bytes", "cache_budget_bytes", "caches_evicted", "caches_lost",
)  # fmt: skip
"""Keys of a worker's status whose sum over all workers is the cloud's."""
SUMMED_AT_THE_FRONT = ("in_flight", "queue_depth", "overdue", "tokens_per_s")
"""Keys that are summed over the workers that edges talk to: a pipeline's later stages do the same work again."""
COUNTED = ("sessions", "waiting", "deadlines")
"""The same for keys that are counts by tenant or by outcome."""
MODEL = ("model", "plan", "span_dtype")


@dataclass(frozen=True, slots=True)
class SessionEntry:
    """A session, as other workers know it: its tenant, its link, and when it was opened (Unix seconds)."""

    tenant: str
    link: str
    opened: float


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker, as other workers know it.

    Attributes:
        address: where edges find it.
        state: "serving", "draining", or "restarting" where it does not answer.
        sessions: those that are open there and not ending.
    """

    address: str
    state: str
    sessions: tuple[SessionEntry, ...] = ()

    @property
    def serving(self) -> bool:
        """Whether it takes sessions."""
        return self.state == "serving"


@dataclass(frozen=True, slots=True)
class Update:
    """What the controller sends a worker.

    Attributes:
        peers: the other workers.
        end_newest: how many of its newest sessions the worker is to end, as other workers have fewer.
        restarts: how often the worker was restarted; None where the controller does not know yet. The worker reports
            the number back, so that a new controller learns it.
    """

    peers: tuple[Peer, ...] = ()
    end_newest: int = 0
    restarts: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker reports to the controller.

    Attributes:
        status: what `isthmus cloud status` shows of it.
        peer: its entry for the other workers; None for a stage inside a pipeline, which edges do not talk to.
    """

    status: Mapping[str, Any]
    peer: Peer | None


def less_loaded(own: int, peers: Sequence[Peer], sent: Mapping[str, int]) -> str | None:
    """The address of the worker with the fewest sessions, if it has fewer than this one; None otherwise.

    Args:
        own: sessions here, without the new one.
        peers: the other workers.
        sent: how many edges were sent to each address since its last report.
    """
    loads = {peer.address: len(peer.sessions) + sent.get(peer.address, 0) for peer in peers if peer.serving}
    if not loads:
        return None
    address = min(loads, key=lambda each: loads[each])
    return address if loads[address] < own else None


def sessions_elsewhere(tenant: str, link: str, peers: Sequence[Peer]) -> int:
    """Sessions that a tenant has at other workers, without those of the link that is being opened here."""
    return sum(entry.tenant == tenant and entry.link != link for peer in peers for entry in peer.sessions)


def newer_elsewhere(mine: SessionEntry, peers: Sequence[Peer]) -> bool:
    """Whether an edge has opened the link of a session anew at another worker."""
    return any(
        (entry.tenant, entry.link) == (mine.tenant, mine.link) and entry.opened > mine.opened
        for peer in peers
        for entry in peer.sessions
    )


def ranks(entries: Iterable[SessionEntry]) -> dict[tuple[str, str], int]:
    """For each tenant and link, how many links of the tenant were opened before it.

    A link that has moved may still be reported where it was: it counts once, as of its newest session.

    Args:
        entries: the sessions of all workers.
    """
    newest: dict[tuple[str, str], float] = {}
    for entry in entries:
        newest[entry.tenant, entry.link] = max(entry.opened, newest.get((entry.tenant, entry.link), entry.opened))
    before: Counter[str] = Counter()
    ranked: dict[tuple[str, str], int] = {}
    for tenant, link in sorted(newest, key=lambda each: (newest[each], each[1])):
        ranked[tenant, link] = before[tenant]
        before[tenant] += 1
    return ranked


def surplus(sessions: Mapping[int, int]) -> tuple[int, int] | None:
    """The worker with the most sessions, and how many of them should move; None where they are spread evenly.

    Args:
        sessions: how many each serving worker has.
    """
    if not sessions:
        return None
    most = max(sessions, key=lambda each: sessions[each])
    excess = (sessions[most] - min(sessions.values())) // 2
    return (most, excess) if excess else None


def missed(deadlines: Mapping[str, int]) -> float:
    """The share of the calls with a deadline that missed it, from their counts by outcome; 0 before the first call."""
    calls = sum(deadlines.values())
    return round(1 - deadlines.get("met", 0) / calls, 4) if calls else 0.0


def cloud_status(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The status of a cloud from those of its workers: what is the same for all, sums, and each worker's own status.

    Args:
        workers: in their order. `front` says whether edges talk to a worker. A worker that does not answer has its
            number, its state and its restarts, and no model.
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
        """Take the counter's value `total` at `now` seconds; returns the rate."""
        if self._points and total < self._points[-1][1]:
            self._points.clear()  # the worker was started again
        self._points.append((now, total))
        while len(self._points) > 2 and self._points[1][0] <= now - self._window:
            del self._points[0]
        then, before = self._points[0]
        passed = now - then
        return (total - before) / passed if passed > 0 else 0.0
