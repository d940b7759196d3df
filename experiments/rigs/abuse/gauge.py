"""What a process takes of its machine, as Linux counts it: resident memory, open descriptors, processor time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.process_memory import forget_peak, memory_bytes

SAMPLE_SECONDS = 0.02
"""Between two samples of the descriptors, of whose peak the kernel keeps no record, and of the children."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a process took between two moments.

    Attributes:
        memory_mib: Largest resident size, over the resident size at the beginning; and of the children that it had
            meanwhile the largest one's, over its own at the beginning, as far as the last sample before its end shows.
        descriptors: Most descriptors open at once, over those at the beginning.
        processor_s: Seconds of processor time, of all threads and of the children that have ended.
        threads: Most threads at once, of it and of all processes below it, over those at the beginning.
    """

    memory_mib: float
    descriptors: int
    processor_s: float
    threads: int = 0


class Gauge:
    """Watches a process; a context manager, after which `taken` has the figures.

    Raises IsthmusError where the process has ended, or the system does not say.
    """

    def __init__(self, pid: int) -> None:
        self.taken = Taken(0.0, 0, 0.0)
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="gauge", daemon=True)

    def __enter__(self) -> Gauge:
        forget_peak(self._pid)
        self._memory, self._child = memory_bytes(self._pid, "status", "VmRSS"), 0
        self._children = dict.fromkeys(_children(self._pid), 0)
        for child in self._children:
            with contextlib.suppress(IsthmusError):  # it has ended meanwhile
                forget_peak(child)
                self._children[child] = memory_bytes(child, "status", "VmRSS")
        self._threads = self._most_threads = _threads(self._pid)
        with self._alive():
            self._process = psutil.Process(self._pid)
            self._descriptors = self._most = self._process.num_fds()
            self._processor = sum(self._process.cpu_times()[:4])
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is not None:
            return
        peak = memory_bytes(self._pid, "status", "VmHWM")
        with self._alive():
            seconds = sum(self._process.cpu_times()[:4]) - self._processor  # user, system, and those of ended children
        memory, threads = peak - self._memory + self._child, self._most_threads - self._threads
        self.taken = Taken(memory / 2**20, self._most - self._descriptors, seconds, threads)

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except psutil.Error as error:
            raise IsthmusError(f"process {self._pid} cannot be watched ({error}): has the attack ended it?") from None

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            with contextlib.suppress(psutil.Error):  # it is raised at the end
                self._most = max(self._most, self._process.num_fds())
            self._most_threads = max(self._most_threads, _threads(self._pid))
            for child in _children(self._pid):
                with contextlib.suppress(IsthmusError):  # it has ended meanwhile
                    grown = memory_bytes(child, "status", "VmHWM") - self._children.get(child, 0)
                    self._child = max(self._child, grown)


def _children(pid: int) -> list[int]:
    """The children that a process has now."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):  # psutil would look at all processes
        with contextlib.suppress(OSError):  # a thread has ended meanwhile
            found += map(int, children.read_text().split())
    return found


def _threads(pid: int) -> int:
    """Threads of a process and of all below it; none of one that has ended."""
    own = len(list(Path(f"/proc/{pid}/task").glob("*")))
    return own + sum(map(_threads, _children(pid)))
