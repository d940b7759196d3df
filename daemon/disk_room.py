"""How much of the disk a daemon's home takes, and how much more it may."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isthmus.common.errors import DiskError
from isthmus.daemon.home import SET_ASIDE

COUNT_EVERY = 10.0
"""Seconds for which a count is good; what is written piece by piece meanwhile is added to it."""


class NoRoomError(DiskError):
    """Something does not fit; the message has no figures, since they tell one owner what others have.

    Args:
        figures: The same with figures, for the daemon's first owner.
    """

    def __init__(self, figures: str) -> None:
        super().__init__("the daemon's disk is full: delete files, models or jobs of yours")
        self.figures = figures


class DiskRoom:
    """The room of a home. Its methods may be called by several threads.

    Args:
        path: The home.
        most_gib: What it may take.
    """

    def __init__(self, path: Path, most_gib: float, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = path, now
        self.most = int(most_gib * 2**30)
        self._lock = threading.Lock()
        self._used, self._aside, self._counted_at = 0, 0, float("-inf")

    def used(self) -> int:
        """Bytes of the disk that the home takes, as they were counted last."""
        with self._lock:
            return self._count()

    def set_aside(self) -> int:
        """Those of them that `set-aside` takes."""
        with self._lock:
            self._count()
            return self._aside

    def room_for(self, size: int) -> None:
        """See to it that `size` bytes more are possible.

        Raises:
            NoRoomError: They are not.
        """
        with self._lock:
            self._check(size)

    @contextmanager
    def growing(self) -> Iterator[Callable[[int], None]]:
        """For a file that comes in pieces: what it gives is called with each one's size, before it is written.

        Nothing is kept for pieces that are still to come: whoever sends them slowly, or never, takes no room from
        others. It raises what `room_for` does.
        """
        try:
            yield self._take
        finally:
            with self._lock:
                self._counted_at = float("-inf")  # the file may be gone

    def _take(self, size: int) -> None:
        with self._lock:
            self._check(size)
            self._used += size

    def _count(self) -> int:
        if self._now() - self._counted_at >= COUNT_EVERY:
            self._used, self._aside = taken(self._path), taken(self._path / SET_ASIDE)
            self._counted_at = self._now()
        return self._used

    def _check(self, size: int) -> None:
        used = self._count()
        if used + size > self.most:
            raise NoRoomError(
                f"the daemon's home takes {_mib(used)} of the {_mib(self.most)} that it may, and {_mib(size)} more do "
                "not fit: delete files, models or jobs, or raise `disk_gib` in daemon.toml"
            )
        free = _free(self._path)
        if size > free:
            raise NoRoomError(
                f"the disk of {self._path} has {_mib(free)} left, and {_mib(size)} are needed: free some space"
            )


def taken(path: Path) -> int:
    """Bytes of the disk that a folder takes, with what is in it.

    A file with several names in it counts once. Links are not followed. What vanishes is left out, and so is what this
    user may not read, as root's `lost+found` where the home is a file system of its own.
    """
    total, folders = 0, [path]
    linked: set[tuple[int, int]] = set()
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                        continue
                    found = entry.stat(follow_symlinks=False)
                    file = (found.st_dev, found.st_ino)
                    if file in linked:
                        continue
                    if found.st_nlink > 1:
                        linked.add(file)
                    total += found.st_blocks * 512
        except (FileNotFoundError, PermissionError):
            continue
    return total


def _free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
