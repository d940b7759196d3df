"""The engine: compute threads that take requests in the scheduler's order, batch by batch.

Everything that touches the span or the activation cache runs on a compute thread, and all but batches of calls without
sites on the first one. With two compute threads, each has half of torch's threads, whose number belongs to the thread
that sets it. A session that is alone at work has all of them, where its bits do not depend on that.

A backward frees its graph while a forward beside it builds one. glibc's heap gives the new tensors a place that the
system has to fill with pages, while the freed pages stay. `malloc_trim` returns them; what is returned has to be filled
again, so the heap is trimmed only while the process has grown, and once when nothing is at work.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from isthmus.backbone.runtime.batch_invariance import BatchInvariance, measure_batch_invariance
from isthmus.backbone.runtime.numerics import VARYING
from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.requests import NotBegun, Request, TooLate
from isthmus.cloud.engine.scheduler import POLL_SECONDS, Scheduler
from isthmus.common.torch_threads import set_torch_threads

R = TypeVar("R")

TRIM_SECONDS = 0.2
"""Between two checks of the process's size: about as long as a pass takes, whose memory is to go back."""
IDLE_SECONDS = 1.0
"""After so long without work the heap is trimmed once more, where no session counts as at work."""


class Engine:
    """The threads that compute for all sessions.

    Args:
        threads: torch threads, of all compute threads together.
        scheduler: Says which requests are computed next, on the clock `time.monotonic`.
        compute_threads: How many batches may run at a time.
        is_computed: Whether a result was computed, and not refused.
        trim_growth: Bytes by which the process may grow before its heap is trimmed; None where it never is.

    Attributes:
        invariance: What was measured of the span's products: requests of a session that is alone at work have all torch
            threads from so many token positions on, as smaller ones would have other bits with them. None without
            batching: then all have them.
    """

    def __init__(
        self,
        threads: int,
        scheduler: Scheduler,
        *,
        compute_threads: int = 1,
        invariance: BatchInvariance | None = None,
        is_computed: Callable[[Any], bool] = lambda _: True,
        trim_growth: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self.invariance, self._is_computed, self._torch_threads = invariance, is_computed, threads
        self._all_threads_from = 0.0 if invariance is None else invariance.all_threads_from
        self._batched, self._batches = 0, 0  # requests that may share a batch, and in how many batches they were
        self._shared: Counter[str] = Counter()  # of each tenant, the requests that shared a batch with another one
        self._changed = threading.Condition()
        self._ending = False
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"compute {number}", daemon=True)
            for number in range(compute_threads)
        ]
        self._trimmer = None if trim_growth is None else HeapTrimmer(self.sessions_at_work, trim_growth)
        self._deadlines, self._ended = threading.Event(), threading.Event()
        for thread in (*self._threads, threading.Thread(target=self._keep_deadlines, name="deadlines", daemon=True)):
            thread.start()

    def submit(self, request: Request[R]) -> Future[R]:
        """Have a request computed when its turn comes.

        Returns:
            The request's future, which raises `TooLate` where its deadline passes before it begins.

        Raises:
            RuntimeError: The engine is ending.
            ValueError: The request takes more memory than there is for all: it would never begin, and nobody behind it.
        """
        with self._changed:
            if self._ending:
                raise RuntimeError("the engine takes no more requests")
            if request.nbytes > self._scheduler.compute_bytes:
                raise ValueError(f"a request of {request.nbytes} bytes of memory never fits: refuse it as it comes in")
            self._scheduler.add(request)
            self._changed.notify_all()
        if request.deadline is not None:
            self._deadlines.set()
        return request.future

    def cancel(self, session: bytes) -> None:
        """Cancel what waits of a session."""
        with self._changed:
            gone = self._scheduler.cancel(session)
        for request in gone:
            request.future.cancel()

    def waiting(self) -> Mapping[str, int]:
        """How many requests of each tenant wait."""
        with self._changed:
            return self._scheduler.waiting()

    def overdue(self) -> int:
        """How many requests have waited for longer than `max_wait`, and not because of their tenant's rate."""
        with self._changed:
            return self._scheduler.overdue()

    def sessions_at_work(self) -> int:
        """How many sessions have a request here, or had one lately."""
        with self._changed:
            return self._scheduler.sessions_at_work()

    @property
    def calls_per_pass(self) -> float:
        """How many requests have shared a batch on average, of those that may; 0 before the first."""
        with self._changed:
            return self._batched / self._batches if self._batches else 0.0

    @property
    def shared_by_tenant(self) -> dict[str, int]:
        """How many requests of each tenant have shared a batch with another one."""
        with self._changed:
            return dict(self._shared)

    @property
    def threads_note(self) -> str:
        """Which calls have fewer than all threads, and which bits depend on the batch; see `numerics`."""
        found, part = self.invariance, max(1, self._torch_threads // len(self._threads))
        if found is None:
            return ""
        if found.rows is None:
            return VARYING
        if part == self._torch_threads:
            return ""
        if found.threads is None:
            return f", {part} from {found.rows} positions on"
        return f", {part} from {found.rows} to {found.threads - 1} positions" if found.threads > found.rows else ""

    @property
    def threads_of_a_call(self) -> int:
        """torch threads of a call that computes on a thread of its own, as it may pause.

        All of them, or those of a compute thread where bits depend on their number.
        """
        found = self.invariance
        same_bits = found is None or self._all_threads_from <= (found.rows or 0)
        return self._torch_threads if same_bits else self._torch_threads // len(self._threads)

    def shutdown(self, *, cancel: bool) -> None:
        """Take no more requests, and end once those that wait are computed, or, with `cancel`, cancelled."""
        self._ended.set()
        self._deadlines.set()
        if self._trimmer is not None:
            self._trimmer.shutdown()
        with self._changed:
            self._ending = True
            gone = self._scheduler.clear() if cancel else []
            self._changed.notify_all()
        for request in gone:
            request.future.cancel()
        if not cancel:
            for thread in self._threads:
                thread.join()

    def _run(self, number: int) -> None:
        while self._turn(number):
            pass

    def _turn(self, number: int) -> bool:
        """Compute one batch; nothing of it stays here while the next one is waited for. False at the end."""
        batch, threads = self._take(number)
        if not batch:
            return False
        start, failed, begun = time.perf_counter(), batch, batch
        try:
            set_torch_threads(threads)
            _compute(batch)
            begun = [each for each in batch if not _was_not_begun(each.future)]
            failed = [each for each in begun if not self._was_computed(each.future)]
        finally:
            with self._changed:
                if begun and self._scheduler.may_share(batch[0]):
                    self._batched += len(begun)
                    self._batches += 1
                    tenants = [request.tenant for request in begun if not request.future.cancelled()]
                    self._shared.update(tenants if len(tenants) > 1 else ())
                self._scheduler.finished(batch, time.perf_counter() - start, failed, begun)
                self._changed.notify_all()
        if self._trimmer is not None:
            self._trimmer.worked()
        return True

    def _was_computed(self, future: Future[Any]) -> bool:
        return not future.cancelled() and future.exception() is None and self._is_computed(future.result())

    def _take(self, number: int) -> tuple[list[Request[Any]], int]:
        """Wait for the next batch, and for how many torch threads; empty at the end."""
        while True:
            with self._changed:
                batch = self._scheduler.next(parallel=number > 0)
                late = self._scheduler.take_late()
                threads, over = self._threads_for(batch), self._ending and not len(self._scheduler)
                if not batch and not late and not over:
                    ready = self._scheduler.ready_at()
                    # A millisecond later, so that the moment has passed on the scheduler's clock as well.
                    self._changed.wait(None if ready is None else max(0.0, ready - time.monotonic()) + 1e-3)
            _refuse(late)
            if batch or over:
                return batch, threads

    def _threads_for(self, batch: Sequence[Request[Any]]) -> int:
        if not batch or not self._scheduler.may_share(batch[0]):
            return self._torch_threads
        smallest, kind = min(request.positions for request in batch), batch[0].kind
        wanted = None if kind is None else kind.all_threads
        may_have_all = smallest >= self._all_threads_from if wanted is None else wanted
        alone = may_have_all and self._scheduler.sessions_at_work() <= 1
        return self._torch_threads if alone else max(1, self._torch_threads // len(self._threads))

    def _keep_deadlines(self) -> None:
        """Refuse what has become too late, also while all threads compute."""
        while self._deadlines.wait() and not self._ended.wait(POLL_SECONDS):
            with self._changed:
                late = self._scheduler.take_late()
                if not self._scheduler.has_deadlines:
                    self._deadlines.clear()
            _refuse(late)


def start_engine(
    executor: Executor,
    threads: int,
    options: EngineOptions,
    *,
    is_computed: Callable[[Any], bool] = lambda _: True,
    scheduler: type[Scheduler] = Scheduler,
) -> Engine:
    """Start what computes for an executor.

    Args:
        executor: What the batches run on.
        threads: torch threads, of all compute threads together.
        options: The operator's.
        is_computed: `Engine`'s.
        scheduler: Another one, for comparison.
    """
    batching = options.batching
    compute_threads = min(options.compute_threads if batching and executor.side_by_side else 1, threads)
    found = measure_batch_invariance(executor.host.span, threads, threads // compute_threads) if batching else None
    limits = SchedulerLimits(
        max_batch_tokens=options.max_batch_tokens,
        max_wait=options.max_wait if batching else 0.0,
        interactive_lead=options.interactive_lead,
        compute_threads=compute_threads,
        smallest=math.inf if found is None else found.rows or 1,
        compute_bytes=executor.compute_bytes,
        state_bytes=executor.span_bytes / 2 if options.state_bytes is None else options.state_bytes,
    )
    return Engine(
        threads,
        scheduler(time.monotonic, limits, executor.cache.held),
        compute_threads=compute_threads,
        invariance=found,
        is_computed=is_computed,
        trim_growth=limits.state_bytes if options.trim_heap else None,
    )


def _compute(batch: Sequence[Request[Any]]) -> None:
    """Compute a batch, or one request alone, and hand out what comes of it, errors too."""
    wanted = [request for request in batch if request.future.set_running_or_notify_cancel()]
    if not wanted:
        return
    run_batch = wanted[0].run_batch
    try:
        if run_batch is None or len(wanted) == 1:
            results = [wanted[0].run()]
        else:
            results = list(run_batch([request.item for request in wanted]))
    except BaseException as error:  # noqa: BLE001  # raised again by whoever waits
        for request in wanted:
            request.future.set_exception(error)
    else:
        for request, result in zip(wanted, results, strict=True):
            if isinstance(result, Exception):
                request.future.set_exception(result)
            else:
                request.future.set_result(result)


def _was_not_begun(future: Future[Any]) -> bool:
    return not future.cancelled() and isinstance(future.exception(), NotBegun)


def _refuse(late: Sequence[Request[Any]]) -> None:
    """Say that requests are too late. Not under the engine's lock: whoever waits for them may ask it something."""
    for request in late:
        if request.future.set_running_or_notify_cancel():
            request.future.set_exception(TooLate())


# The heap -------------------------------------------------------------------------------------------------------------


def trim_heap() -> None:
    """Have glibc return what is free in its heaps, where it is glibc.

    It keeps what is free at the end of a compute thread's own heap, at most 64 MiB of each: later passes use it again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """What this process has in memory; 0 where the system does not say it as Linux does."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return 0


class HeapTrimmer:
    """A thread that trims the heap after work.

    Args:
        sessions_at_work: How many sessions are at work.
        growth_bytes: By so much the process may have grown since it was idle, before its heap is trimmed while several
            sessions are at work.
    """

    def __init__(self, sessions_at_work: Callable[[], int], growth_bytes: float) -> None:
        self._sessions_at_work, self._growth_bytes = sessions_at_work, growth_bytes
        self._idle_bytes = resident_bytes()
        self._worked, self._ended = threading.Event(), threading.Event()
        self._worked_at = 0.0
        threading.Thread(target=self._run, name="heap trimmer", daemon=True).start()

    def worked(self) -> None:
        """Something was computed. May be called from any thread."""
        self._worked_at = time.monotonic()
        self._worked.set()

    def shutdown(self) -> None:
        """End the thread."""
        self._ended.set()
        self._worked.set()

    def _run(self) -> None:
        while self._worked.wait() and not self._ended.wait(TRIM_SECONDS):
            sessions = self._sessions_at_work()
            idle = not sessions and time.monotonic() > self._worked_at + IDLE_SECONDS
            if idle:
                self._worked.clear()
            if idle or (sessions > 1 and resident_bytes() > self._idle_bytes + self._growth_bytes):
                trim_heap()
            if idle:
                self._idle_bytes = resident_bytes()
