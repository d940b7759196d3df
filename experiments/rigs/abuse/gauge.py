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
            meanwhile the largest one's, as far as the last sample before its end shows.
        descriptors: Most descriptors open at once, over those at the beginning.
        processor_s: Seconds of processor time, of all threads and of the children that have ended.
    """

    memory_mib: float
    descriptors: int
    processor_s: float


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
        self.taken = Taken((peak - self._memory + self._child) / 2**20, self._most - self._descriptors, seconds)

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
            for children in Path(f"/proc/{self._pid}/task").glob("*/children"):  # psutil would look at all processes
                with contextlib.suppress(IsthmusError, OSError):  # a thread or a child has ended meanwhile
                    for child in children.read_text().split():
                        self._child = max(self._child, memory_bytes(int(child), "status", "VmHWM"))
