"""The compute thread: takes work in the scheduler's order, one piece at a time, and hands the results out as futures.

torch's number of threads belongs to the thread that sets it, and the executor to the one that computes, so everything
that touches the span or the stash runs here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch

from isthmus.cloud.scheduler import Job, Scheduler, Share

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Work(Generic[R]):
    run: Callable[[], R]
    future: Future[R]

    def do(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.run()
        except BaseException as error:  # noqa: BLE001  # raised again by whoever waits
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Dispatcher:
    """One thread that computes for all sessions.

    Args:
        threads: torch threads.
    """

    def __init__(self, threads: int) -> None:
        self._scheduler: Scheduler[_Work[Any]] = Scheduler(time.monotonic)
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, args=(threads,), name="compute", daemon=True)
        self._thread.start()

    def submit(
        self,
        run: Callable[[], R],
        *,
        tenant: str,
        owner: bytes,
        share: Share,
        interactive: bool = False,
        positions: int = 0,
    ) -> Future[R]:
        """Have `run` called on the compute thread when its turn comes; the arguments are `Scheduler.add`'s.

        Raises:
            RuntimeError: The thread is ending.
        """
        work = _Work(run, Future[R]())
        with self._changed:
            if self._ending:
                raise RuntimeError("the compute thread takes no more work")
            self._scheduler.add(
                cast("_Work[Any]", work), tenant=tenant, owner=owner, share=share, interactive=interactive,
                positions=positions,
            )  # fmt: skip
            self._changed.notify()
        return work.future

    def cancel(self, owner: bytes) -> None:
        """Cancel what waits of a session."""
        with self._changed:
            gone = list(self._scheduler.cancel(owner))
        for job in gone:
            job.work.future.cancel()

    def waiting(self) -> Mapping[str, int]:
        """How much of each tenant's work waits."""
        with self._changed:
            return self._scheduler.waiting()

    def shutdown(self, *, cancel: bool) -> None:
        """Take no more work, and end once what waits is done, or, with `cancel`, cancelled."""
        with self._changed:
            self._ending = True
            gone = list(self._scheduler.clear()) if cancel else []
            self._changed.notify()
        for job in gone:
            job.work.future.cancel()
        if not cancel:
            self._thread.join()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Do one piece; nothing of it stays here while the next one is waited for. False at the end."""
        job = self._take()
        if job is None:
            return False
        start = time.perf_counter()
        job.work.do()
        with self._changed:
            self._scheduler.finished(job, time.perf_counter() - start)
        return True

    def _take(self) -> Job[_Work[Any]] | None:
        """Wait for the next piece; None at the end."""
        with self._changed:
            while True:
                job = self._scheduler.next()
                if job is not None:
                    return job
                if self._ending and not len(self._scheduler):
                    return None
                ready = self._scheduler.ready_at()
                self._changed.wait(None if ready is None else max(0.0, ready - time.monotonic()) + 1e-3)
