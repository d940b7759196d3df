"""What a job's worker tells the daemon: lines of JSON in its folder, and how it ended.

    reports.jsonl   `at` (seconds since 1970), `kind`, and by kind:
        progress    step, total, speed (seconds a step); bytes_up, bytes_down, calls, retries: since the last report
        metrics     message, data
        checkpoint  id, step, metrics: an adapter lies in `models/<id>`
        message     message
        waiting     since, until, reason: as in `isthmus.edge.client.session_keeper.Wait`; None once the cloud answers
    end.json        `attempt`, `outcome` ("succeeded", "stopped", "failed"), and where it failed `code`, `message`, and
                    `passing`: whether another time may do

A worker appends to the first; it may be killed in the middle of a line, which then counts for nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from isthmus.common.files import disk_errors, write_atomic

REPORTS = "reports.jsonl"
END = "end.json"
BYTES_AT_ONCE = 1 << 20
"""Bytes of reports that are read at a time; a line is far shorter."""
SECONDS = 1.0
"""Between two reports of progress."""


class Reporter:
    """Writes reports; a context manager. Its methods may be called by several threads.

    Args:
        folder: The job's.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / REPORTS
        self._lock = threading.Lock()
        with disk_errors(self._path):
            self._file = self._path.open("ab")
            if self._file.tell():  # what follows half a line of a killed worker is a line of its own
                self._file.write(b"\n")
                self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def tell(self, kind: str, **values: Any) -> None:
        """Write a report.

        Raises:
            DiskError: The disk is full or cannot be written.
        """
        line = json.dumps({"at": time.time(), "kind": kind, **values}).encode()
        with self._lock, disk_errors(self._path):
            self._file.write(line + b"\n")
            self._file.flush()


class Ticker:
    """Calls a function once a second, in a thread of its own, and once more at the end; a context manager."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        self._tick()

    def _run(self) -> None:
        while not self._over.wait(SECONDS):
            self._tick()


def read_reports(folder: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from byte `start` on, some of them at a time, and where the next one begins."""
    path = folder / REPORTS
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(BYTES_AT_ONCE)
    whole = data.rfind(b"\n") + 1
    reports = []
    for line in data[:whole].splitlines():
        try:
            report = json.loads(line)
        except ValueError:
            continue  # half a line
        if isinstance(report, dict):
            reports.append(report)
    return reports, start + whole


def write_end(folder: Path, attempt: int, outcome: str, **values: Any) -> None:
    """Say how a worker ended.

    Raises:
        DiskError: The disk is full or cannot be written.
    """
    write_atomic(folder / END, json.dumps({"attempt": attempt, "outcome": outcome, **values}).encode())


def read_end(folder: Path, attempt: int) -> Mapping[str, Any] | None:
    """How the worker of this attempt ended; None where it was killed. A job that has succeeded has done so for good."""
    try:
        end = json.loads((folder / END).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(end, dict) or (end.get("attempt") != attempt and end.get("outcome") != "succeeded"):
        return None
    return end
