"""What a process takes of its machine, as Linux counts it: resident memory, open descriptors, processor time."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from isthmus.common.errors import IsthmusError
from isthmus.experiments.harness.process_memory import forget_peak, memory_bytes

SAMPLE_SECONDS = 0.02
"""Between two samples of the descriptors, of whose peak the kernel keeps no record, and at the children."""


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
        self._descriptors = self._most = _descriptors(self._pid)
        self._processor = processor_seconds(self._pid)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is not None:
            return
        self.taken = Taken(
            (memory_bytes(self._pid, "status", "VmHWM") - self._memory + self._child) / 2**20,
            self._most - self._descriptors,
            processor_seconds(self._pid) - self._processor,
        )

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            with contextlib.suppress(IsthmusError):  # it is raised at the end
                self._most = max(self._most, _descriptors(self._pid))
                for child in _children(self._pid):
                    with contextlib.suppress(IsthmusError):  # it has ended meanwhile
                        self._child = max(self._child, memory_bytes(child, "status", "VmHWM"))


def processor_seconds(pid: int) -> float:
    """Processor time that a process has had, user and system, with all its threads and the children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise _gone(pid, error) from None
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError as error:
        raise _gone(pid, error) from None
    found = []
    for thread in threads:
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def _descriptors(pid: int) -> int:
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError as error:
        raise _gone(pid, error) from None


def _gone(pid: int, error: OSError) -> IsthmusError:
    return IsthmusError(f"process {pid} cannot be watched ({error.strerror}): has the attack ended it?")
