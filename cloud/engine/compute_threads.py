"""The compute threads: they take work in the scheduler's order, batch by batch, and hand the results out as futures.

There are two *lanes*, so that two passes are computed side by side, each with half of torch's threads, whose number
belongs to the thread that sets it. A session that is alone at work has all of them, where its bits do not depend on
that. Everything that touches the span or
the stash runs here, and all but passes of calls without sites in the first lane.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch

from isthmus.cloud.engine.requests import Batching, Job, Kind, Share
from isthmus.cloud.engine.scheduler import Scheduler

R = TypeVar("R")


I = TypeVar("I")  # noqa: E741


class TooLate(Exception):  # noqa: N818 - tells the server what to answer, is never shown to anybody
    """Work could not be done within its deadline, and was not begun."""


@dataclass(frozen=True, slots=True)
class Shared(Generic[I, R]):
    """Work that may be done together with other work of its kind.

    Attributes:
        kind: What it may be done together with.
        item: What it is about.
        together: Does it for several items; returns as many results, in the same order, an error where one raises.
    """

    kind: Kind
    item: I
    together: Callable[[Sequence[I]], Sequence[R | Exception]]


@dataclass(frozen=True, slots=True)
class _Work(Generic[R]):
    run: Callable[[], R]
    shared: Shared[Any, R] | None
    future: Future[R]


def _do(batch: Sequence[_Work[Any]]) -> None:
    """Do work together, or one piece alone, and hand out what comes of it, errors too."""
    wanted = [work for work in batch if work.future.set_running_or_notify_cancel()]
    if not wanted:
        return
    shared = wanted[0].shared
    try:
        if shared is None or len(wanted) == 1:
            results = [wanted[0].run()]
        else:
            results = list(shared.together([work.shared.item for work in wanted if work.shared is not None]))
    except BaseException as error:  # noqa: BLE001  # raised again by whoever waits
        for work in wanted:
            work.future.set_exception(error)
    else:
        for work, result in zip(wanted, results, strict=True):
            if isinstance(result, Exception):
                work.future.set_exception(result)
            else:
                work.future.set_result(result)


LANES = 2
"""Threads that compute, where there are several sessions at work and torch's threads can be divided among them."""


LOOK_SECONDS = 0.05
"""What waits is looked at so often, where nothing else happens."""
IDLE_SECONDS = 1.0
"""After so long without work, memory that is free goes back to the system."""
TIDY_SECONDS = 0.2
"""While several sessions are at work, the size of the process is looked at so often."""


def _refuse(late: Sequence[Job[_Work[Any]]]) -> None:
    """Tell those who wait for it that work is too late. Not under the dispatcher's lock: what they do may take long."""
    for job in late:
        if job.work.future.set_running_or_notify_cancel():
            job.work.future.set_exception(TooLate())


def give_memory_back() -> None:
    """Have glibc return what is free in its heap, where it is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """What this process has in memory; 0 where the system does not tell as Linux does."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return 0


class Dispatcher:
    """The threads that compute for all sessions.

    Args:
        threads: torch threads, of all lanes together.
        batching: what may be done together; None for nothing, and for one lane.
        computed: whether a result was computed, and not refused.
        room: `Scheduler`'s.
        lanes: How many batches may run at a time, at most.
        growth: By so many bytes the process may grow at work before free memory goes back to the system.
        all_threads_from: What has fewer token positions and may share a pass is computed with a lane's threads, also
            where a session is alone at work.
        memory: `Scheduler`'s.
    """

    def __init__(
        self,
        threads: int,
        batching: Batching | None = None,
        computed: Callable[[Any], bool] = lambda _: True,
        room: Callable[[], float] = lambda: math.inf,
        lanes: int = LANES,
        growth: float = 0.0,
        all_threads_from: float = 0.0,
        memory: float = math.inf,
    ) -> None:
        self._growth = growth
        self._all_threads_from = all_threads_from
        self._idle_bytes = resident_bytes()  # of the process when nothing is at work
        self._computed = computed
        self._shared, self._passes = 0, 0  # pieces that might have been done together, and in how many batches
        lanes = 1 if batching is None else min(lanes, threads)
        self._scheduler: Scheduler[_Work[Any]] = Scheduler(time.monotonic, batching, room, lanes, memory)
        self._threads = threads
        self._changed = threading.Condition()
        self._ending = False
        self._worked = 0.0  # when something was done last
        self._untidy = threading.Event()  # something was done since memory was given back for the last time
        self._dated = threading.Event()  # something that waits has a deadline
        self._ended = threading.Event()
        self._lanes = [
            threading.Thread(target=self._run, args=(lane,), name=f"compute {lane}", daemon=True)
            for lane in range(lanes)
        ]
        others = (("tidy", self._keep_tidy), ("deadlines", self._keep_deadlines))
        for thread in (*self._lanes, *(threading.Thread(target=run, name=name, daemon=True) for name, run in others)):
            thread.start()

    def submit(
        self,
        run: Callable[[], R],
        *,
        tenant: str,
        owner: bytes,
        share: Share,
        interactive: bool = False,
        positions: int = 0,
        shared: Shared[Any, R] | None = None,
        deadline: float | None = None,
        continues: bool = False,
        nbytes: int = 0,
    ) -> Future[R]:
        """Have `run` called on the compute thread when its turn comes, or what `shared` says in a batch.

        The other arguments are `Scheduler.add`'s. The future raises `TooLate` where the deadline cannot be kept.

        Raises:
            RuntimeError: The thread is ending.
        """
        work = _Work(run, shared, Future[R]())
        with self._changed:
            if self._ending:
                raise RuntimeError("the compute thread takes no more work")
            self._scheduler.add(
                cast("_Work[Any]", work), tenant=tenant, owner=owner, share=share, interactive=interactive,
                positions=positions, kind=None if shared is None else shared.kind, deadline=deadline,
                continues=continues, nbytes=nbytes,
            )  # fmt: skip
            self._changed.notify_all()
        if deadline is not None:
            self._dated.set()
        return work.future

    def cancel(self, owner: bytes) -> None:
        """Cancel what waits of a session."""
        with self._changed:
            gone = self._scheduler.cancel(owner)
        for job in gone:
            job.work.future.cancel()

    def waiting(self) -> Mapping[str, int]:
        """How much of each tenant's work waits."""
        with self._changed:
            return self._scheduler.waiting()

    def overdue(self) -> int:
        """How much has waited for longer than for company, and not for room."""
        with self._changed:
            return self._scheduler.overdue()

    @property
    def calls_per_pass(self) -> float:
        """How many calls have shared a pass on average, of those that may; 0 before the first."""
        with self._changed:
            return self._shared / self._passes if self._passes else 0.0

    def shutdown(self, *, cancel: bool) -> None:
        """Take no more work, and end once what waits is done, or, with `cancel`, cancelled."""
        self._ended.set()
        self._untidy.set()
        self._dated.set()
        with self._changed:
            self._ending = True
            gone = self._scheduler.clear() if cancel else []
            self._changed.notify_all()
        for job in gone:
            job.work.future.cancel()
        if not cancel:
            for lane in self._lanes:
                lane.join()

    def _run(self, lane: int) -> None:
        while self._turn(lane):
            pass

    def _turn(self, lane: int) -> bool:
        """Do one batch; nothing of it stays here while the next one is waited for. False at the end."""
        batch, threads = self._take(lane)
        if not batch:
            return False
        start, failed, kind = time.perf_counter(), batch, batch[0].kind
        try:
            torch.set_num_threads(threads)
            _do([job.work for job in batch])
            failed = [job for job in batch if not self._is_computed(job.work.future)]
        finally:
            with self._changed:
                if kind is not None:
                    self._shared += len(batch)
                    self._passes += 1
                self._scheduler.finished(batch, time.perf_counter() - start, failed)
                self._worked = time.monotonic()
                self._changed.notify_all()
        self._untidy.set()
        return True

    def _is_computed(self, future: Future[Any]) -> bool:
        return not future.cancelled() and future.exception() is None and self._computed(future.result())

    def _keep_tidy(self) -> None:
        """Give memory back where several sessions at work make the process large, and once after they have been.

        A pass takes memory while another gives it up. Left to itself, the heap gives what is new a place that the
        system has to fill with pages, while those that came free wait for something of their size. But what is given
        back has to be filled again, too, so it is given back only where that is called for.
        """
        while self._untidy.wait() and not self._ended.wait(TIDY_SECONDS):
            with self._changed:
                crowded = self._scheduler.crowded
                idle = not self._scheduler.busy and time.monotonic() > self._worked + IDLE_SECONDS
                if idle:
                    self._untidy.clear()
            if idle or (crowded and resident_bytes() > self._idle_bytes + self._growth):
                give_memory_back()
            if idle:
                self._idle_bytes = resident_bytes()

    def _keep_deadlines(self) -> None:
        """Refuse what has become too late, also while all lanes compute."""
        while self._dated.wait() and not self._ended.wait(LOOK_SECONDS):
            with self._changed:
                late = self._scheduler.take_late()
                if not self._scheduler.dated:
                    self._dated.clear()
            _refuse(late)

    def _threads_for(self, batch: Sequence[Job[_Work[Any]]]) -> int:
        if not batch or batch[0].kind is None:
            return self._threads
        least = min(job.positions for job in batch)
        alone = not self._scheduler.crowded and least >= self._all_threads_from
        return self._threads if alone else max(1, self._threads // len(self._lanes))

    def _take(self, lane: int) -> tuple[list[Job[_Work[Any]]], int]:
        """Wait for the next batch, and for how many threads; empty at the end."""
        while True:
            with self._changed:
                batch = self._scheduler.next(anywhere=lane > 0)
                late = self._scheduler.take_late()
                threads, over = self._threads_for(batch), self._ending and not len(self._scheduler)
                if not batch and not late and not over:
                    ready = self._scheduler.ready_at()
                    wait = None if ready is None else max(0.0, ready - time.monotonic()) + 1e-3
                    if len(self._scheduler):  # who is expected, and so who has to wait, changes with time alone
                        wait = min(wait or LOOK_SECONDS, LOOK_SECONDS)
                    self._changed.wait(wait)
            _refuse(late)
            if batch or over:
                return batch, threads
