"""One daemon for each home: two would do the same jobs twice. The system ends the lock with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from isthmus.common.errors import HomeInUseError
from isthmus.common.files import disk_errors, open_lock
from isthmus.daemon.home import Home


@contextlib.contextmanager
def occupied(home: Home) -> Iterator[None]:
    """Hold a home for this process.

    Raises:
        HomeInUseError: Another process holds it.
        DiskError: The file of the lock cannot be made.
    """
    with disk_errors(home.lock):
        file = open_lock(home.lock)
    with file:
        if not _locked(file):
            holder = file.read().strip() or "of another program"
            raise HomeInUseError(
                f"process {holder} runs the daemon of {home.path} already: use it, stop it by `isthmus edge daemon "
                "stop`, or give this one a --home of its own"
            )
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _locked(file: IO[str]) -> bool:
    """Lock the file; a few times, since `holder` locks it for a moment, too."""
    for pause in (0.0, 0.05, 0.1, 0.2):
        time.sleep(pause)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def holder(home: Home) -> int | None:
    """The process that holds a home; None where there is none, or where it has not yet said its number.

    Raises:
        DiskError: The file of the lock cannot be read.
    """
    if not home.lock.exists():
        return None
    with disk_errors(home.lock):
        file = open_lock(home.lock)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            pid = int(text) if text.isdecimal() else None
            # A daemon that has just taken the lock has not yet replaced what one that was killed has left.
            return pid if pid is not None and _has_open(pid, os.fstat(file.fileno())) else None
    return None


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Whether a process has a file open; where the system does not tell, it is taken to."""
    if not Path("/proc/self/fd").is_dir():
        return True
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.path.samestat(descriptor.stat(), file):
                    return True
    return False
