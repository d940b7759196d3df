"""Gives memory that is free in glibc's heap back to the system while batches run beside each other.

A backward frees its graph while a forward beside it builds one. The heap gives the new tensors a place that the system
has to fill with pages, while the freed pages stay. `malloc_trim` returns them; what is returned has to be filled again,
so it is called only while the process has grown by `growth_bytes`, and once when nothing is at work.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path

TRIM_SECONDS = 0.2
"""Between two looks at the size of the process."""
IDLE_SECONDS = 1.0
"""After so long without work the heap is trimmed once more."""


def trim_heap() -> None:
    """Have glibc return what is free in its heap, where it is glibc."""
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
