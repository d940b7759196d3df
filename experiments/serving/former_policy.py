"""`former_scheduler.py` behind the interface of the shipped scheduler."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.cloud.engine.requests import Request
from isthmus.cloud.engine.scheduler import Scheduler as ShippedScheduler
from isthmus.experiments.serving.former_requests import Batching, Job, Kind, Share
from isthmus.experiments.serving.former_scheduler import Scheduler as OldScheduler

NEXT_KIND: Final = {"forward": "forward", "kept forward": "backward", "backward": "kept forward"}
WINDOW_SECONDS: Final = 2.0


class FormerScheduler(ShippedScheduler):
    """Has the former scheduler order requests.

    Args:
        clock: Seconds that never go back.
        limits: Of which it takes those that it knows.
        room: Token positions' worth of forward states.
        without: Mechanisms that are switched off.
    """

    def __init__(
        self, clock: Callable[[], float], limits: SchedulerLimits, room: float, without: Collection[str] = ()
    ) -> None:
        self._seconds_now = clock
        batching = Batching(smallest=int(limits.smallest), window=WINDOW_SECONDS)
        self._old: OldScheduler[Request[Any]] = OldScheduler(
            clock, batching, lambda: room, limits.compute_threads, limits.compute_bytes, without
        )
        self._jobs: dict[Request[Any], Job[Request[Any]]] = {}

    def __len__(self) -> int:
        return len(self._old)

    @property
    def has_deadlines(self) -> bool:
        """See `Scheduler`."""
        return self._old.dated

    def may_share(self, request: Request[Any]) -> bool:
        """See `Scheduler`."""
        return request.kind is not None

    def add(self, request: Request[Any]) -> None:
        """See `Scheduler`."""
        now, kind = self._seconds_now(), None
        request.since = now
        if request.kind is not None:
            name = request.kind.name
            opens, closes = name == "kept forward", name == "backward"
            kind = Kind(name, NEXT_KIND.get(name, name), name, opens, closes, request.kind.parallel)
        self._jobs[request] = self._old.add(
            request,
            tenant=request.tenant,
            owner=request.session,
            share=Share(request.share.weight, request.share.positions_per_second),
            interactive=request.interactive,
            positions=request.positions,
            kind=kind,
            deadline=None if request.deadline is None else request.deadline - now,
            continues=request.continues,
            nbytes=request.nbytes,
        )

    def next(self, *, parallel: bool = False) -> list[Request[Any]]:
        """See `Scheduler`."""
        return [job.work for job in self._old.next(anywhere=parallel)]

    def finished(self, batch: Sequence[Request[Any]], seconds: float, failed: Collection[Request[Any]] = ()) -> None:
        """See `Scheduler`."""
        jobs = {request: self._jobs.pop(request) for request in batch}
        self._old.finished(list(jobs.values()), seconds, [jobs[request] for request in failed])

    def take_late(self) -> list[Request[Any]]:
        """See `Scheduler`."""
        return self._taken(self._old.take_late())

    def ready_at(self) -> float | None:
        """See `Scheduler`."""
        return self._old.ready_at()

    def cancel(self, session: bytes) -> list[Request[Any]]:
        """See `Scheduler`."""
        return self._taken(self._old.cancel(session))

    def clear(self) -> list[Request[Any]]:
        """See `Scheduler`."""
        return self._taken(self._old.clear())

    def waiting(self) -> Mapping[str, int]:
        """See `Scheduler`."""
        return self._old.waiting()

    def overdue(self) -> int:
        """See `Scheduler`."""
        return self._old.overdue()

    def sessions_at_work(self) -> int:
        """See `Scheduler`; 2 for any number above 1."""
        return 2 if self._old.crowded else int(bool(len(self._old)) or self._old.busy)

    def _taken(self, jobs: Sequence[Job[Request[Any]]]) -> list[Request[Any]]:
        for job in jobs:
            del self._jobs[job.work]
        return [job.work for job in jobs]
