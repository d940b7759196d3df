"""The process of one job: `python -m isthmus.daemon.jobs.job_worker FOLDER`.

Standard input is a pipe from the daemon. Its end, which also comes when the daemon is killed, asks the job to stop: a
training saves a checkpoint at its next micro-batch. What cannot stop within `STOP_SECONDS` is ended as it is. A job
that was asked to stop has not failed, whatever comes of it: code that is interrupted may tell of something else.

One process at a time works in a folder; a further one waits.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

from isthmus.common.errors import (
    CloudFailedError,
    ConnectionLostError,
    DrainingError,
    IsthmusError,
    OverQuotaError,
    UnreachableError,
)
from isthmus.common.files import locked
from isthmus.common.machine import usable_memory
from isthmus.common.shutdown import INTERRUPTED, run_to_end, stop_asked
from isthmus.daemon.jobs.kinds import Work
from isthmus.daemon.jobs.reports import END, Reporter, read_end, write_end

STOP_SECONDS = 120.0
MOST_FILES = 4096
INTERNAL = 1
"""The code of a defect."""

_PASSING = (UnreachableError, ConnectionLostError, DrainingError, OverQuotaError, CloudFailedError)


def main(folder: Path) -> int:
    """Do what the folder's `spec.json` says; returns the process's exit code."""
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
        with locked(folder / "worker"):
            return _work(folder)
    except KeyboardInterrupt:
        return INTERRUPTED


def _work(folder: Path) -> int:
    work = Work.read(folder)
    end = read_end(folder, work.attempt)
    if end is not None and end["outcome"] == "succeeded":
        return 0  # the process before this one came to the end after all
    (folder / END).unlink(missing_ok=True)
    try:
        from isthmus.daemon.jobs.job_work import do

        with Reporter(folder) as reporter:
            do(work, folder, reporter)
    except KeyboardInterrupt:
        return _stopped(folder, work)
    except IsthmusError as error:
        if stop_asked.is_set():
            return _stopped(folder, work)
        passing = isinstance(error, _PASSING)
        write_end(folder, work.attempt, "failed", code=error.exit_code, message=str(error), passing=passing)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  # the job's owner is told, and the log has the rest
        traceback.print_exc()
        if stop_asked.is_set():
            return _stopped(folder, work)
        message = f"internal error: {type(error).__name__}: {error}"
        write_end(folder, work.attempt, "failed", code=INTERNAL, message=message, passing=False)
        return INTERNAL
    write_end(folder, work.attempt, "succeeded")
    return 0


def _stopped(folder: Path, work: Work) -> int:
    write_end(folder, work.attempt, "stopped")
    return INTERRUPTED


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    stop_asked.set()
    raise KeyboardInterrupt


def _stop_at_end_of_input() -> None:
    sys.stdin.buffer.read()
    stop_asked.set()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(INTERRUPTED)


def bound_process() -> None:
    """Keep this process within three quarters of the memory that it may use, and `MOST_FILES` open files.

    Memory is what is written to (RLIMIT_DATA): torch reserves far more addresses than it uses, which RLIMIT_AS would
    count. Threads have no bound here, as RLIMIT_NPROC counts all processes of a user: the settings have one.
    """
    memory = usable_memory() // 4 * 3
    for kind, most in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_NOFILE, MOST_FILES)):
        _, hard = resource.getrlimit(kind)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def _main() -> None:
    bound_process()
    sys.exit(main(Path(sys.argv[1])))


if __name__ == "__main__":
    run_to_end(_main)
